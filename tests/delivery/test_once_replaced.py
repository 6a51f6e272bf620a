"""A `once` task that replaces itself: what becomes of its writes, and what other tasks with its key report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, current_task, group
from celery.exceptions import Ignore
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import OnceReplacedError
from celery_alchemy.operations import dead_tasks
from celery_alchemy.requests.event_loop import process_loop
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.test_once import Start, start, start_past_outbox
from tests.stand import Sent


def by_order(order: int) -> str:
    return f"order {order}"


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


def add_tasks(stand: OutboxStand, target: Any = None, *, is_async: bool = False, **options: Any) -> Any:
    """Make a once task that replaces itself, and return it; without a target, by another once task."""

    @stand.task(name="pay", once=True, bind=True)
    def pay(self: Any, session: Session, order: Any) -> str:
        session.add(Effect(name=f"pay {order}"))
        return f"paid {order}"

    @stand.task(name="note")
    def note(session: Session, value: Any) -> str:
        session.add(Effect(name=f"note {value}"))
        return f"noted {value}"

    def charge(self: Any, session: Session, order: int) -> Any:
        session.add(Effect(name=f"charge {order}"))
        session.flush()
        return self.replace(target(order) if target is not None else pay.s(order))

    async def charge_async(self: Any, session: AsyncSession, order: int) -> Any:
        session.add(Effect(name=f"charge {order}"))
        await session.flush()
        return self.replace(target(order) if target is not None else pay.s(order))

    made: Any = charge_async if is_async else charge
    return stand.task(made, **{"name": "charge", "once": True, "bind": True, **options})


@pytest.mark.timeout(60)
@pytest.mark.parametrize("always", [False, True], ids=["apply", "always eager"])
def test_eager_replacement_runs_after_the_commit_of_the_replaced_task(stand: OutboxStand, always: bool) -> None:
    """It has the id of the replaced one and a record of its own; each is done once."""
    charge = add_tasks(stand)
    stand.app.conf.task_always_eager = always

    results = [charge.apply_async((7,), task_id="one") if always else charge.apply((7,), task_id="one") for _ in range(2)]

    assert [(result.id, result.state, result.get()) for result in results] == [("one", "SUCCESS", "paid 7")] * 2
    assert stand.effects() == ["charge 7", "pay 7"]
    assert sorted(stand.outbox("id")) == ["one", "one/1"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("once", [True, False], ids=["once", "plain"])
def test_eager_replacement_of_an_async_task_meets_none_of_its_locks(stand: OutboxStand, once: bool) -> None:
    """The coroutine has ended, and its transaction with it."""

    @stand.task(name="rename")
    def rename(session: Session) -> int:
        for effect in session.scalars(select(Effect).with_for_update()):
            effect.name += " renamed"
        session.flush()
        return 5

    charge = add_tasks(stand, lambda order: rename.s(), is_async=True, once=once)

    assert charge.apply((7,)).get() == 5
    assert stand.effects() == ["charge 7 renamed"]


def test_eager_chain_of_once_tasks_replaces_a_once_task(stand: OutboxStand) -> None:
    """Each of them is done, and has a record of its own."""
    charge = add_tasks(stand, lambda order: chain(stand.app.tasks["pay"].s(order), stand.app.tasks["pay"].s()))

    assert charge.apply((7,), task_id="one").get() == "paid paid 7"
    assert stand.effects() == ["charge 7", "pay 7", "pay paid 7"]
    assert len(stand.outbox()) == 3


def test_eager_replacements_of_replacements_have_records_of_their_own(stand: OutboxStand) -> None:
    """They all have one id."""

    @stand.task(name="between", bind=True)
    def between(self: Any, session: Session, order: int) -> Any:
        session.add(Effect(name=f"between {order}"))
        return self.replace(stand.app.tasks["pay"].s(order))

    @stand.task(name="second", once=True, bind=True)
    def second(self: Any, session: Session, order: int) -> Any:
        session.add(Effect(name=f"second {order}"))
        return self.replace(between.s(order))

    charge = add_tasks(stand, second.s)

    assert [charge.apply((7,), task_id="one").get() for _ in range(2)] == ["paid 7"] * 2
    assert stand.effects() == ["charge 7", "second 7", "between 7", "pay 7"]
    assert sorted(stand.outbox("id")) == ["one", "one/1", "one/3"]


def test_eager_task_with_the_key_of_a_replaced_one_reports_its_replacement(stand: OutboxStand) -> None:
    """As in a worker; one that replaces itself by one with its own key ends too."""
    charge = add_tasks(stand, once=by_order)

    @stand.task(name="own key", once=by_order, bind=True)
    def own_key(self: Any, session: Session, order: int) -> Any:
        session.add(Effect(name="own"))
        return self.replace(self.s(order))

    assert [charge.apply((7,)).get() for _ in range(2)] == ["paid 7"] * 2
    assert charge(7) == "paid 7"
    assert isinstance(own_key.apply((7,)).result, OnceReplacedError)
    assert stand.effects() == ["charge 7", "pay 7", "own"]


@pytest.mark.parametrize("kind", ["task", "chain"])
@pytest.mark.parametrize("throws", [False, True])
def test_eager_replacement_that_fails_is_the_failure_of_the_call_alone(stand: OutboxStand, kind: str, throws: bool) -> None:
    """The replaced task has succeeded with its share: it is neither retried nor recorded as failed."""
    told: list[str] = []

    @stand.task(name="target")
    def target(order: int) -> None:
        raise LookupError("no such card")

    def replaced(order: int) -> Any:
        return target.s(order) if kind == "task" else chain(target.s(order), target.s())

    charge = add_tasks(
        stand,
        replaced,
        once=by_order,
        autoretry_for=(LookupError,),
        record_failure=lambda session, exc, order: told.append(str(exc)),
    )

    if throws:
        with pytest.raises(LookupError):
            charge.apply((7,), task_id="one", throw=True)
    else:
        result = charge.apply((7,), task_id="one")
        assert (result.id, result.state, type(result.result)) == ("one", "FAILURE", LookupError)
    assert told == []
    assert stand.effects() == ["charge 7"]
    assert isinstance(charge.apply((7,)).result, OnceReplacedError)


@pytest.mark.parametrize("kind", ["task", "group", "chain"])
@pytest.mark.parametrize("always", [False, True], ids=["apply", "always eager"])
def test_eager_replacement_has_the_replaced_task_as_its_parent(stand: OutboxStand, kind: str, always: bool) -> None:
    """In an eager app too, where Celery refuses the results that a chain and a chord wait for."""
    stand.app.conf.task_always_eager = always
    seen: list[tuple[str, str]] = []

    @stand.task(name="look", bind=True)
    def look(self: Any, *_: Any) -> None:
        seen.append((self.request.parent_id, self.request.root_id))

    ways = {"task": look.s, "group": lambda _: group(look.s(), look.s()), "chain": lambda _: chain(look.s(), look.s())}
    charge = add_tasks(stand, ways[kind])

    result = charge.apply_async((7,), task_id="one") if always else charge.apply((7,), task_id="one")

    assert result.state == "SUCCESS"
    assert seen == [("one", "one")] * (1 if kind == "task" else 2)
    assert current_task._get_current_object() is None


def test_eager_replacement_may_be_retried_where_the_caller_wants_errors_raised(stand: OutboxStand) -> None:
    """As Celery does: ``throw`` is for the end of the replacement, and an eager retry is none."""

    @stand.task(name="flaky", bind=True, max_retries=1)
    def flaky(self: Any, order: int) -> str:
        if not self.request.retries:
            raise self.retry(countdown=0)
        return f"paid {order}"

    charge = add_tasks(stand, flaky.s)

    assert charge.apply((7,), throw=True).get() == "paid 7"


@pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header")
@pytest.mark.parametrize("of_parts", [False, True])
def test_errbacks_of_an_eager_task_hear_of_the_chord_that_replaced_it(stand: OutboxStand, of_parts: bool) -> None:
    """They are the body's, which does not run when a part of the chord has failed, or of each part if Celery is told so."""
    told: list[str] = []
    stand.app.conf.task_allow_error_cb_on_chord_header = of_parts

    @stand.task(name="part")
    def part() -> None:
        raise LookupError("no such card")

    @stand.task(name="tell")
    def tell(request: Any, exc: Exception, traceback: Any) -> None:
        told.append(str(exc))

    charge = add_tasks(stand, lambda _: group(part.si(), part.si()))

    assert charge.apply((7,), link_error=[tell.s()]).state == "FAILURE"
    assert told == ["no such card"] * (2 if of_parts else 1)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("begin", [start, start_past_outbox], ids=["through the outbox", "past the outbox"])
def test_later_task_with_the_key_of_a_replaced_one_reports_its_replacement(stand: OutboxStand, begin: Start, is_async: bool) -> None:
    """And goes on with that result; nothing is done a second time."""
    charge = add_tasks(stand, once=by_order, is_async=is_async)
    first = begin(stand, charge, 7)
    stand.deliver(first)
    stand.run_all()

    again = stand.deliver(begin(stand, charge, 7, link=stand.app.tasks["note"].s()))
    late = stand.deliver(first)
    stand.run_all()

    assert (again.state, again.value) == ("SUCCESS", "paid 7")
    assert late.state == "IGNORED"
    assert stand.effects() == ["charge 7", "pay 7", "note paid 7"]


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("kind", ["chain", "group"])
def test_result_of_a_replacement_is_that_of_its_canvas(stand: OutboxStand, kind: str) -> None:
    """Its last task has the id of the one that was replaced."""

    @stand.task(name="echo", once=True)
    def echo(value: Any) -> Any:
        return [value]

    make = chain if kind == "chain" else group
    charge = add_tasks(stand, lambda order: make(echo.s(order), *([echo.s()] if kind == "chain" else [echo.s(8)])), once=by_order)
    stand.deliver(start(stand, charge, 7))
    stand.run_all()

    again = stand.deliver(start(stand, charge, 7))

    assert again.value == ([[7]] if kind == "chain" else [[7], [8]])


def test_later_task_fails_while_there_is_no_result_and_asks_again(stand: OutboxStand) -> None:
    """It ends in any case; with autoretry it has the result as soon as there is one."""
    charge = add_tasks(stand, once=by_order, autoretry_for=(OnceReplacedError,), max_retries=1, default_retry_delay=0)
    stand.deliver(start(stand, charge, 7))
    replacement = stand.sent()
    early = start(stand, charge, 7)

    states = [stand.deliver(early).state]
    [retried] = stand.sent()
    last = stand.deliver(retried)
    for sent in replacement:
        stand.deliver(sent)
    states.append(stand.deliver(retried).value)

    assert states == ["RETRY", "paid 7"]
    assert (last.state, type(last.value), last.value.args) == (
        "FAILURE",
        OnceReplacedError,
        ("charge", "charge:order 7", replacement[0].id, ""),
    )
    assert dead_tasks.dead(stand.alchemy.engine) == []
    assert stand.effects() == ["charge 7", "pay 7"]


@pytest.mark.parametrize("reason", ["fails", "disabled", "ignored"])
def test_later_task_fails_where_there_is_no_result_to_report(stand: OutboxStand, reason: str) -> None:
    """The error says why: the replacement has failed, or nobody keeps its result."""
    if reason == "disabled":
        stand.app.conf.result_backend = "disabled://"

    @stand.task(name="target", ignore_result=reason == "ignored")
    def target(order: int) -> str:
        if reason == "fails":
            raise LookupError("no such card")
        return "done"

    charge = add_tasks(stand, target.s, once=by_order)
    first = start(stand, charge, 7)
    stand.deliver(first)
    stand.run_all()

    again = stand.deliver(start(stand, charge, 7))

    assert again.state == "FAILURE"
    assert isinstance(again.value, OnceReplacedError)
    assert (again.value.by, again.value.error) == (first.id, "LookupError: no such card" if reason == "fails" else "")
    assert stand.effects() == ["charge 7"]


def test_task_that_replaces_itself_by_one_with_its_own_key_fails(stand: OutboxStand) -> None:
    """Neither has a result that the other could report: the replacement ends, and says so."""

    def itself(order: int) -> Any:
        return stand.app.tasks["charge"].s(order)

    charge = add_tasks(stand, itself, once=by_order)
    first = start(stand, charge, 7)
    stand.deliver(first)
    [replacement] = stand.sent()

    ended = [stand.deliver(sent) for sent in (replacement, first)]

    assert [one.state for one in ended] == ["FAILURE", "IGNORED"]
    assert isinstance(ended[0].value, OnceReplacedError)
    assert "once key" in ended[0].value.error
    assert stand.effects() == ["charge 7"]
    assert stand.outbox("completed_at IS NOT NULL") == [True]


def test_owed_task_whose_work_a_guest_has_replaced_ends(stand: OutboxStand) -> None:
    """Its message was kept for its report: it reports the replacement's result, or is dead with the error."""
    charge = add_tasks(stand, once=by_order)
    owed = start(stand, charge, 7, link=stand.app.tasks["note"].s())
    stand.deliver(start_past_outbox(stand, charge, 7))
    replacement = stand.sent()

    early = stand.deliver(owed)
    [dead] = dead_tasks.dead(stand.alchemy.engine)
    for sent in replacement:
        stand.deliver(sent)
    dead_tasks.revive(stand.alchemy.engine)
    stand.relay_all()
    [revived] = stand.sent()
    late = stand.deliver(revived)
    stand.run_all()

    assert early.state == "FAILURE"
    assert (dead["task_id"], dead["error"].split(":")[0]) == (owed.id, "OnceReplacedError")
    assert (late.id, late.value) == (owed.id, "paid 7")
    assert stand.effects() == ["charge 7", "pay 7", "note paid 7"]
    assert stand.outbox("died_at IS NOT NULL OR due_at IS NOT NULL") == [False] * 2


def test_replaced_run_that_another_has_overtaken_reports_that_ones_result(stand: OutboxStand) -> None:
    """Both ran at the same time, and the one that returned has committed first."""
    others: list[Sent] = []

    @stand.task(name="charge", once=lambda order, by: f"order {order}", bind=True)
    def charge(self: Any, session: Session, order: int, by: str) -> str:
        if by == "slow" and others:
            stand.deliver(others.pop())
            return str(self.replace(stand.effect.si("ghost")))
        session.add(Effect(name=by))
        return f"done by {by}"

    slow = start_past_outbox(stand, charge, 7, "slow")
    others.append(start_past_outbox(stand, charge, 7, "quick"))

    ended = stand.deliver(slow)

    assert (ended.state, ended.value) == ("SUCCESS", "done by quick")
    assert stand.sent() == []
    assert stand.effects() == ["quick"]


def test_failure_of_a_task_stands_though_another_with_its_key_was_ignored(stand: OutboxStand) -> None:
    """That one has no result that could be reported instead."""
    others: list[Sent] = []

    @stand.task(name="charge", once=lambda order, by: f"order {order}")
    def charge(session: Session, order: int, by: str) -> None:
        if by == "slow":
            stand.deliver(others.pop())
            raise LookupError("no such card")
        raise Ignore

    slow = start_past_outbox(stand, charge, 7, "slow")
    others.append(start_past_outbox(stand, charge, 7, "quick"))

    assert stand.deliver(slow).state == "FAILURE"
