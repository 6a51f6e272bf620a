"""Where sessions come from, what they do, and how their transactions end.

Nothing here knows Celery.
"""
