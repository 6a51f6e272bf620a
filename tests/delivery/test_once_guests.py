"""Two tasks with one key: the row of the key stands for the one that is owed, and only that one's delivery may end it."""

from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import Ignore, Reject
from celery.worker.state import revoked
from sqlalchemy.orm import Session

from celery_alchemy import DeadTaskError
from celery_alchemy.operations import dead_tasks as upkeep
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.test_once import start, start_past_outbox
from tests.delivery.test_once_in_parent import died, in_parent
from tests.stand import Crash, Sent

#: What the body of the guest is to do; the owed task's does its work.
Ending = list[Any]


def charge(stand: OutboxStand, endings: Ending, **options: Any) -> Any:
    """Make a task whose key is its first argument; each run takes the first of the endings, and does its work without one."""

    @stand.task(**{"name": "charge", "bind": True, "once": lambda order, by: f"order {order}", "max_deliveries": 3, **options})
    def charge_once(self: Any, session: Session, order: int, by: str) -> str:
        session.add(Effect(name=f"{order} by {by}"))
        session.flush()
        ending = endings.pop(0) if endings else None
        if ending == "retry":
            raise self.retry(countdown=0)
        if ending is not None:
            raise ending
        return f"done by {by}"

    return charge_once


def two(stand: OutboxStand, task: Any, *, past_outbox: bool = True) -> tuple[Sent, Sent]:
    """Send the task that is owed, and a guest with the same key."""
    owed = start(stand, task, 1, "owed")
    guest = (start_past_outbox if past_outbox else start)(stand, task, 1, "guest")
    return owed, guest


def owed_row(stand: OutboxStand, owed: Sent) -> tuple[bool, bool]:
    """Tell whether the row of the key is owed still, by the first task."""
    rows = stand.database.rows(
        "SELECT task_id FROM celery_outbox WHERE id LIKE 'charge:%' AND due_at IS NOT NULL"
        " AND completed_at IS NULL AND died_at IS NULL AND body IS NOT NULL"
    )
    return len(rows) == 1, [row[0] for row in rows] == [owed.id]


def the_owed_task_does_its_work(stand: OutboxStand, owed: Sent) -> None:
    """The broker has lost everything: the row is what brings the task back, and its own message."""
    assert owed_row(stand, owed) == (True, True)
    stand.sent()
    stand.make_due("due_at IS NOT NULL AND id LIKE 'charge:%'")
    stand.relay_all()
    [again] = [sent for sent in stand.sent() if sent.id == owed.id]
    assert again.args == [1, "owed"]
    assert stand.deliver(again).value == "done by owed"
    assert stand.effects() == ["1 by owed"]


@pytest.mark.parametrize("how", ["revoked", "expired"])
@pytest.mark.parametrize("past_outbox", [True, False])
def test_discarded_guest_leaves_the_owed_task_owed(stand: OutboxStand, how: str, past_outbox: bool) -> None:
    """A second click's message that has expired takes nothing from the first one's charge."""
    owed, guest = two(stand, charge(stand, []), past_outbox=past_outbox)
    if how == "revoked":
        revoked.add(guest.id)
    else:
        guest.headers["expires"] = "2020-01-01T00:00:00+00:00"
    request, to_broker = in_parent(stand, guest)

    assert request.revoked()
    assert to_broker == ["acknowledged"]
    assert upkeep.dead(stand.alchemy.engine) == []
    the_owed_task_does_its_work(stand, owed)


@pytest.mark.parametrize("ending", [LookupError("no such card"), Reject("no", requeue=False)], ids=["fails", "rejected"])
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "record_failure"])
def test_guest_that_fails_for_good_is_dead_by_itself(stand: OutboxStand, ending: Exception, recorded: bool) -> None:
    """Its death is kept under its own id, and may be revived; the owed task is not touched."""
    options = {"record_failure": lambda session, exc, order, by: None} if recorded else {}
    owed, guest = two(stand, charge(stand, [ending], **options))

    stand.deliver(guest)
    late = stand.deliver(guest)
    [dead] = upkeep.dead(stand.alchemy.engine)

    assert (dead["task_id"], type(ending).__name__ in dead["error"]) == (guest.id, True)
    assert isinstance(late.value, DeadTaskError)
    the_owed_task_does_its_work(stand, owed)
    assert upkeep.revive(stand.alchemy.engine) == 1
    stand.relay_all()
    [revived] = stand.sent()
    assert (revived.id, stand.deliver(revived).value) == (guest.id, "done by owed")
    assert stand.outbox("task_id, completed_at IS NOT NULL") == [(owed.id, True)]


def test_guest_that_kills_its_process_counts_against_itself(stand: OutboxStand) -> None:
    """After max_deliveries starts it is dead; the owed task has all its starts still."""
    owed, guest = two(stand, charge(stand, [Crash(), Crash(), Crash()]))
    for _ in range(3):
        with pytest.raises(Crash):
            stand.deliver(guest)
        request, to_broker = in_parent(stand, guest)
        request.on_failure(died())
        assert to_broker == ["rejected"]
    ended = stand.deliver(guest)

    assert isinstance(ended.value, DeadTaskError)
    assert [row["task_id"] for row in upkeep.dead(stand.alchemy.engine)] == [guest.id]
    assert stand.database.rows(f"SELECT deliveries FROM celery_outbox WHERE task_id = '{owed.id}'") == [(0,)]
    the_owed_task_does_its_work(stand, owed)


def test_redelivered_guest_that_does_the_work_leaves_no_count_behind(stand: OutboxStand) -> None:
    """What counted its starts goes with the completion; the owed task reports its result."""
    owed, guest = two(stand, charge(stand, [Crash()]))
    with pytest.raises(Crash):
        stand.deliver(guest)
    ended = stand.deliver(guest, delivery_info={"redelivered": True})

    assert ended.value == "done by guest"
    assert stand.deliver(owed).value == "done by guest"
    assert stand.effects() == ["1 by guest"]
    assert stand.outbox("task_id, completed_at IS NOT NULL") == [(owed.id, True)]


@pytest.mark.parametrize("meanwhile", ["completes", "dies"])
@pytest.mark.parametrize("last", ["crash", "retry"])
def test_guest_whose_starts_were_counted_leaves_no_count_when_the_owed_task_ends(
    stand: OutboxStand, meanwhile: str, last: str
) -> None:
    """However that ends: the guest has nothing more to run, and nobody would ask for its row again."""
    first: Ending = [Crash(), Crash() if last == "crash" else "retry"]
    owed, guest = two(stand, charge(stand, [*first, None if meanwhile == "completes" else LookupError("no")]))
    with pytest.raises(Crash):
        stand.deliver(guest)
    if last == "crash":
        with pytest.raises(Crash):
            stand.deliver(guest, delivery_info={"redelivered": True})
    else:
        stand.deliver(guest, delivery_info={"redelivered": True})
        [guest] = stand.sent()
    assert set(stand.outbox()) == {owed.id, guest.id}

    stand.deliver(owed)
    ended = stand.deliver(guest, delivery_info={"redelivered": last == "crash"})

    assert isinstance(ended.value, DeadTaskError) if meanwhile == "dies" else ended.value == "done by owed"
    assert stand.outbox() == [owed.id]


def test_counted_guest_that_is_ignored_leaves_no_count(stand: OutboxStand) -> None:
    """Its work is done, in the row of the key."""
    owed, guest = two(stand, charge(stand, [Crash(), Ignore()]))
    with pytest.raises(Crash):
        stand.deliver(guest)
    stand.deliver(guest, delivery_info={"redelivered": True})
    stand.deliver(owed)

    assert stand.outbox("task_id, completed_at IS NOT NULL") == [(owed.id, True)]


def test_retry_of_a_guest_does_not_take_the_place_of_the_owed_message(stand: OutboxStand) -> None:
    """Both messages go on, each with its own arguments."""
    owed, guest = two(stand, charge(stand, ["retry"]))
    stand.deliver(guest)
    [retried] = stand.sent()

    assert (retried.id, retried.args, retried.headers["retries"]) == (guest.id, [1, "guest"], 1)
    the_owed_task_does_its_work(stand, owed)
    assert stand.deliver(retried).value == "done by owed"


def test_direct_call_that_fails_does_not_end_the_owed_task(stand: OutboxStand) -> None:
    """It has no id by which a row could stand for it."""
    task = charge(stand, [LookupError("no such card")])
    owed = start(stand, task, 1, "owed")
    with pytest.raises(LookupError):
        task(1, "direct")

    assert upkeep.dead(stand.alchemy.engine) == []
    the_owed_task_does_its_work(stand, owed)


@pytest.mark.parametrize("how", ["hard limit", "lost child"])
def test_killed_guest_does_not_end_the_owed_task(stand: OutboxStand, how: str) -> None:
    """What the parent process records of it is about its own row."""
    task = charge(stand, [], reject_on_worker_lost=False)
    owed, guest = two(stand, task)
    request, _ = in_parent(stand, guest)
    if how == "hard limit":
        request.on_timeout(soft=False, timeout=1)
    else:
        type(task).reject_on_worker_lost = False
        task.reject_on_worker_lost = False
        request.on_failure(died())

    the_owed_task_does_its_work(stand, owed)


def test_death_of_the_owed_task_itself_is_recorded_in_the_row_of_the_key(stand: OutboxStand) -> None:
    """What holds for a guest does not hold for the task that the row stands for."""
    owed, guest = two(stand, charge(stand, [LookupError("no such card")]))
    stand.deliver(owed)

    assert [row["task_id"] for row in upkeep.dead(stand.alchemy.engine)] == [owed.id]
    assert isinstance(stand.deliver(guest).value, DeadTaskError)


def test_message_of_the_owed_task_is_sent_again_until_it_has_reported(stand: OutboxStand) -> None:
    """The guest has done the work, and the broker has lost the message of the other: its callbacks go on all the same."""
    task = charge(stand, [])
    owed = start(stand, task, 1, "owed", link=stand.effect.si("owed goes on"))
    assert stand.deliver(start_past_outbox(stand, task, 1, "guest")).value == "done by guest"

    stand.make_due()
    stand.relay_all()
    [again] = stand.sent()
    assert (again.id, again.args) == (owed.id, [1, "owed"])
    assert stand.deliver(again).value == "done by guest"
    assert stand.run_all() == ["effect"]
    assert stand.effects() == ["1 by guest", "owed goes on"]
    assert stand.outbox("task_id, completed_at IS NOT NULL") == [(owed.id, True)]


def test_owed_task_that_has_reported_is_not_sent_again(stand: OutboxStand) -> None:
    """Its own delivery came after all, and its callbacks were sent with the end of what was kept."""
    task = charge(stand, [])
    owed = start(stand, task, 1, "owed", link=stand.effect.si("owed goes on"))
    stand.deliver(start_past_outbox(stand, task, 1, "guest"))

    assert stand.deliver(owed).value == "done by guest"
    assert stand.run_all() == ["effect"]
    stand.make_due()
    assert stand.relay_all() == 0
    assert stand.outbox("task_id, completed_at IS NOT NULL") == [(owed.id, True)]


def test_owed_task_that_a_guest_overtakes_reports_once(stand: OutboxStand) -> None:
    """Both run at the same time, and the guest commits first: the other has its message, and needs no second one."""
    guests: list[Sent] = []

    @stand.task(name="charge", once=lambda order, by: f"order {order}")
    def charge_once(session: Session, order: int, by: str) -> str:
        if by == "owed" and guests:
            stand.deliver(guests.pop())
        session.add(Effect(name=f"{order} by {by}"))
        return f"done by {by}"

    owed = start(stand, charge_once, 1, "owed", link=stand.effect.si("owed goes on"))
    guests.append(start_past_outbox(stand, charge_once, 1, "guest"))

    assert stand.deliver(owed).value == "done by guest"
    assert stand.run_all() == ["effect"]
    assert stand.outbox("task_id, completed_at IS NOT NULL") == [(owed.id, True)]


def count_of(stand: OutboxStand, sent: Sent) -> int:
    """Return how many starts of a task are counted."""
    return int(stand.database.scalar(f"SELECT deliveries FROM celery_outbox WHERE task_id = '{sent.id}'"))


def test_retries_of_a_guest_count_against_itself(stand: OutboxStand) -> None:
    """Their messages name no row: the one of the key is another task's."""
    task = charge(stand, ["retry", "retry", Crash(), Crash(), Crash()])
    owed, guest = two(stand, task)
    for _ in range(2):
        stand.deliver(guest)
        [guest] = stand.sent()
        assert "celery_alchemy_row" not in guest.headers
    for number in range(3):
        with pytest.raises(Crash):
            stand.deliver(guest, delivery_info={"redelivered": number > 0})

    assert count_of(stand, owed) == 0
    assert isinstance(stand.deliver(guest, delivery_info={"redelivered": True}).value, DeadTaskError)
    assert [row["task_id"] for row in upkeep.dead(stand.alchemy.engine)] == [guest.id]
    the_owed_task_does_its_work(stand, owed)


def test_retry_of_a_task_without_a_row_names_the_one_that_is_made(stand: OutboxStand) -> None:
    """From then on it is owed, and its starts are counted there."""
    sent = start_past_outbox(stand, charge(stand, ["retry", Crash()]), 1, "owed")
    stand.deliver(sent)
    [retried] = stand.sent()
    assert retried.headers["celery_alchemy_row"] == "charge:order 1"
    with pytest.raises(Crash):
        stand.deliver(retried)

    assert count_of(stand, sent) == 1


def test_guest_whose_last_retry_fails_is_dead_by_itself(stand: OutboxStand) -> None:
    """And shown as such."""
    owed, guest = two(stand, charge(stand, ["retry", LookupError("no such card")]))
    stand.deliver(guest)
    [retried] = stand.sent()
    stand.deliver(retried)

    assert [row["task_id"] for row in upkeep.dead(stand.alchemy.engine)] == [guest.id]
    the_owed_task_does_its_work(stand, owed)


@pytest.mark.parametrize("ending", [Crash(), LookupError("no such card")], ids=["dies", "fails"])
def test_message_that_names_the_row_of_another_task_is_a_guest(stand: OutboxStand, ending: BaseException) -> None:
    """Sent before the row was another's: it counts no start there, and its death is its own."""
    owed, guest = two(stand, charge(stand, [ending]))
    guest.headers["celery_alchemy_row"] = "charge:order 1"
    try:
        stand.deliver(guest)
    except Crash:
        assert upkeep.dead(stand.alchemy.engine) == []
    else:
        assert [row["task_id"] for row in upkeep.dead(stand.alchemy.engine)] == [guest.id]

    assert count_of(stand, owed) == 0
    the_owed_task_does_its_work(stand, owed)
