"""The failures that users of Celery and SQLAlchemy report: ours does not have them, the patterns of today have."""
