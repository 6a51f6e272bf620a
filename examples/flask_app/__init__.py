"""A shop on Flask and Flask-SQLAlchemy: one engine and one model base for views and tasks."""
