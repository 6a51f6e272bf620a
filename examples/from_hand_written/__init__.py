"""The usual hand-written ways to give a Celery task a session, their bugs, and the same tasks with celery-alchemy."""
