"""The real databases and brokers of the tests: found, started from wheels, or skipped with a reason."""
