"""Document ingestion and cited search: every step is one Celery task and one SQLAlchemy transaction."""

__version__ = "0.1.0"
