"""A task is sent when the outermost transaction has committed, and never when it, or the SAVEPOINT around the call, rolls back."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import chain, group
from kombu.exceptions import EncodeError
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from celery_alchemy import (
    ConfigurationError,
    MessageTooLargeError,
    NoSessionError,
    UnknownTaskError,
    UnsafeSerializerError,
    enqueue,
    on_commit,
)
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.services.databases import Database


@pytest.fixture(params=[True, False], ids=["outbox", "direct"])
def stand(request: pytest.FixtureRequest, make_stand: MakeStand) -> OutboxStand:
    """A stand, once with and once without the outbox: the rules of sending are the same."""
    return make_stand(outbox=request.param)


@pytest.fixture
def session(stand: OutboxStand) -> Iterator[Session]:
    """A session that the library did not make."""
    with sessionmaker(stand.alchemy.engine)() as session:
        yield session


def names_sent(stand: OutboxStand) -> list[Any]:
    return [sent.args[0] for sent in stand.sent()]


def test_committed_transaction_sends_its_task(stand: OutboxStand, session: Session) -> None:
    """Not before the commit, once after it, under the id that the caller was given; nothing stays behind."""
    session.add(Effect(name="written"))
    result = enqueue(session, stand.effect.s("sent"))
    before = stand.sent()
    session.commit()
    session.commit()

    [sent] = stand.sent()

    assert before == []
    assert (sent.id, sent.args) == (result.id, ["sent"])
    assert stand.effects() == ["written"]
    assert stand.outbox() == []


def test_rolled_back_transaction_sends_nothing(stand: OutboxStand, session: Session) -> None:
    """Neither then nor at the next commit, and no row is left."""
    enqueue(session, stand.effect.s("ghost"))
    session.add(Effect(name="ghost"))
    session.flush()
    session.rollback()
    session.add(Effect(name="next"))
    session.commit()

    assert stand.sent() == []
    assert stand.outbox() == []
    assert stand.effects() == ["next"]


def test_closed_session_sends_nothing(stand: OutboxStand) -> None:
    """A session that is closed, or dropped with its connection, has not committed."""
    for end in (Session.close, Session.invalidate):
        session = Session(stand.alchemy.engine)
        session.add(Effect(name="ghost"))
        session.flush()
        enqueue(session, stand.effect.s("ghost"))
        end(session)

    assert stand.sent() == []
    assert stand.outbox() == []


def test_transaction_that_only_sends_is_committed_and_sends(stand: OutboxStand, session: Session) -> None:
    """A transaction without any other statement is one too."""
    enqueue(session, stand.effect.s("alone"))
    session.commit()

    assert names_sent(stand) == ["alone"]


def test_released_savepoint_waits_for_the_outermost_commit(stand: OutboxStand, session: Session) -> None:
    """SQLAlchemy tells of a released SAVEPOINT as of a commit; a task sent then would find no row."""
    with session.begin_nested():
        with session.begin_nested():
            enqueue(session, stand.effect.s("inner"))
            session.add(Effect(name="inner"))
        after_inner = stand.sent()
    after_outer = stand.sent()
    session.commit()

    assert (after_inner, after_outer) == ([], [])
    assert names_sent(stand) == ["inner"]


def test_released_savepoint_of_rolled_back_transaction_sends_nothing(stand: OutboxStand, session: Session) -> None:
    """The outermost transaction decides."""
    with session.begin_nested():
        enqueue(session, stand.effect.s("ghost"))
    session.rollback()
    session.commit()

    assert stand.sent() == []
    assert stand.outbox() == []


def test_rolled_back_savepoint_takes_its_tasks_with_it(stand: OutboxStand, session: Session) -> None:
    """What was sent before it, after it, and in a released neighbour goes out, in order."""
    enqueue(session, stand.effect.s("before"))
    savepoint = session.begin_nested()
    enqueue(session, stand.effect.s("ghost"))
    with session.begin_nested():
        enqueue(session, stand.effect.s("ghost in released savepoint"))
    savepoint.rollback()
    with session.begin_nested():
        enqueue(session, stand.effect.s("released"))
    enqueue(session, stand.effect.s("after"))
    session.commit()

    assert names_sent(stand) == ["before", "released", "after"]
    assert stand.outbox() == []


def test_inner_savepoint_that_rolls_back_leaves_the_outer_one_alone(stand: OutboxStand, session: Session) -> None:
    """Each SAVEPOINT takes back what was called inside of it, no more."""
    with session.begin_nested():
        enqueue(session, stand.effect.s("outer"))
        inner = session.begin_nested()
        enqueue(session, stand.effect.s("ghost"))
        inner.rollback()
    session.commit()

    assert names_sent(stand) == ["outer"]


def test_session_in_an_outer_transaction_sends_after_the_connection_commits(stand: OutboxStand) -> None:
    """The session's commit is a promise; the transaction that somebody else began on its Connection is the fact."""
    with stand.alchemy.engine.connect() as connection:
        outer = connection.begin()
        with Session(connection) as session:
            session.add(Effect(name="written"))
            enqueue(session, stand.effect.s("sent"))
            session.commit()
        before = stand.sent()
        outer.commit()

    assert before == []
    assert names_sent(stand) == ["sent"]
    assert stand.effects() == ["written"]
    assert stand.outbox() == []


def test_session_in_an_outer_transaction_that_rolls_back_sends_nothing(stand: OutboxStand) -> None:
    """A test that wraps a session into a transaction of its own leaves no message."""
    with stand.alchemy.engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            session.add(Effect(name="ghost"))
            enqueue(session, stand.effect.s("ghost"))
            session.commit()
        outer.rollback()

    assert stand.sent() == []
    assert stand.outbox() == []
    assert stand.effects() == []


def test_scoped_session_sends_as_its_session_does(stand: OutboxStand) -> None:
    """Enqueue takes the registry itself, as web applications hold it."""
    registry = scoped_session(sessionmaker(stand.alchemy.engine))
    enqueue(registry, stand.effect.s("kept"))
    registry.commit()
    enqueue(registry, stand.effect.s("ghost"))
    registry.rollback()
    registry.remove()

    assert names_sent(stand) == ["kept"]


def test_on_commit_and_tasks_go_out_in_the_order_of_the_calls(stand: OutboxStand, session: Session) -> None:
    """A callable that was given before a send runs before it."""
    seen: list[list[Any]] = []
    on_commit(session, lambda: seen.append(names_sent(stand)))
    enqueue(session, stand.effect.s("between"))
    on_commit(session, lambda: seen.append(names_sent(stand)))
    session.commit()

    assert seen == [[], ["between"]]


@pytest.mark.parametrize("block", ["session", "begin"])
def test_blocks_have_their_session_at_hand(stand: OutboxStand, block: str) -> None:
    """delay_on_commit inside of alchemy.session() or alchemy.begin() needs no session; what fails sends nothing."""
    with getattr(stand.alchemy, block)() as session:
        session.add(Effect(name="written"))
        result = stand.effect.delay_on_commit("sent")
        if block == "session":
            session.commit()
    with pytest.raises(LookupError), getattr(stand.alchemy, block)():
        stand.effect.delay_on_commit("ghost")
        raise LookupError

    [sent] = stand.sent()
    assert (sent.id, sent.args) == (result.id, ["sent"])


def test_innermost_block_is_at_hand(stand: OutboxStand) -> None:
    """An inner block's commit is its own; the outer one's rollback does not take its task back."""
    with stand.alchemy.session():
        stand.effect.delay_on_commit("outer")
        with stand.alchemy.begin():
            stand.effect.delay_on_commit("inner")
        stand.effect.delay_on_commit("outer again")

    assert names_sent(stand) == ["inner"]


def test_without_a_session_nothing_is_sent_early(stand: OutboxStand) -> None:
    """NoSessionError names the call and what to do."""
    with stand.alchemy.session():
        pass

    with pytest.raises(NoSessionError, match=r"\.delay_on_commit\(\).*session=.*enqueue\(session"):
        stand.effect.delay_on_commit("x")
    with pytest.raises(NoSessionError, match=r"\.apply_async_on_commit\(\)"):
        stand.effect.apply_async_on_commit(("x",))

    assert stand.sent() == []


@pytest.mark.parametrize("begins", [True, False])
def test_block_that_has_ended_is_not_at_hand(stand: OutboxStand, begins: bool) -> None:
    """For what has begun in it and outlives it, as a callback or a task of asyncio does: what waits for no commit would be lost."""
    block = stand.alchemy.begin if begins else stand.alchemy.session
    with block() as session:
        context = contextvars.copy_context()
        session.commit()

    with pytest.raises(NoSessionError):
        context.run(stand.effect.delay_on_commit, "late")
    with pytest.raises(NoSessionError):
        context.run(stand.effect.apply_async_on_commit, ("late",))


def test_block_around_one_that_has_ended_is_at_hand(stand: OutboxStand) -> None:
    """It goes on."""
    with stand.alchemy.begin():
        with stand.alchemy.session():
            context = contextvars.copy_context()
        context.run(stand.effect.delay_on_commit, "outer")
        assert stand.sent() == []

    assert [sent.args for sent in stand.sent()] == [["outer"]]


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_run_that_has_ended_is_not_at_hand(stand: OutboxStand, once: bool, fails: bool) -> None:
    """Neither its session, which nobody would close again, nor its transaction."""
    left: list[contextvars.Context] = []

    @stand.task(name="leaves", bind=True, **({"once": True} if once else {}))
    def leaves(self: Any, session: Session) -> None:
        session.add(Effect(name="written"))
        left.append(contextvars.copy_context())
        if fails:
            raise LookupError

    with stand.alchemy.session() as session:
        enqueue(session, leaves.s())
        session.commit()
    [ended] = [stand.deliver(sent) for sent in stand.sent()]
    [context] = left

    assert ended.state == ("FAILURE" if fails else "SUCCESS")
    with pytest.raises(NoSessionError):
        context.run(stand.effect.delay_on_commit, "late")
    with pytest.raises(NoSessionError):
        context.run(lambda: leaves.session)


def test_named_session_wins_over_the_one_at_hand(stand: OutboxStand, session: Session) -> None:
    """session= is for frameworks that run the block and the call in different contexts."""
    with stand.alchemy.session():
        stand.effect.apply_async_on_commit(("x",), session=session)
    before = stand.sent()
    session.commit()

    assert before == []
    assert names_sent(stand) == ["x"]


def test_task_sends_after_its_own_commit(stand: OutboxStand) -> None:
    """The session of the running request is at hand; a failure takes its sends back."""

    @stand.task(name="send")
    def send(session: Session, name: str, *, fail: bool) -> int:
        session.add(Effect(name=name))
        stand.effect.delay_on_commit(name)
        if fail:
            raise LookupError(name)
        return len(stand.sent())

    with stand.alchemy.begin():
        send.delay_on_commit("good", fail=False)
        send.delay_on_commit("bad", fail=True)
    good, bad = (stand.deliver(sent) for sent in stand.sent())

    assert (good.state, good.value, bad.state) == ("SUCCESS", 0, "FAILURE")
    assert names_sent(stand) == ["good"]
    assert stand.effects() == ["good"]
    assert stand.outbox() == []


def test_sends_in_the_body_go_with_commits_of_the_body(stand: OutboxStand) -> None:
    """A task that commits as it goes sends as it goes, and what failed later does not take it back."""

    @stand.task(name="steps")
    def steps(session: Session) -> None:
        for name in ("one", "two", "three"):
            stand.effect.delay_on_commit(name)
            session.add(Effect(name=name))
            if name == "three":
                raise LookupError(name)
            session.commit()

    with stand.alchemy.begin():
        steps.delay_on_commit()
    stand.deliver(stand.sent()[0])

    assert names_sent(stand) == ["one", "two"]
    assert stand.effects() == ["one", "two"]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda effect: effect.s(object()), id="object"),
        pytest.param(lambda effect: chain(effect.s("a"), effect.s(object())), id="link of a chain"),
        pytest.param(lambda effect: group(effect.s("a"), effect.s(object())), id="member of a group"),
    ],
)
def test_arguments_that_cannot_be_serialised_fail_in_the_caller(
    stand: OutboxStand, session: Session, make: Callable[[Any], Any]
) -> None:
    """The error comes from the call, before anything is written, and the transaction goes on."""
    session.add(Effect(name="written"))
    with pytest.raises((EncodeError, TypeError)):
        enqueue(session, make(stand.effect))
    session.commit()

    assert stand.effects() == ["written"]
    assert stand.sent() == []
    assert stand.outbox() == []


def test_unknown_task_is_refused_in_the_caller(stand: OutboxStand, session: Session) -> None:
    """A worker would throw the message away; the name may be deep in a canvas."""
    unknown = stand.app.signature("no.such.task")
    for signature in (unknown, chain(stand.effect.s("a"), unknown), group(stand.effect.s("a"), unknown)):
        with pytest.raises(UnknownTaskError, match=r"no\.such\.task"):
            enqueue(session, signature)
    session.commit()

    assert stand.sent() == []


def test_tasks_of_other_services_can_be_declared(make_stand: MakeStand) -> None:
    """remote_tasks takes names and patterns."""
    stand = make_stand(remote_tasks=("billing.*",))
    with stand.alchemy.begin() as session:
        enqueue(session, stand.app.signature("billing.charge", args=("x",)))
        with pytest.raises(UnknownTaskError):
            enqueue(session, stand.app.signature("mail.send"))

    assert [sent.task for sent in stand.sent()] == ["billing.charge"]


def test_message_over_the_limit_is_refused_in_the_caller(make_stand: MakeStand) -> None:
    """It would be refused by the broker for ever; the text names both sizes."""
    stand = make_stand(max_message_bytes=1000)
    with stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("x" * 500))
        with pytest.raises(MessageTooLargeError, match="1000"):
            enqueue(session, stand.effect.s("x" * 1000))

    assert len(stand.sent()) == 1


def test_pickle_is_refused_by_the_outbox(make_stand: MakeStand) -> None:
    """Whoever can write to the table could run code in a worker otherwise."""
    stand = make_stand()
    with stand.alchemy.begin() as session, pytest.raises(UnsafeSerializerError, match="json"):
        enqueue(session, stand.effect.s("x"), serializer="pickle")

    assert stand.sent() == []
    assert stand.outbox() == []


def test_session_of_another_database_is_refused_by_the_outbox(make_stand: MakeStand, session_elsewhere: Session) -> None:
    """Its transaction cannot carry a row of this database's outbox."""
    stand = make_stand()

    with pytest.raises(ConfigurationError, match="one transaction cannot span both"):
        enqueue(session_elsewhere, stand.effect.s("x"))


@pytest.fixture
def session_elsewhere(database: Database, tmp_path: Any) -> Iterator[Session]:
    """A session of a database that is not the stand's."""
    engine = create_engine(f"sqlite:///{tmp_path}/elsewhere.db", poolclass=NullPool)
    with Session(engine) as session:
        yield session
