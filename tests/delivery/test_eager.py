"""An app with `task_always_eager` does with what is enqueued what a worker would have done, when the transaction has committed."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, chord, group, signature
from celery.exceptions import ChordError, TimeoutError  # noqa: A004 - Celery's.
from sqlalchemy.orm import Session

from celery_alchemy import EntityReferenceError, PublishError, enqueue, on_commit
from celery_alchemy.requests.event_loop import process_loop
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand

pytestmark = pytest.mark.databases("sqlite")


@pytest.fixture
def eager(make_stand: MakeStand) -> OutboxStand:
    """A stand whose app is eager and raises nothing."""
    stand = make_stand()
    stand.app.conf.task_always_eager = True
    add_tasks(stand)
    return stand


def add_tasks(stand: OutboxStand) -> None:
    """Make the tasks: two once tasks, one that fails, one that takes an error, one that adds up."""

    @stand.task(name="parse", once=True)
    def parse(session: Session, text: str) -> str:
        session.add(Effect(name=f"parse {text}"))
        return f"parsed {text}"

    @stand.task(name="index", once=True)
    def index(session: Session, text: str) -> str:
        session.add(Effect(name=f"index {text}"))
        return f"indexed {text}"

    @stand.task(name="fails", once=True)
    def fails(session: Session, text: str) -> None:
        session.add(Effect(name="ghost"))
        raise ValueError(f"cannot take {text}")

    @stand.task(name="tell")
    def tell(session: Session, *args: Any) -> None:
        session.add(Effect(name="told"))

    @stand.task(name="join", once=True)
    def join(session: Session, texts: list[str]) -> str:
        session.add(Effect(name="join"))
        return " + ".join(texts)


def s(stand: OutboxStand, name: str, *args: Any) -> Any:
    return signature(stand.app.tasks[name].s(*args))


def sent(stand: OutboxStand, made: Any, **options: Any) -> Any:
    """Enqueue a signature and commit."""
    with stand.alchemy.begin() as session:
        return enqueue(session, made, **options)


def test_chain_of_once_tasks_runs_each_of_them(eager: OutboxStand) -> None:
    """Each has an id of its own, the value goes from one to the next, and the result is the last one's."""
    result = sent(eager, chain(s(eager, "parse", "a"), s(eager, "index")))

    assert eager.effects() == ["parse a", "index parsed a"]
    assert result.get() == "indexed parsed a"
    assert result.parent.get() == "parsed a"
    assert result.id != result.parent.id
    assert set(eager.outbox("task_id")) == {result.id, result.parent.id}


@pytest.mark.parametrize("kind", ["task", "chain", "group"])
def test_same_signature_enqueued_twice_runs_twice(eager: OutboxStand, kind: str) -> None:
    """Each call of enqueue makes tasks of their own, as messages would be."""
    one = s(eager, "parse", "a")
    made = {"task": one, "chain": chain(one, s(eager, "index")), "group": group([one])}[kind]
    with eager.alchemy.begin() as session:
        first, second = enqueue(session, made), enqueue(session, made)

    assert first.id != second.id
    assert eager.effects().count("parse a") == 2


def test_chosen_id_runs_once(eager: OutboxStand) -> None:
    """The caller's own id is kept, and is what a once task is known by."""
    results = [sent(eager, s(eager, "parse", "a"), task_id="chosen") for _ in range(2)]

    assert [result.id for result in results] == ["chosen", "chosen"]
    assert [result.get() for result in results] == ["parsed a"] * 2
    assert eager.effects() == ["parse a"]


def test_result_is_pending_until_the_commit(eager: OutboxStand) -> None:
    """It cannot be waited for, and says why; after a rollback it stays so."""
    with eager.alchemy.session() as session:
        result = enqueue(session, s(eager, "parse", "a"))
        states = [result.state, result.ready()]
        with pytest.raises(TimeoutError, match="has not been committed"):
            result.get()
        session.rollback()

    assert states == ["PENDING", False]
    assert result.state == "PENDING"
    assert eager.effects() == []


def test_failed_task_fails_its_result_and_not_the_commit(eager: OutboxStand) -> None:
    """As in a worker: who has committed hears nothing of it."""
    with eager.alchemy.begin() as session:
        session.add(Effect(name="written"))
        result = enqueue(session, s(eager, "fails", "a"))

    assert result.state == "FAILURE"
    with pytest.raises(ValueError, match="cannot take a"):
        result.get()
    assert eager.effects() == ["written"]


def test_chain_ends_at_the_link_that_fails(eager: OutboxStand) -> None:
    """Those after it do not run, and have its error for their result."""
    result = sent(eager, chain(s(eager, "parse", "a"), s(eager, "fails"), s(eager, "index")))

    assert eager.effects() == ["parse a"]
    assert [result.state, result.parent.state, result.parent.parent.state] == ["FAILURE", "FAILURE", "SUCCESS"]
    with pytest.raises(ValueError, match="cannot take parsed a"):
        result.get()


def test_group_runs_all_of_its_members(eager: OutboxStand) -> None:
    """Also those behind one that fails."""
    result = sent(eager, group(s(eager, "parse", "a"), s(eager, "fails", "b"), s(eager, "parse", "c")))

    assert eager.effects() == ["parse a", "parse c"]
    assert [one.state for one in result.results] == ["SUCCESS", "FAILURE", "SUCCESS"]
    assert len({one.id for one in result.results}) == 3


def test_chord_runs_its_body_with_what_the_header_returned(eager: OutboxStand) -> None:
    """Made as a chord, or as a group that another task follows."""
    header = [s(eager, "parse", "a"), s(eager, "parse", "b")]
    made = sent(eager, chord(header, s(eager, "join")))
    joined = sent(eager, group(header) | s(eager, "join"))
    listed = sent(eager, chain(group(header), s(eager, "join"), s(eager, "index")))

    assert made.get() == joined.get() == "parsed a + parsed b"
    assert listed.get() == "indexed parsed a + parsed b"
    assert eager.effects().count("join") == 3


def test_body_of_a_chord_whose_header_fails_does_not_run(eager: OutboxStand) -> None:
    """Its result is a ChordError, and its errback is told."""
    body = s(eager, "join")
    body.link_error(s(eager, "tell"))
    result = sent(eager, chord([s(eager, "parse", "a"), s(eager, "fails", "b")], body))

    assert isinstance(result.result, ChordError)
    assert eager.effects() == ["parse a", "told"]


@pytest.mark.parametrize("where", ["signature", "options", "chain"])
def test_links_run_when_their_task_has_ended(eager: OutboxStand, where: str) -> None:
    """That of a chain runs once, after its last link."""
    callback = s(eager, "index")
    one = s(eager, "parse", "a")
    if where == "signature":
        one.link(callback)
        sent(eager, one)
    elif where == "options":
        sent(eager, one, link=callback)
    else:
        sent(eager, chain(one, s(eager, "parse")), link=callback)

    last = "index parsed parsed a" if where == "chain" else "index parsed a"
    assert eager.effects()[-1] == last
    assert [name for name in eager.effects() if name.startswith("index")] == [last]


@pytest.mark.parametrize("where", ["signature", "options"])
def test_errback_runs_when_its_task_has_failed(eager: OutboxStand, where: str) -> None:
    """As a worker calls it."""
    one = s(eager, "fails", "a")
    if where == "signature":
        one.link_error(s(eager, "tell"))
        sent(eager, one)
    else:
        sent(eager, one, link_error=s(eager, "tell"))

    assert eager.effects() == ["told"]


@pytest.mark.parametrize("kind", ["task", "chain", "group", "chord"])
def test_eager_propagates_raises_the_error_of_the_task(eager: OutboxStand, kind: str) -> None:
    """Its own, not one about brokers; what else was enqueued has run before."""
    eager.app.conf.task_eager_propagates = True
    failing = s(eager, "fails", "a")
    made = {
        "task": failing,
        "chain": chain(failing, s(eager, "index")),
        "group": group(failing, s(eager, "parse", "b")),
        "chord": chord([failing], s(eager, "join")),
    }[kind]

    with pytest.raises(ValueError, match="cannot take a"), eager.alchemy.begin() as session:
        session.add(Effect(name="written"))
        enqueue(session, made)
        enqueue(session, s(eager, "parse", "other"))

    assert {"written", "parse other"} <= set(eager.effects())
    assert "ghost" not in eager.effects()


@pytest.mark.parametrize("propagates", [True, False])
def test_error_of_a_task_that_a_task_has_enqueued_is_not_that_tasks(eager: OutboxStand, propagates: bool) -> None:
    """The sender has committed and succeeded; whoever called it hears of the error if errors propagate."""
    recorded: list[str] = []

    @eager.task(name="outer", record_failure=lambda session, exc: recorded.append("outer"))
    def outer(session: Session) -> str:
        session.add(Effect(name="outer"))
        eager.app.tasks["fails"].delay_on_commit("a")
        return "done"

    eager.app.conf.task_eager_propagates = propagates
    if propagates:
        with pytest.raises(ValueError, match="cannot take a"):
            outer.delay()
    else:
        assert outer.delay().get() == "done"

    assert recorded == []
    assert eager.effects() == ["outer"]


def test_arguments_are_those_of_the_call(eager: OutboxStand) -> None:
    """They are serialised in it: what changes later does not, and what cannot be is the caller's error."""
    texts = ["a", "b"]
    with eager.alchemy.begin() as session:
        result = enqueue(session, s(eager, "join", texts))
        texts.append("c")
        with pytest.raises(Exception, match="set"):
            enqueue(session, s(eager, "join", {1}))

    assert result.get() == "a + b"


@pytest.mark.parametrize("way", ["enqueue", "on commit"])
def test_pending_entity_is_refused_in_the_call(eager: OutboxStand, way: str) -> None:
    """As it is where a message is made."""

    @eager.task(name="take")
    def take(effect: Effect) -> None: ...

    with eager.alchemy.begin() as session, pytest.raises(EntityReferenceError):
        effect = Effect(name="new")
        session.add(effect)
        if way == "enqueue":
            enqueue(session, take.s(effect))
        else:
            take.delay_on_commit(effect)


def test_async_task_runs_in_a_canvas_too(eager: OutboxStand) -> None:
    """Its session is its own, in the event loop."""

    @eager.task(name="shout", once=True)
    async def shout(text: str) -> str:
        return text.upper()

    result = sent(eager, chain(s(eager, "parse", "a"), shout.s(), s(eager, "index")))
    process_loop.close()

    assert result.get() == "indexed PARSED A"


def test_other_callables_of_the_commit_fail_as_ever(eager: OutboxStand) -> None:
    """Only a task's error is raised as it is."""
    with pytest.raises(PublishError), eager.alchemy.begin() as session:
        enqueue(session, s(eager, "fails", "a"))
        on_commit(session, lambda: 1 / 0)


def test_canvas_that_is_enqueued_twice_has_other_ids_in_a_broker_too(make_stand: MakeStand) -> None:
    """What holds without a broker holds with one."""
    stand = make_stand()
    add_tasks(stand)
    made = chain(s(stand, "parse", "a"), s(stand, "index"))
    with stand.alchemy.begin() as session:
        first, second = enqueue(session, made), enqueue(session, made)
    stand.run_all()

    assert first.id != second.id
    assert sorted(stand.effects()) == ["index parsed a"] * 2 + ["parse a"] * 2
