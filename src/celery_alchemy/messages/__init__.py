"""A finished Celery message and its way to a broker; nothing here knows SQLAlchemy."""
