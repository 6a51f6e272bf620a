"""Results of tasks that no worker runs: whose app writes them, and what is known of the request.

Beneath what ends tasks by their rows alone: those that are revoked while they wait, and those that
are set aside because their workers were lost.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from celery import Celery
from celery.app.task import Context
from kombu.message import Message as KombuMessage
from kombu.serialization import prepare_accept_content

from ..databases.tables import Found
from ..messages.celery_types import App, Fields
from ..messages.message import Message
from . import SCHEME
from .homes import BrokerHome

__all__ = ["app_of", "received", "request_of"]

logger: logging.Logger = logging.getLogger(__name__)


def received(message: Message, accept: Iterable[str]) -> KombuMessage:
    """Return a message as a consumer has it."""
    # Its stub knows only texts as bodies.
    parts: Fields = {
        "body": message.body,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "headers": message.headers,
        "accept": prepare_accept_content(accept),
    }
    return KombuMessage(**parts)


def request_of(app: App, row: Found) -> Context:
    """Return what a worker would know of a task.

    Of a message that cannot be read, its id and name.
    """
    try:
        message = Message.from_parts(row.body, row.envelope or "")
    except (TypeError, ValueError):
        return Context({"id": row.task_id, "task": row.task_name})
    try:
        args, kwargs, embedded = received(message, app.conf.accept_content).decode()
    except Exception as exc:  # noqa: BLE001 - a serializer's: the task ends.
        logger.warning("The arguments of the task %s cannot be read: %r", row.task_id, exc)
        return Context(message.headers)
    parts: Fields = embedded or {}
    return Context({**message.headers, **parts, "args": args, "kwargs": kwargs})


def app_of(home: BrokerHome) -> App:
    """Return the app of a broker; of one that is known by its URL alone, one with its results."""
    if home.app is not None:
        return home.app
    url = home.engine().url.render_as_string(hide_password=False)
    return Celery(f"{SCHEME}-url", set_as_current=False, backend=f"{SCHEME}+{url}")
