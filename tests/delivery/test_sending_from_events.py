"""Sends from listeners of SQLAlchemy's events, which run while a session commits: kept by the outbox like all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from celery_alchemy.outbox.outbox import HandOver
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand

Listen = Callable[[str, Callable[..., None]], None]

#: All but the last are fired by the flush of session.commit(), which comes after its before_commit event.
EVENTS = ["before_flush", "after_flush", "after_flush_postexec", "before_insert", "after_insert", "before_commit"]


@pytest.fixture
def session(stand: OutboxStand) -> Iterator[Session]:
    """A session that the user has made."""
    with Session(stand.alchemy.engine) as session:
        yield session


@pytest.fixture
def listen(session: Session) -> Iterator[Listen]:
    """Listens to an event of the session or of the mapper, until the end of the test."""
    heard: list[tuple[Any, str, Any]] = []

    def listen(name: str, listener: Callable[..., None]) -> None:
        target: Any = Effect if name.endswith("_insert") else session
        heard.append((target, name, listener))
        event.listen(target, name, listener)

    yield listen
    for arguments in heard:
        event.remove(*arguments)


class Once:
    """A listener that sends, the first time that it is called.

    Args:
        session: Whose commit the send waits for.
        make: Returns the signature.
        options: Of ``enqueue``.
    """

    def __init__(self, session: Session, make: Callable[[], Any], **options: Any) -> None:
        self._session, self._make, self._options = session, make, options
        self._called = False
        self.ids: list[str] = []

    def __call__(self, *_: Any) -> None:
        if not self._called:
            self._called = True
            self.ids.append(enqueue(self._session, self._make(), **self._options).id)


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("earlier", [True, False], ids=["with an earlier send", "alone"])
def test_send_from_a_listener_is_kept(stand: OutboxStand, session: Session, listen: Listen, name: str, earlier: bool) -> None:
    """It is in the database with what the transaction wrote, and the relay sends it."""
    send = Once(session, lambda: stand.effect.s("sent"))
    listen(name, send)
    ids = [enqueue(session, stand.effect.s("earlier")).id] if earlier else []
    session.add(Effect(name="written"))
    with stand.broker_down():
        session.commit()
    kept = stand.outbox()
    stand.make_due()
    stand.relay_all()

    assert stand.effects() == ["written"]
    assert sorted(kept) == sorted(ids + send.ids)
    assert sorted(sent.id for sent in stand.sent()) == sorted(kept)


@pytest.mark.parametrize("name", EVENTS)
def test_send_from_a_listener_survives_the_death_of_its_process(
    stand: OutboxStand, session: Session, listen: Listen, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is part of the COMMIT: there is nothing that would have to be done after it."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    send = Once(session, lambda: stand.effect.s("sent"))
    listen(name, send)
    session.add(Effect(name="written"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HandOver, "__call__", die)
        session.commit()

    assert stand.effects() == ["written"]
    assert stand.outbox("task_id") == send.ids


@pytest.mark.parametrize("name", EVENTS)
def test_send_from_a_listener_ends_with_its_transaction(stand: OutboxStand, session: Session, listen: Listen, name: str) -> None:
    """A commit that fails, or is rolled back, sends nothing."""
    session.add(Effect(id=1, name="there"))
    session.commit()
    session.expunge_all()
    listen(name, Once(session, lambda: stand.effect.s("ghost")))
    session.add_all([Effect(id=2, name="ghost"), Effect(id=1, name="ghost")])
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()
    session.commit()

    assert stand.outbox() == []
    assert stand.sent() == []
    assert stand.effects() == ["there"]


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("before", [True, False], ids=["sent before", "new"])
def test_once_task_sent_by_a_listener_is_owed(stand: OutboxStand, session: Session, listen: Listen, name: str, before: bool) -> None:
    """Also one whose id was chosen and may be in the table: it is looked for without a flush in the middle of a flush."""
    task = stand.task(name="owed", once=True)(_do_nothing)
    if before:
        enqueue(session, task.s(), task_id="chosen")
        session.commit()
    listen(name, Once(session, task.s, task_id="chosen"))
    session.add(Effect(name="written"))
    session.commit()

    assert [sent.id for sent in stand.sent()] == ["chosen"] * (1 + before)
    assert stand.outbox() == ["chosen"]
    assert stand.effects() == ["written"]


def _do_nothing() -> None:
    pass


def test_send_from_after_commit_is_kept_in_a_transaction_of_its_own(stand: OutboxStand, session: Session, listen: Listen) -> None:
    """The session takes no more statements then; the message is safe all the same before it is handed over."""
    send = Once(session, lambda: stand.effect.s("sent"))
    listen("after_commit", send)
    session.add(Effect(name="written"))
    with stand.broker_down():
        session.commit()

    assert stand.outbox() == send.ids != []


@pytest.mark.parametrize("outbox", [True, False], ids=["outbox", "direct"])
@pytest.mark.databases("sqlite")
def test_send_from_after_commit_of_a_savepoint_waits_for_the_outermost(make_stand: MakeStand, outbox: bool) -> None:
    """SQLAlchemy fires the event for a released SAVEPOINT too: what is sent then is neither lost nor early."""
    stand = make_stand(outbox=outbox)
    with Session(stand.alchemy.engine) as session:
        send = Once(session, lambda: stand.effect.s("sent"))
        event.listen(session, "after_commit", send)
        with session.begin_nested():
            session.add(Effect(name="written"))
        early = stand.sent()
        session.commit()

    assert early == []
    assert [sent.id for sent in stand.sent()] == send.ids != []


def test_commit_that_a_listener_refused_may_be_tried_again(stand: OutboxStand, session: Session, listen: Listen) -> None:
    """Its messages are in the transaction already and are not written twice."""
    refusals = [RuntimeError("not yet")]

    def refuse(_: Session) -> None:
        if refusals:
            raise refusals.pop()

    listen("before_commit", refuse)
    ids = [enqueue(session, stand.effect.s("first")).id]
    with pytest.raises(RuntimeError):
        session.commit()
    ids.append(enqueue(session, stand.effect.s("second")).id)
    session.commit()

    assert [sent.id for sent in stand.sent()] == ids
    assert stand.outbox() == []
