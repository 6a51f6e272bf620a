"""Celery's own test suite, run with SessionTask as the default task class and compared with plain Celery."""
