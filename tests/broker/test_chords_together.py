"""Parts of a chord that end at the same time, and the isolation levels of their transactions."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from celery import chord
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.broker.broker_stand import write
from tests.broker.chord_stand import ChordStand, chords
from tests.services.databases import Database
from tests.stand import Sent

__all__ = ["chords"]


def run_together(stand: ChordStand, messages: Sequence[Sent]) -> None:
    """Run messages in as many threads, which begin at the same time."""
    begin = threading.Barrier(len(messages))

    def run(sent: Sent) -> None:
        begin.wait(30)
        stand.deliver(sent)

    threads = [threading.Thread(target=run, args=(sent,)) for sent in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize("kind", ["session", "once", "plain"])
def test_parts_that_end_together_send_the_body_once(chords: ChordStand, kind: str) -> None:
    """And it is sent: the transactions of two last parts do not miss each other."""
    for _ in range(5):
        result = chord(chords.parts("abcd", kind), chords.sign("collect")).apply_async()

        run_together(chords, chords.sent())

        sent = chords.sent()
        assert [one.task for one in sent] == ["collect"]
        chords.deliver(sent[0])
        assert result.get(timeout=5) == ["a", "b", "c", "d"]


def test_deliveries_of_one_part_that_end_together_count_once(chords: ChordStand) -> None:
    """Of two workers, one of which counted as lost."""
    result = chord(chords.parts("ab"), chords.sign("collect")).apply_async()
    first, second = chords.sent()

    run_together(chords, [first, first])
    assert chords.sent() == []
    run_together(chords, [second, second])
    chords.run_all()

    assert chords.bodies() == 1
    assert result.get(timeout=5) == ["a", "b"]


@pytest.mark.databases("postgresql", "mariadb")
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_levels_of_isolation_lose_no_part(database: Database, level: str) -> None:
    """A transaction that does not see the others leaves its part to one that does."""
    stand = ChordStand(database, engine_options={"isolation_level": level})
    result: Any = chord(stand.parts("abcd"), stand.sign("collect")).apply_async()

    run_together(stand, stand.sent())
    stand.run_all()

    assert result.get(timeout=5) == ["a", "b", "c", "d"]
    assert stand.bodies() == 1


@pytest.mark.databases("postgresql", "mariadb")
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_part_counts_those_that_ended_after_it_began(database: Database, level: str) -> None:
    """The snapshot of its transaction is older than they are."""
    stand = ChordStand(database, engine_options={"isolation_level": level})
    messages: list[Sent] = []

    def slow(session: Session, name: str) -> str:
        session.execute(text("SELECT count(*) FROM celery_queues"))
        run_together(stand, messages[1:])
        return write(session, name)[-1]

    stand.task(slow, name="slow")
    parts = [stand.sign("slow", "a"), *stand.parts("bc")]
    result: Any = chord(parts, stand.sign("collect")).apply_async()
    messages += stand.sent()

    stand.deliver(messages[0])
    stand.run_all()

    assert result.get(timeout=5) == ["a", "b", "c"]
