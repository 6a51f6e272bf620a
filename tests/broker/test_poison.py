"""A task that is set aside because every worker which began it was lost: it has failed, and its chord knows it."""

from __future__ import annotations

from typing import Any

import pytest
from billiard.exceptions import WorkerLostError
from celery import chord
from celery.exceptions import ChordError

from celery_alchemy.broker.heart import Heart
from celery_alchemy.broker.homes import BrokerHome, home_for
from celery_alchemy.broker.poison import ATTEMPTS, Poison
from celery_alchemy.broker.tables import begun
from celery_alchemy.broker.workers import Released, dismiss, enlist, release_lost
from celery_alchemy.operations.dead_tasks import dead, revive
from tests.broker.chord_stand import ChordStand, chords
from tests.waiting import eventually

__all__ = ["chords"]

DIED = "SELECT count(*) FROM celery_outbox WHERE died_at IS NOT NULL"


@pytest.fixture
def home(chords: ChordStand) -> BrokerHome:
    """The database of the stand as its broker."""
    return home_for("", chords.app.conf.broker_transport_options)


def kills_its_workers(chords: ChordStand, task_id: str) -> None:
    """Have a message be one that its last worker was lost with, after all the others."""
    chords.database.execute("UPDATE celery_outbox SET claim = 'gone', due_at = NULL, deliveries = 5 WHERE task_id = :id", id=task_id)


def find(home: BrokerHome, worker: str) -> Released:
    """Look for what lost workers had, as a new worker does."""
    with begun(home.place, home.engine()) as tables:
        enlist(tables, worker, 30, None)
        return release_lost(tables, worker, 5)


def is_lost(home: BrokerHome, worker: str) -> None:
    """End a worker, with what it has."""
    with begun(home.place, home.engine()) as tables:
        dismiss(tables, worker)


@pytest.fixture
def poisoned(chords: ChordStand) -> Any:
    """A chord of two parts: one has ended, and the other kills its workers."""
    parts = [chords.sign("plain", "a"), chords.sign("session", "b")]
    result = chord(parts, chords.sign("collect").on_error(chords.sign("note error"))).apply_async()
    for sent in chords.sent():
        if sent.task == "session":
            chords.deliver(sent)
        else:
            # The stand has taken it out of the table, as what has run.
            chords.app.tasks["plain"].apply_async(**again(sent.request()))
    kills_its_workers(chords, result.parent.results[0].id)
    return result


def again(request: dict[str, Any]) -> dict[str, Any]:
    """Return the options that send a part of a chord again."""
    names = ("chord", "group_id", "group_index", "root_id")
    found = {"group_id": request["group"], **{name: request[name] for name in ("chord", "group_index", "root_id")}}
    return {"args": request["args"], "task_id": request["id"], **{name: found[name] for name in names}}


def test_part_that_kills_its_workers_fails_its_chord(chords: ChordStand, home: BrokerHome, poisoned: Any) -> None:
    """The heart of the worker that finds it out has it done; the errback of the body runs."""
    engine = home.taking_engine()
    heart = Heart(home, engine, "heart", lambda: None, lambda: None)
    with engine.connect() as connection:
        heart.start(connection, None)
    try:
        eventually(lambda: chords.database.scalar(DIED) == 1, what="it is set aside")
    finally:
        heart.stop()
        engine.dispose()

    with pytest.raises(WorkerLostError, match="begun 5 times"):
        poisoned.parent.results[0].get(timeout=5)
    with pytest.raises(ChordError, match="WorkerLostError"):
        poisoned.get(timeout=5, follow_parents=False)
    assert [name for name, _ in chords.errors] == ["ChordError"]
    assert chords.database.rows("SELECT size, counted, ended_at IS NOT NULL FROM celery_chords") == [(2, 2, True)]


def test_process_that_dies_before_leaves_it_to_the_next_one(chords: ChordStand, home: BrokerHome, poisoned: Any) -> None:
    """It has the message until then, so that it is lost with it, and nobody else takes it."""
    assert find(home, "first") == Released(0, 1)
    assert find(home, "beside") == Released(0, 0)
    assert chords.database.scalar(DIED) == 0
    is_lost(home, "first")

    assert find(home, "second") == Released(0, 1)
    Poison(home, "second").end()

    assert poisoned.parent.results[0].state == "FAILURE"
    assert chords.database.scalar(DIED) == 1


def test_process_that_dies_in_between_ends_the_chord_once(
    chords: ChordStand, home: BrokerHome, poisoned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one writes the same again; the chord has ended already."""

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    find(home, "first")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Poison, "_set_aside", dies)
        Poison(home, "first").end()
    is_lost(home, "first")
    find(home, "second")
    Poison(home, "second").end()

    assert chords.database.scalar(DIED) == 1
    assert [name for name, _ in chords.errors] == ["ChordError"]
    assert chords.database.rows("SELECT ended_at IS NOT NULL FROM celery_chords") == [(True,)]


def test_result_backend_that_is_away_is_tried_again(
    chords: ChordStand, home: BrokerHome, poisoned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each beat, until it has been tried so often that it is set aside without a result."""

    def is_away(*args: Any, **kwargs: Any) -> None:
        raise OSError("away")

    find(home, "worker")
    poison = Poison(home, "worker")
    with monkeypatch.context() as patch:
        patch.setattr(chords.app.backend, "mark_as_failure", is_away)
        for _ in range(ATTEMPTS - 1):
            with pytest.raises(OSError, match="away"):
                poison.end()
        assert chords.database.scalar(DIED) == 0
        poison.end()
    assert chords.database.scalar(DIED) == 1


@pytest.mark.parametrize("is_readable", [True, False])
def test_task_has_failed_and_may_be_revived(chords: ChordStand, home: BrokerHome, is_readable: bool) -> None:
    """Also one whose message nobody can read: its id is a column of the row."""
    result = chords.app.tasks["plain"].delay("a")
    kills_its_workers(chords, result.id)
    if not is_readable:
        chords.database.execute("UPDATE celery_outbox SET envelope = '{broken'")

    find(home, "worker")
    Poison(home, "worker").end()

    assert result.state == "FAILURE"
    [row] = dead(chords.alchemy.engine)
    assert (row["task_id"], row["error"]) == (result.id, "it was begun 5 times by workers that were lost with it")
    assert revive(chords.alchemy.engine, [result.id]) == 1
    assert find(home, "next") == Released(0, 0)


def test_ignored_result_is_not_kept(chords: ChordStand, home: BrokerHome) -> None:
    """As of every task that fails."""
    result = chords.app.tasks["plain ignored"].delay("a")
    kills_its_workers(chords, result.id)

    find(home, "worker")
    Poison(home, "worker").end()

    assert chords.rows() == []
    assert chords.database.scalar(DIED) == 1
