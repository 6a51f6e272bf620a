"""Any mix of what applications do with sessions in tasks, against a model of what comes of it."""
