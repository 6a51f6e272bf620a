"""The tables that make the database a broker: queues, workers, and what is said to all.

Beside the outbox's table, which holds the messages themselves; ``broker`` reads and writes all of
them.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Index, MetaData, String, Table

from .column_types import BLOB, ID, NUMBER, QUEUE, TEXT, TIME

__all__ = ["BROADCASTS", "QUEUES", "WORKERS", "build_queue_tables"]

QUEUES = "celery_queues"
WORKERS = "celery_workers"
BROADCASTS = "celery_broadcasts"


def build_queue_tables(metadata: MetaData, schema: str | None = None) -> None:
    """Make the tables in a MetaData.

    ``celery_queues``: a row for each queue, with an empty exchange, and for each of its bindings.

    =========== ============================================================================
    id          a digest of the other texts: three long ones are too long for a key of MySQL
    queue       the queue's name
    exchange    the exchange that it is bound to; empty for the row of the queue itself
    kind        the exchange's type: direct, topic or fanout
    routing_key what it is bound with
    is_reader   its messages are broadcasts, which are read from the log and never taken
    expires_at  when the row may go; NULL for a queue that stays
    =========== ============================================================================

    ``celery_workers``: a row for each connection that takes messages.

    =========== ============================================================================
    id          what ``claim`` of the messages that it has says
    name        host and process, for people
    started_at  when it began
    expires_at  when it counts as lost; each heartbeat puts it off
    lock_file   on SQLite a file that is locked for as long as its process lives
    =========== ============================================================================

    ``celery_broadcasts``: a log of what was said to readers, in the order of ``id``.

    =========== ============================================================================
    id          counts up
    exchange, routing_key  where it was sent to
    body, envelope  the message
    expires_at  when the row may go
    =========== ============================================================================
    """
    Table(
        QUEUES,
        metadata,
        Column("id", String(64), primary_key=True),
        Column("queue", QUEUE, nullable=False),
        Column("exchange", QUEUE, nullable=False),
        Column("kind", String(20), nullable=False),
        Column("routing_key", QUEUE, nullable=False),
        Column("is_reader", Boolean, nullable=False),
        Column("expires_at", TIME),
        schema=schema,
    )
    Table(
        WORKERS,
        metadata,
        Column("id", String(36), primary_key=True),
        Column("name", ID, nullable=False),
        Column("started_at", TIME, nullable=False),
        Column("expires_at", TIME, nullable=False),
        Column("lock_file", TEXT),
        schema=schema,
    )
    table = Table(
        BROADCASTS,
        metadata,
        Column("id", NUMBER, primary_key=True, autoincrement=True),
        Column("exchange", QUEUE, nullable=False),
        Column("routing_key", QUEUE, nullable=False),
        Column("body", BLOB, nullable=False),
        Column("envelope", TEXT, nullable=False),
        Column("expires_at", TIME, nullable=False),
        schema=schema,
        sqlite_autoincrement=True,
    )
    Index(f"{BROADCASTS}_expires_at", table.c.expires_at)
