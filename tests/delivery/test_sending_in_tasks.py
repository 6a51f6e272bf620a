"""Inside of a task: plain sends in an open transaction, retries and replacements, in eager mode and outside of it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from celery.exceptions import Ignore
from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from celery_alchemy import (
    MissingTableError,
    NoSessionError,
    PublishInTransactionError,
    PublishInTransactionWarning,
    on_commit,
)
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.stand import Ended, Sent

pytestmark = pytest.mark.databases("sqlite")


def start(stand: OutboxStand, task: Any, *args: Any, **options: Any) -> Sent:
    """Send a task from a transaction of its own and take its message out of the broker."""
    with stand.alchemy.begin():
        task.apply_async_on_commit(args, **options)
    [sent] = stand.sent()
    return sent


def run(stand: OutboxStand, task: Any, *args: Any) -> Ended:
    """Send a task and deliver it."""
    return stand.deliver(start(stand, task, *args))


def write(session: Session, way: str) -> None:
    """Leave work that is not committed, in one of the ways in which a session can."""
    if way == "unflushed":
        session.add(Effect(name=way))
    elif way == "flushed":
        session.add(Effect(name=way))
        session.flush()
    elif way == "core":
        session.execute(insert(Effect).values(name=way))
    elif way == "text":
        session.execute(text("INSERT INTO effect (name) VALUES ('text')"))


WAYS = ["unflushed", "flushed", "core", "text"]


def sender(stand: OutboxStand, way: str) -> Any:
    @stand.task(name="sender", commit_on=("success",))
    def send(session: Session) -> int:
        session.execute(text("SELECT 1"))
        write(session, way)
        stand.effect.delay("plain")
        return len(stand.sent())

    return send


@pytest.mark.parametrize("way", WAYS)
def test_plain_send_with_uncommitted_writes_warns(make_stand: MakeStand, way: str) -> None:
    """The most frequent bug of the field; the warning names the remedy, and the message goes out as it always did."""
    stand = make_stand()

    with pytest.warns(PublishInTransactionWarning, match="delay_on_commit"):
        ended = run(stand, sender(stand, way))

    assert (ended.state, ended.value) == ("SUCCESS", 1)


def test_warning_points_at_the_line_that_sent(make_stand: MakeStand) -> None:
    """A warning that names the library's own file tells nobody where to look."""
    stand = make_stand()

    with pytest.warns(PublishInTransactionWarning) as caught:
        run(stand, sender(stand, "flushed"))

    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("way", WAYS)
def test_plain_send_with_uncommitted_writes_can_be_an_error(make_stand: MakeStand, way: str) -> None:
    """publish_in_transaction="raise" fails the task, which sends nothing and leaves nothing."""
    stand = make_stand(publish_in_transaction="raise")

    ended = run(stand, sender(stand, way))

    assert ended.state == "FAILURE"
    assert isinstance(ended.value, PublishInTransactionError)
    assert stand.sent() == []
    assert stand.effects() == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outbox", [True, False])
def test_plain_send_with_uncommitted_writes_can_wait(make_stand: MakeStand, way: str, outbox: bool) -> None:
    """publish_in_transaction="defer" makes it a delay_on_commit."""
    stand = make_stand(publish_in_transaction="defer", outbox=outbox)

    ended = run(stand, sender(stand, way))

    assert (ended.state, ended.value) == ("SUCCESS", 0)
    assert [sent.args for sent in stand.sent()] == [["plain"]]
    assert stand.effects() == [way]


def test_deferred_send_goes_with_its_transaction(make_stand: MakeStand) -> None:
    """A rollback takes it back, as it does a delay_on_commit; the caller has the final id meanwhile."""
    stand = make_stand(publish_in_transaction="defer")
    ids: list[str] = []

    @stand.task(name="fails")
    def fails(session: Session) -> None:
        write(session, "flushed")
        ids.append(stand.effect.delay("ghost").id)
        raise LookupError

    ended = run(stand, fails)

    assert ended.state == "FAILURE"
    assert len(ids) == 1
    assert stand.sent() == []
    assert stand.outbox() == []


def test_plain_send_can_be_allowed(make_stand: MakeStand) -> None:
    """publish_in_transaction="allow" says nothing (warnings are errors in this suite)."""
    stand = make_stand(publish_in_transaction="allow")

    assert run(stand, sender(stand, "flushed")).value == 1


@pytest.mark.parametrize("policy", ["warn", "raise"])
def test_plain_send_without_uncommitted_writes_is_nobodys_business(make_stand: MakeStand, policy: str) -> None:
    """Reading, or having committed, is no reason to complain."""
    stand = make_stand(publish_in_transaction=policy)

    @stand.task(name="reads")
    def reads(session: Session) -> int:
        session.execute(text("SELECT 1"))
        stand.effect.delay("after reading")
        write(session, "flushed")
        session.commit()
        stand.effect.delay("after the commit")
        return len(stand.sent())

    assert run(stand, reads).value == 2


def test_plain_send_outside_of_tasks_is_as_it_was(make_stand: MakeStand) -> None:
    """The policy is for tasks; a script that sends at once may."""
    stand = make_stand(publish_in_transaction="raise")

    with stand.alchemy.begin() as session:
        write(session, "flushed")
        stand.effect.delay("plain")
        sent = stand.sent()

    assert len(sent) == 1


def test_send_on_commit_is_not_taken_for_a_plain_one(make_stand: MakeStand) -> None:
    """delay_on_commit with uncommitted writes is what the policies ask for."""
    stand = make_stand(publish_in_transaction="raise")

    @stand.task(name="good")
    def good(session: Session) -> None:
        write(session, "flushed")
        stand.effect.delay_on_commit("sent")

    assert run(stand, good).state == "SUCCESS"
    assert [sent.args for sent in stand.sent()] == [["sent"]]


@pytest.mark.parametrize("policy", ["warn", "raise", "defer"])
@pytest.mark.parametrize("outbox", [True, False])
def test_retry_is_sent_after_the_rollback(make_stand: MakeStand, policy: str, outbox: bool) -> None:
    """self.retry() with uncommitted writes is no plain send, and its message goes out though the work is rolled back."""
    stand = make_stand(publish_in_transaction=policy, outbox=outbox)

    @stand.task(name="again", bind=True)
    def again(self: Any, session: Session) -> str:
        write(session, "flushed")
        stand.effect.delay_on_commit("ghost" if self.request.retries == 0 else "kept")
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        return "done"

    first = start(stand, again)
    retried = stand.deliver(first)
    [second] = stand.sent()
    ended = stand.deliver(second)

    assert (retried.state, ended.state) == ("RETRY", "SUCCESS")
    assert second.id == first.id
    assert second.headers["retries"] == 1
    assert [sent.args for sent in stand.sent()] == [["kept"]]
    assert stand.effects() == ["flushed"]


@pytest.mark.parametrize("outbox", [True, False])
def test_replacement_is_sent_after_the_commit(make_stand: MakeStand, outbox: bool) -> None:
    """self.replace() finishes the task's share: its writes are committed, then the replacement runs under its id."""
    stand = make_stand(outbox=outbox)

    @stand.task(name="replaces", bind=True)
    def replaces(self: Any, session: Session) -> None:
        write(session, "flushed")
        self.replace(stand.effect.si("replacement"))

    first = start(stand, replaces)
    ended = stand.deliver(first)
    [second] = stand.sent()
    stand.deliver(second)

    assert ended.state == "IGNORED"
    assert second.id == first.id
    assert stand.effects() == ["flushed", "replacement"]
    assert stand.outbox() == []


@pytest.mark.parametrize("outbox", [True, False])
def test_replacement_of_a_task_whose_commit_fails_is_not_sent(make_stand: MakeStand, outbox: bool) -> None:
    """The task failed; it handed nothing on."""
    stand = make_stand(outbox=outbox)

    @stand.task(name="replaces", bind=True)
    def replaces(self: Any, session: Session) -> None:
        session.add(Effect(id=1, name="one"))
        session.flush()
        session.add(Effect(id=1, name="same key"))
        self.replace(stand.effect.si("ghost"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ended = stand.deliver(start(stand, replaces))

    assert ended.state == "FAILURE"
    assert stand.sent() == []
    assert stand.effects() == []


def test_ignored_task_takes_its_sends_back_unless_it_commits(make_stand: MakeStand) -> None:
    """What is sent on commit follows commit_on as the rows do."""
    stand = make_stand()

    def body(session: Session) -> None:
        stand.effect.delay_on_commit("sent")
        raise Ignore

    rolls_back = stand.task(name="rolls back")(body)
    commits = stand.task(name="commits", commit_on=("success", "ignore"))(body)

    run(stand, rolls_back)
    after_rollback = stand.sent()
    run(stand, commits)

    assert after_rollback == []
    assert [sent.args for sent in stand.sent()] == [["sent"]]


def test_task_without_a_used_session_can_send_on_commit(make_stand: MakeStand) -> None:
    """The running request's session is at hand though the body never asked for it."""
    stand = make_stand()

    @stand.task(name="plain")
    def plain() -> None:
        stand.effect.delay_on_commit("sent")

    assert run(stand, plain).state == "SUCCESS"
    assert [sent.args for sent in stand.sent()] == [["sent"]]


def test_session_is_not_at_hand_after_the_task(make_stand: MakeStand) -> None:
    """A request leaves nothing behind in its thread."""
    stand = make_stand()
    run(stand, stand.effect, "a")

    with pytest.raises(NoSessionError):
        stand.effect.delay_on_commit("x")


def test_eager_mode_runs_the_task_after_the_commit(make_stand: MakeStand) -> None:
    """task_always_eager keeps the order of things: first the commit, then the task; after a rollback, nothing."""
    stand = make_stand()
    stand.app.conf.task_always_eager = True

    with stand.alchemy.begin() as session:
        write(session, "flushed")
        result = stand.effect.delay_on_commit("eager")
        session.flush()
    with stand.alchemy.session() as session:
        stand.effect.delay_on_commit("ghost")
        session.rollback()

    assert stand.effects() == ["flushed", "eager"]
    assert result.id


def test_direct_call_sends_on_its_own_commit(make_stand: MakeStand) -> None:
    """A task called as a function is a transaction too."""
    stand = make_stand()

    @stand.task(name="direct")
    def direct(session: Session) -> int:
        write(session, "flushed")
        stand.effect.delay_on_commit("sent")
        return len(stand.sent())

    assert direct() == 0
    assert [sent.args for sent in stand.sent()] == [["sent"]]


# --- from callables that wait for the commit, and from transactions that must not write --------------


@pytest.mark.parametrize("way", ["sync", "block", "once"])
@pytest.mark.parametrize("outbox", [True, False])
def test_send_of_a_callable_that_waited_for_the_commit_goes_out(make_stand: MakeStand, outbox: bool, way: str) -> None:
    """The commit has happened, so that it goes out at once, by a transaction of its own."""
    stand = make_stand(outbox=outbox)

    @stand.task(name="parent", once=way == "once")
    def parent(session: Session) -> None:
        on_commit(session, lambda: stand.effect.delay_on_commit("child"))

    if way == "block":
        with stand.alchemy.begin() as session:
            on_commit(session, lambda: stand.effect.delay_on_commit("child"))
    else:
        parent.apply(throw=True)

    assert [sent.args for sent in stand.sent()] == [["child"]]
    assert stand.alchemy.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("outbox", [True, False])
def test_read_only_task_sends(make_stand: MakeStand, outbox: bool, begun: bool) -> None:
    """A dispatcher only reads; its messages are written in a transaction of their own, right after its commit."""
    stand = make_stand(outbox=outbox)

    @stand.task(name="dispatcher", read_only=True)
    def dispatch(session: Session) -> None:
        if begun:
            session.execute(text("SELECT 1"))
        for name in ("a", "b"):
            stand.effect.delay_on_commit(name)

    ended = run(stand, dispatch)

    assert ended.state == "SUCCESS"
    assert [sent.args for sent in stand.sent()] == [["a"], ["b"]]
    assert stand.outbox() == []


def test_read_only_task_whose_messages_cannot_be_written_fails(make_stand: MakeStand) -> None:
    """It has committed nothing, and would else be a success that has sent nothing."""
    stand = make_stand(outbox=True)

    @stand.task(name="dispatcher", read_only=True)
    def dispatch(session: Session) -> None:
        session.execute(text("SELECT 1"))
        stand.effect.delay_on_commit("a")

    sent = start(stand, dispatch)
    stand.database.execute("DROP TABLE celery_outbox")
    ended = stand.deliver(sent)

    assert (ended.state, type(ended.value)) == ("FAILURE", MissingTableError)
    stand.alchemy.create_tables()


def test_read_only_task_that_fails_sends_nothing(make_stand: MakeStand) -> None:
    """As any other."""
    stand = make_stand(outbox=True)

    @stand.task(name="dispatcher", read_only=True)
    def dispatch(session: Session) -> None:
        stand.effect.delay_on_commit("a")
        raise LookupError

    assert run(stand, dispatch).state == "FAILURE"
    assert (stand.sent(), stand.outbox()) == ([], [])
