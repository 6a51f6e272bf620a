"""The database as Celery's broker: the table of the outbox is the queue.

Above the outbox, which writes the messages, below ``Alchemy``, which says which database it is.
kombu finds ``transport.Transport`` by the scheme of the URL. On the path of a message: ``queues``
says where it goes, ``claims`` gives it to a worker, ``channel`` delivers it, ``acknowledging`` ends
it.
"""

from __future__ import annotations

from celery.app.backends import BACKEND_ALIASES
from kombu.transport import TRANSPORT_ALIASES

__all__ = ["SCHEME", "make_known"]

#: Of the URLs ``alchemy://`` and ``alchemy+<SQLAlchemy URL>``.
SCHEME = "alchemy"


def make_known() -> None:
    """Have kombu find the transport, and Celery the result backend, by their scheme."""
    TRANSPORT_ALIASES[SCHEME] = f"{__name__}.transport:Transport"
    BACKEND_ALIASES[SCHEME] = f"{__name__}.results:AlchemyBackend"
