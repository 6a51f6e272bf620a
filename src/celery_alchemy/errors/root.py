"""The base of every exception that celery-alchemy raises by itself."""

from __future__ import annotations

__all__ = ["CeleryAlchemyError"]


class CeleryAlchemyError(Exception):
    """Base of every exception that celery-alchemy raises by itself.

    Errors of the database and of the broker are never wrapped: they reach the caller as
    SQLAlchemy's and kombu's own.
    """
