"""The Celery apps that the tests' workers run."""
