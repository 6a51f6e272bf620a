"""The tables of chords, where the database is Celery's result backend.

Beside the table of results; ``outbox/chord_records.py`` reads and writes them.
"""

from __future__ import annotations

from sqlalchemy import Column, Index, Integer, MetaData, Table

from .column_types import BLOB, ID, TIME

__all__ = ["CHORDS", "CHORD_PARTS", "build_chords"]

CHORDS = "celery_chords"
CHORD_PARTS = "celery_chord_parts"


def build_chords(metadata: MetaData, schema: str | None = None) -> None:
    """Make the tables in a MetaData.

    ``celery_chords``: a row for each chord of which a part has ended.

    ========== ==========================================================================
    id         of the group of the chord's parts
    size       how many parts it was sent with; NULL until anybody has said so
    added      how many parts came to it later
    counted    how many parts have ended
    ended_at   when its body was sent, or failed; NULL until then
    expires_at when the row and its parts may go; NULL for never
    ========== ==========================================================================

    ``celery_chord_parts``: a row for each part that has ended, until the chord ends.

    ========== ==========================================================================
    id         of the chord
    position   the part's place in what the body gets
    part       the id of the part's task
    status     how the part has ended
    value      what it returned or raised, as the result serializer made it
    ========== ==========================================================================
    """
    chords = Table(
        CHORDS,
        metadata,
        Column("id", ID, primary_key=True),
        Column("size", Integer),
        Column("added", Integer, nullable=False),
        Column("counted", Integer, nullable=False),
        Column("ended_at", TIME),
        Column("expires_at", TIME),
        schema=schema,
    )
    Index(f"{CHORDS}_expires_at", chords.c.expires_at)
    Table(
        CHORD_PARTS,
        metadata,
        Column("id", ID, primary_key=True),
        # One signature that is in a header twice has one task id at two places.
        Column("position", Integer, primary_key=True, autoincrement=False),
        Column("part", ID, primary_key=True),
        Column("status", ID, nullable=False),
        Column("value", BLOB),
        schema=schema,
    )
