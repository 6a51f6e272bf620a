"""Every way to end a task, on every pool, database and broker: one suite, real workers."""
