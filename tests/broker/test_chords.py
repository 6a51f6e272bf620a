"""Chords of the database as the result backend: each canvas, and how often its body runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Task, chain, chord, group
from celery.app.task import Context
from celery.exceptions import ChordError
from sqlalchemy import event
from sqlalchemy.orm import Session

from celery_alchemy import OnceReplacedError, enqueue
from celery_alchemy.broker.chords import keep_noted
from celery_alchemy.operations.dead_tasks import prune_all
from celery_alchemy.outbox import chord_records
from celery_alchemy.outbox.chord_records import Chord
from tests.broker.broker_stand import write
from tests.broker.chord_stand import ChordStand, OutOfStockError, chords
from tests.services.databases import Database

__all__ = ["chords"]

KINDS = ["session", "once", "ignored", "plain", "plain ignored", "read only"]

Canvas = Callable[[ChordStand], Any]

#: Each canvas that ends in a chord, and what its last task gets.
CANVASES: dict[str, tuple[Canvas, Any]] = {
    "one part": (lambda s: chord(s.parts("a"), s.sign("collect")), ["a"]),
    "no part": (lambda s: chord([], s.sign("collect"), app=s.app), []),
    "many parts in their order": (lambda s: chord(s.parts("fedcba"), s.sign("collect")), list("fedcba")),
    "a generator": (lambda s: chord((s.sign("session", x) for x in "abc"), s.sign("collect")), list("abc")),
    "one signature twice": (lambda s: chord([s.sign("plain", "a")] * 2, s.sign("collect")), ["a", "a"]),
    "a frozen signature twice": (lambda s: chord([_frozen(s.sign("plain", "a"))] * 2, s.sign("collect")), ["a", "a"]),
    "chains": (lambda s: chord([chain(s.sign("session", x), s.sign("double")) for x in "ab"], s.sign("collect")), ["aa", "bb"]),
    "a group in it": (lambda s: chord([group(s.parts("ab")), s.sign("session", "c")], s.sign("collect")), ["b", "a", "c"]),
    "a chain that ends in a group": (
        lambda s: chord(
            [
                s.sign("session", "x"),
                chain(s.sign("session", "a"), group(s.sign("double"), s.sign("double"))),
                s.sign("session", "y"),
            ],
            s.sign("collect"),
        ),
        ["x", ["aa", "aa"], "y"],
    ),
    "a chord in it": (
        lambda s: chord([chord(s.parts("ab"), s.sign("collect")), s.sign("session", "c")], s.sign("collect")),
        [["a", "b"], "c"],
    ),
    "after a task": (
        lambda s: chain(s.sign("session", "a"), group(s.sign("double"), s.sign("double")), s.sign("collect")),
        ["aa", "aa"],
    ),
    "two in a chain": (
        lambda s: chain(group(s.parts("ab")), s.sign("collect once"), group(s.sign("collect"), s.sign("collect")), s.sign("collect")),
        [["a", "b"], ["a", "b"]],
    ),
    "a chain for a body": (lambda s: chord(s.parts("ab"), chain(s.sign("collect"), s.sign("collect"))), ["a", "b"]),
    "a chord for a body": (
        lambda s: chord(s.parts("ab"), chord([s.sign("collect"), s.sign("collect")], s.sign("collect"))),
        [["a", "b"], ["a", "b"]],
    ),
    "a group for a body": (lambda s: chord(s.parts("ab"), group(s.sign("collect"), s.sign("collect"))), [["a", "b"], ["a", "b"]]),
    "a part that is replaced": (lambda s: chord([s.sign("replaced", "a"), s.sign("session", "b")], s.sign("collect")), ["a", "b"]),
    "a part that is replaced by two": (
        lambda s: chord([s.sign("replaced by two", "a"), s.sign("session", "b")], s.sign("collect")),
        [["a", "aa"], "b"],
    ),
    "a part that adds another": (
        lambda s: chord([s.sign("adding", "a"), s.sign("session", "b")], s.sign("collect")),
        ["a", "a+", "b"],
    ),
    "a part that is retried": (lambda s: chord([s.sign("flaky", "a"), s.sign("session", "b")], s.sign("collect")), ["a", "b"]),
}


def _frozen(signature: Any) -> Any:
    signature.freeze()
    return signature


def value_of(result: Any) -> Any:
    return result.get(timeout=5)


@pytest.mark.parametrize("name", CANVASES)
def test_canvas_ends_with_all_results(chords: ChordStand, name: str) -> None:
    """In the order of the header; Celery's watching task is never sent."""
    make, expected = CANVASES[name]
    result = make(chords).apply_async()

    chords.run_all()

    if name == "a part that adds another":
        assert sorted(value_of(result)) == expected
    else:
        assert value_of(result) == expected
    assert "celery.chord_unlock" not in chords.ran


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("name", CANVASES)
def test_canvas_is_sent_by_a_transaction(chords: ChordStand, name: str) -> None:
    """One that has written, so that on SQLite nobody else can; it has no statement of its own but INSERTs of messages."""
    make, expected = CANVASES[name]
    statements: list[str] = []

    with chords.alchemy.begin() as session:
        enqueue(session, chords.sign("session", "first"))
        session.flush()
        session.connection()
        event.listen(chords.alchemy.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
        result = enqueue(session, make(chords))
    assert [s for s in statements if "celery_chord" in s] == []
    chords.run_all()

    found = value_of(result)
    assert (sorted(found) if name == "a part that adds another" else found) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_each_kind_are_counted(chords: ChordStand, kind: str) -> None:
    """By the part's own transaction, or by that of its result; also where no result is kept."""
    result = chord(chords.parts("abc", kind), chords.sign("collect")).apply_async()

    chords.run_all()

    assert value_of(result) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", KINDS)
def test_part_that_is_delivered_twice_counts_once(chords: ChordStand, database: Database, kind: str) -> None:
    """Before its chord ends, and after."""
    result = chord(chords.parts("ab", kind), chords.sign("collect once")).apply_async()
    first, second = chords.sent()

    for sent in (first, first, second, first, second):
        chords.deliver(sent)
    chords.run_all()

    assert value_of(result) == ["a", "b"]
    assert chords.bodies() == 1
    assert database.scalar("SELECT count(*) FROM celery_chord_parts") == 0


@pytest.mark.parametrize("asks_again", [False, True])
@pytest.mark.parametrize("key_owner", ["first", "second"])
def test_chord_of_parts_with_one_key_that_are_replaced_ends(chords: ChordStand, asks_again: bool, key_owner: str) -> None:
    """The part that finds its work done by one that was replaced has that result, or fails; the chord waits for neither."""

    def charge(self: Any, session: Session, order: int) -> Any:
        write(session, f"charge {order}")
        return self.replace(chords.sign("once", "paid"))

    options = {"autoretry_for": (OnceReplacedError,), "default_retry_delay": 0} if asks_again else {}
    chords.task(charge, name="charge", bind=True, once=lambda order: f"order {order}", **options)
    result = chord([chords.sign("charge", 7), chords.sign("charge", 7)], chords.sign("collect")).apply_async()
    sent = chords.sent()

    for one in sent if key_owner == "first" else reversed(sent):
        chords.deliver(one)
    chords.run_all()

    if asks_again:
        assert value_of(result) == ["paid", "paid"]
    else:
        assert (result.state, type(result.result)) == ("FAILURE", ChordError)
    assert [row[0] for row in chords.database.rows("SELECT name FROM effect ORDER BY name")] == ["charge 7", "paid"]


def test_frozen_chord_runs_each_time_it_is_sent(chords: ChordStand) -> None:
    """Its ids are the same each time; a part of one time is no part of another."""
    frozen = _frozen(chord(chords.parts("ab"), chords.sign("collect")))
    frozen.apply_async()
    chords.run_all()

    frozen.apply_async()
    result = frozen.apply_async()
    chords.run_all()

    assert chords.bodies() == 3
    assert value_of(result) == ["a", "b"]


def test_frozen_chord_runs_each_time_a_task_sends_it(chords: ChordStand) -> None:
    """The times of a task that is delivered again are those that it was sent before."""
    frozen = _frozen(chord(chords.parts("ab"), chords.sign("collect")))

    def sending() -> None:
        frozen.apply_async()
        frozen.apply_async()

    chords.task(sending, name="sending", base=Task)
    for _ in range(2):
        chords.sign("sending").apply_async()
    first, second = chords.sent()

    for sent in (first, first, second):
        chords.deliver(sent)
    chords.run_all()

    assert chords.bodies() == 4


def test_chord_that_a_task_sends_twice_runs_once(chords: ChordStand) -> None:
    """A task that is delivered twice sends the next link of its chain under the same ids."""
    result = chain(chords.sign("plain", "a"), chord([chords.sign("double")] * 2, chords.sign("collect"))).apply_async()
    (first,) = chords.sent()

    chords.deliver(first)
    chords.deliver(first)
    chords.run_all()

    assert chords.bodies() == 1
    assert value_of(result) == ["aa", "aa"]


def test_group_that_is_deleted_takes_what_is_noted_of_its_chord(chords: ChordStand, database: Database) -> None:
    """Of each time that the chord was sent, and of no other chord."""
    frozen = _frozen(chord(chords.parts("ab"), chords.sign("collect")))
    result = frozen.apply_async()
    frozen.apply_async()
    other = chord(chords.parts("ab"), chords.sign("collect")).apply_async()
    chords.run_all()

    assert database.scalar("SELECT count(*) FROM celery_chords") == 3
    result.parent.delete()
    assert database.scalar("SELECT count(*) FROM celery_chords") == 1
    other.parent.delete()
    assert database.scalar("SELECT count(*) FROM celery_chords") == 0


def test_last_part_sends_the_body_in_its_own_transaction(chords: ChordStand, database: Database) -> None:
    """A commit that fails sends no body, and notes no part."""
    chord(chords.parts("ab"), chords.sign("collect")).apply_async()
    first, second = chords.sent()
    chords.deliver(first)
    task: Any = chords.app.tasks["session"]
    refused = task.backend.mark_as_failure
    refusals: list[Any] = []

    def refuse(session: Any) -> None:
        found = session.connection().exec_driver_sql("SELECT count(*) FROM celery_outbox").scalar_one()
        refusals.append(found)
        raise RuntimeError("the commit is refused")

    task.backend.mark_as_failure = lambda *args, **kwargs: None
    event.listen(Session, "before_commit", refuse)
    try:
        chords.deliver(second)
    finally:
        event.remove(Session, "before_commit", refuse)
        task.backend.mark_as_failure = refused

    # The body was there, in the transaction.
    assert refusals == [1]
    assert chords.sent() == []
    assert database.rows("SELECT counted, ended_at FROM celery_chords") == [(1, None)]
    chords.deliver(second)
    assert [sent.task for sent in chords.sent()] == ["collect"]


def test_parts_are_read_once(chords: ChordStand) -> None:
    """By the last one; what the others cost does not grow with the chord."""
    statements: list[str] = []
    event.listen(chords.alchemy.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    chord(chords.parts("abcdefghij"), chords.sign("collect")).apply_async()

    chords.run_all()

    reads = [s for s in statements if s.startswith("SELECT") and "celery_chord_parts" in s]
    assert len(reads) == 1
    assert sum("celery_chords" in s for s in statements) <= 2 * 10 + 1


def test_part_that_is_added_in_a_transaction_that_fails_is_not_waited_for(database: Database) -> None:
    """Its message waits for the commit of the task that adds it, and goes with its rollback."""
    stand = ChordStand(database, publish_in_transaction="defer")

    def adding(self: Any, session: Session, name: str) -> str:
        write(session, name)
        self.add_to_chord(stand.sign("session", f"{name}+"))
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        return name

    stand.task(adding, name="adding and failing", bind=True)
    result = chord([stand.sign("adding and failing", "a"), *stand.parts("b")], stand.sign("collect")).apply_async()

    stand.run_all()

    assert sorted(result.get(timeout=5)) == ["a", "a+", "b"]
    stand.alchemy.engine.dispose()


def test_failed_part_fails_the_body(chords: ChordStand) -> None:
    """When all parts have ended; the body's errback is called once, also if the part is delivered again."""
    body = chords.sign("collect").on_error(chords.sign("note error"))
    result = chord([chords.sign("fail", "a"), *chords.parts("b")], body).apply_async()
    failing, second = chords.sent()

    for sent in (failing, failing, second, failing):
        chords.deliver(sent)
    chords.run_all()

    assert result.state == "FAILURE"
    error = chords.app.AsyncResult(result.id).result
    assert type(error).__name__ == "ChordError"
    assert f"Dependency {failing.id} raised OutOfStockError('a')" in str(error)
    assert [kind for kind, _ in chords.errors] == ["ChordError"]
    assert chords.bodies() == 0


def test_whoever_waits_for_a_chord_is_told_of_its_part_that_failed(chords: ChordStand) -> None:
    """Also if the part and the body fail between two looks."""
    result = chord([chords.sign("fail", "a"), *chords.parts("b")], chords.sign("collect")).apply_async()

    with pytest.raises(OutOfStockError):
        result.get(timeout=5, on_interval=lambda *args: chords.run_all())


def test_chord_that_two_see_complete_is_ended_once(chords: ChordStand) -> None:
    """Of a part's end the parent process may hear twice at the same time: at a hard time limit, or of two deliveries."""
    body = chords.sign("collect").on_error(chords.sign("note error"))
    result = chord([chords.sign("fail", "a"), *chords.parts("b")], body).apply_async()
    for sent in chords.sent():
        chords.deliver(sent)
    again = Context(sent.request())
    keep_noted(again, Chord(is_complete=True, has_ended=False))

    chords.app.backend.on_chord_part_return(again, "SUCCESS", "b")
    chords.run_all()

    assert chords.app.AsyncResult(result.id).state == "FAILURE"
    assert [kind for kind, _ in chords.errors] == ["ChordError"]
    assert chords.bodies() == 0


def test_failed_task_before_the_last_of_a_chain_fails_the_body(chords: ChordStand) -> None:
    """The part is the chain's last task, which never runs."""
    parts = [chain(chords.sign("fail", "a"), chords.sign("double")), chords.sign("session", "b")]
    result = chord(parts, chords.sign("collect")).apply_async()

    chords.run_all()

    assert type(chords.app.AsyncResult(result.id).result).__name__ == "ChordError"


INNER_BODIES: dict[str, Canvas] = {
    "a task": lambda s: s.sign("collect"),
    "a chain": lambda s: chain(s.sign("collect"), s.sign("collect")),
    "a group": lambda s: group(s.sign("collect"), s.sign("collect")),
    "a chord": lambda s: chord([s.sign("collect"), s.sign("collect")], s.sign("collect")),
}


@pytest.mark.parametrize("kind", INNER_BODIES)
@pytest.mark.parametrize("fails_last", [False, True])
def test_chord_in_a_chord_fails_the_one_around_it(chords: ChordStand, kind: str, fails_last: bool) -> None:
    """Its body never runs, and is a part that has failed; the errbacks of the outer body are called, once."""
    inner = chord([chords.sign("fail", "a"), chords.sign("session", "b")], INNER_BODIES[kind](chords))
    body = chords.sign("collect").on_error(chords.sign("note error"))
    result = chord([inner, chords.sign("session", "c")], body).apply_async()
    sent = chords.sent()

    for one in [*reversed(sent), *sent] if fails_last else [*sent, *sent]:
        chords.deliver(one)
    chords.run_all()

    assert (result.state, type(result.result)) == ("FAILURE", ChordError)
    assert [name for name, _ in chords.errors] == ["ChordError"]
    assert chords.bodies() == 0
    assert chords.database.scalar("SELECT count(*) FROM celery_chord_parts") == 0


def test_failed_part_fails_a_group_for_a_body(chords: ChordStand) -> None:
    """Each of its tasks."""
    body = group(chords.sign("collect"), chords.sign("collect"))
    result = chord([chords.sign("fail", "a"), *chords.parts("b")], body).apply_async()

    chords.run_all()

    assert [one.state for one in result.results] == ["FAILURE", "FAILURE"]


def test_revoked_part_fails_the_body(chords: ChordStand) -> None:
    """As a worker says of one that was revoked, or has expired."""
    result = chord(chords.parts("ab"), chords.sign("collect")).apply_async()
    first, second = chords.sent()

    request = Context(first.request())
    chords.app.backend.mark_as_revoked(request.id, "expired", request=request, store_result=True)
    chords.deliver(second)

    assert type(chords.app.AsyncResult(result.id).result).__name__ == "ChordError"
    assert chords.bodies() == 0


def test_body_that_cannot_be_sent_fails(chords: ChordStand) -> None:
    """The parts have not failed."""
    result = chord(chords.parts("ab"), chords.sign("collect", serializer="unknown")).apply_async()

    chords.run_all()

    assert chords.app.AsyncResult(result.id).state == "FAILURE"
    assert "Callback error" in str(chords.app.AsyncResult(result.id).result)


def test_notes_of_a_chord_are_deleted(chords: ChordStand, database: Database) -> None:
    """The parts when it ends, its row when it expires; of one that never ends all when it expires."""
    chord(chords.parts("ab"), chords.sign("collect")).apply_async()
    chords.run_all()
    chord(chords.parts("ab"), chords.sign("collect")).apply_async()
    first, _ = chords.sent()
    chords.deliver(first)
    counts = "SELECT (SELECT count(*) FROM celery_chords), (SELECT count(*) FROM celery_chord_parts)"

    assert database.rows(counts) == [(2, 1)]
    database.execute("UPDATE celery_chords SET expires_at = '2020-01-01 00:00:00.000000'")
    assert chord_records.prune_chords(chords.alchemy.place, chords.alchemy.engine) == 2
    assert database.rows(counts) == [(0, 0)]
    assert prune_all(chords.alchemy.engine, 86400.0, chords.alchemy.place) == 0


def test_forgotten_results_of_parts_are_still_the_bodys(chords: ChordStand) -> None:
    """What is kept for the chord is its own."""
    result = chord(chords.parts("ab"), chords.sign("collect")).apply_async()
    first, second = chords.sent()
    chords.deliver(first)

    chords.app.AsyncResult(first.id).forget()
    chords.deliver(second)
    chords.run_all()

    assert value_of(chords.app.AsyncResult(result.id)) == ["a", "b"]


def test_missing_table_is_named(chords: ChordStand, database: Database) -> None:
    """To whoever adds to a chord; a part fails with it."""
    from celery_alchemy import MissingTableError

    database.execute("DROP TABLE celery_chords")

    with pytest.raises(MissingTableError, match="create-tables"):
        chords.app.backend.add_to_chord("some chord", None)
