"""The state machine of the delivery guarantees: what may happen, in any order, and a model that says what must be true.

``test_state_machine.py`` runs it. After every step the database and the broker are compared with the model. The invariants have the
numbers by which the design names them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import select, update
from sqlalchemy.orm import Session, SessionTransaction

from celery_alchemy import enqueue
from celery_alchemy.databases.tables import from_now, outbox
from celery_alchemy.operations import dead_tasks as upkeep
from celery_alchemy.outbox import relay as relay_module
from celery_alchemy.outbox.outbox import Outbox
from celery_alchemy.outbox.relay import Relay
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.stand import Crash, Ended, Sent

#: How often a task is started without an end before it is dead.
MAX_DELIVERIES = 3
#: How long a completion is kept; the machine turns the clock by changing when it was.
WINDOW_SECONDS = 1000.0

#: How the body of a delivery ends.
ENDS = st.sampled_from(["returns", "returns", "raises", "retries", "crashes", "crashes before its commit"])
#: What happens while a worker stands still in the middle of a body: nothing, another run of its task, or another sending.
MEANWHILE = st.sampled_from([None, None, None, "returns", "returns", "raises", "retries", "a relay claims it"])


@dataclass
class Level:
    """What a transaction or a SAVEPOINT has done so far: effects, and ids of once and plain tasks that it sent."""

    effects: list[str] = field(default_factory=list)
    sends: list[str] = field(default_factory=list)


@dataclass
class Run:
    """A delivery that is under way.

    Attributes:
        sent: Its message.
        end: How its body ends.
        meanwhile: What happens while its body is stopped; None if it is not.
        began: Its body was started.
    """

    sent: Sent
    end: str
    meanwhile: str | None = None
    began: bool = False


class RefusingPublisher:
    """The way to a broker that is there and takes no message."""

    paused = False

    def publish(self, messages: list[Any], within_seconds: float) -> list[Exception]:
        """Return an error for each."""
        return [OSError("the broker refuses it") for _ in messages]


class Delivery(RuleBasedStateMachine):
    """The machine: a stand, and beside it the model.

    Attributes:
        stand: Set by the test, one for all examples; each example empties it.
        reached: What the examples have reached so far; one that reaches nothing proves nothing.
    """

    stand: OutboxStand
    reached: set[str]

    def __init__(self) -> None:
        super().__init__()
        self.session: Session | None = None
        self.savepoints: list[SessionTransaction] = []
        self.levels: list[Level] = []
        self.number = 0
        #: The model: effects of committed transactions, and tasks by id that were sent by them.
        self.effects: list[str] = []
        self.committed_sends: set[str] = set()
        #: Once tasks that were completed, the first one first, those that are dead, and how often each was started without an end.
        self.done: dict[str, Any] = {}
        self.dead: set[str] = set()
        self.starts: Counter[str] = Counter()
        self.pruned: set[str] = set()
        #: Plain messages that the broker has refused too often, by the ids of their rows.
        self.refused: set[str] = set()
        #: Every message that was ever taken out of the broker.
        self.taken: list[Sent] = []
        #: Deliveries under way, and processes that stopped with rows leased to them: the claim, and what they do if they go on.
        self.runs: list[Run] = []
        #: What was found wrong inside of a body, where Celery takes it for the task's failure.
        self.broken: list[AssertionError] = []
        self.stopped: list[tuple[str, Callable[[], None]]] = []

    @initialize()
    def empty(self) -> None:
        self.stand.app.conf.delivery = self
        self.stand.sent()
        for table in ("effect", "celery_outbox"):
            self.stand.database.execute(f"DELETE FROM {table}")
        # Something to deliver from the first step on.
        for _ in range(3):
            self.send(once=True)
        self.savepoint(sends=True)
        self.roll_back_to_savepoint()
        self.commit(handed_over="at once")

    def name(self) -> str:
        self.number += 1
        return f"{self.number}"

    # --- a caller's transaction -------------------------------------------------------------------------------

    @rule()
    def write(self) -> None:
        name = self.name()
        self.open().add(Effect(name=name))
        self.open().flush()
        self.levels[-1].effects.append(name)

    @rule(once=st.sampled_from([True, True, False]))
    def send(self, once: bool) -> None:
        task = self.stand.app.tasks["work" if once else "effect"]
        result = enqueue(self.open(), task.s(self.name()))
        self.levels[-1].sends.append(result.id)

    @rule(sends=st.booleans())
    def savepoint(self, sends: bool) -> None:
        self.savepoints.append(self.open().begin_nested())
        self.levels.append(Level())
        if sends:
            self.send(once=True)

    @precondition(lambda self: self.savepoints != [])
    @rule()
    def roll_back_to_savepoint(self) -> None:
        self.savepoints.pop().rollback()
        if self.levels.pop().sends:
            self.reached.add("send in a SAVEPOINT that was rolled back")

    @precondition(lambda self: self.savepoints != [])
    @rule()
    def release_savepoint(self) -> None:
        self.savepoints.pop().commit()
        released = self.levels.pop()
        self.levels[-1].effects += released.effects
        self.levels[-1].sends += released.sends

    @precondition(lambda self: self.session is not None)
    @rule(handed_over=st.sampled_from(["at once", "by a relay", "late"]))
    def commit(self, handed_over: str) -> None:
        """Commit; the broker may be down then, and the process may stop between its commit and the hand-over."""
        outbox = self.outbox()
        outbox.publisher._paused_until = float("inf") if handed_over == "by a relay" else 0.0
        while self.savepoints:
            self.release_savepoint()
        if handed_over == "late":
            with patch.object(outbox, "hand_over", partial(self.stop_before_hand_over, outbox.hand_over)):
                self.open().commit()
        else:
            self.open().commit()
        self.stand.handed_over()
        outbox.publisher._paused_until = 0.0
        self.effects += self.levels[0].effects
        self.committed_sends.update(self.levels[0].sends)
        self.end()

    def stop_before_hand_over(self, hand_over: Callable[..., None], rows: list[Any], claim: str) -> None:
        self.stopped.append((claim, partial(hand_over, rows, claim)))

    @precondition(lambda self: self.session is not None)
    @rule(way=st.sampled_from(["rollback", "close", "invalidate"]))
    def roll_back(self, way: str) -> None:
        getattr(self.open(), way)()
        self.end()

    def end(self) -> None:
        self.open().close()
        self.session, self.savepoints, self.levels = None, [], []

    def open(self) -> Session:
        """Return the caller's session; its first act begins a transaction."""
        if self.session is None:
            self.session = Session(self.stand.alchemy.engine)
            self.levels = [Level()]
        return self.session

    def outbox(self) -> Outbox:
        outbox = self.stand.alchemy.outbox
        assert outbox is not None
        return outbox

    # --- workers ----------------------------------------------------------------------------------------------

    def idle(self) -> bool:
        """No transaction is open: SQLite has one writer, and a test waits for nobody."""
        return self.session is None

    def take(self) -> None:
        """Empty the broker, as happens after every step: what is to be sent again is in the outbox, or nowhere."""
        self.taken += self.stand.sent()

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), end=ENDS, meanwhile=MEANWHILE)
    def deliver(self, data: st.DataObject, end: str, meanwhile: str | None) -> None:
        """Deliver any message that was ever sent, the first time or again.

        The worker may stop in the body for so long that its task is sent, or run, by others.
        """
        if candidates := self.candidates():
            self.run(Run(data.draw(st.sampled_from(candidates)), end, meanwhile))

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def deliver_what_kills_its_process(self, data: st.DataObject) -> None:
        if candidates := self.candidates():
            sent = data.draw(st.sampled_from(candidates))
            for _ in range(MAX_DELIVERIES + 1):
                self.run(Run(sent, "crashes"))

    def candidates(self) -> list[Sent]:
        self.take()
        return [sent for sent in self.taken if sent.task == "work" and sent.id not in self.pruned]

    def run(self, run: Run) -> None:
        self.runs.append(run)
        try:
            ended = self.stand.deliver(run.sent)
        except Crash:
            self.reached.add("crash")
            return
        finally:
            self.runs.pop()
        if self.broken:
            raise self.broken.pop()
        self.reached.add(ended.state)
        if run.began:
            self.compare(run, ended)
        else:
            self.compare_copy(run.sent, ended)

    def body(self, task_id: str) -> str:
        """Be told that a body was started, and say how it ends."""
        run = self.runs[-1]
        run.began = True
        try:
            self.in_body(run, task_id)
        except AssertionError as error:
            self.broken.append(error)
            raise
        return run.end

    def in_body(self, run: Run, task_id: str) -> None:
        assert run.sent.id == task_id
        assert task_id not in self.done  # I3
        assert task_id not in self.dead
        self.starts[task_id] += 1
        assert self.starts[task_id] <= MAX_DELIVERIES  # I11
        if run.meanwhile == "a relay claims it":
            self.stand.make_due()
            self.relay_stops_after_its_claim(refused=False)
        elif run.meanwhile is not None:
            self.run(Run(run.sent, run.meanwhile))

    def compare(self, run: Run, ended: Ended) -> None:
        """Say what a run has changed, which has reached its end; another one may have got there before it."""
        task_id, name = run.sent.id, run.sent.args[0]
        if run.end == "retries":
            assert ended.state == "RETRY"
        if task_id in self.done:
            # I7: it is too late, and changes nothing.
            self.reached.add("run that was overtaken")
            assert run.end == "retries" or (ended.state, ended.value) == ("SUCCESS", self.done[task_id])  # I5
        elif run.end == "returns":
            assert (ended.state, ended.value) == ("SUCCESS", f"done {name}")
            self.done[task_id] = ended.value
            self.effects.append(name)
            self.committed_sends.add(f"child of {name}")
            self.dead.discard(task_id)
        elif run.end == "retries":
            self.dead.discard(task_id)
            self.starts[task_id] = 0
        else:
            assert ended.state == "FAILURE"
            self.dead.add(task_id)

    def compare_copy(self, sent: Sent, ended: Ended) -> None:
        """Say why a delivery was not run."""
        if sent.id in self.done:
            self.reached.add("copy of a completed task")
            assert (ended.state, ended.value) == ("SUCCESS", self.done[sent.id])  # I5
            return
        assert ended.state == "FAILURE"
        if sent.id in self.dead:
            self.reached.add("copy of a dead task")
        else:
            self.reached.add("killed too often")
            assert self.starts[sent.id] == MAX_DELIVERIES  # I11
            self.dead.add(sent.id)

    @precondition(lambda self: self.idle())
    @rule()
    def revive(self) -> None:
        assert upkeep.revive(self.stand.alchemy.engine) == len(self.dead | self.refused)
        for task_id in self.dead:
            self.starts[task_id] = 0
        self.dead.clear()
        self.refused.clear()

    # --- relays and time --------------------------------------------------------------------------------------

    @precondition(lambda self: self.idle())
    @rule()
    def relay_step(self) -> None:
        self.stand.relay().step()

    @precondition(lambda self: self.idle())
    @rule()
    def leases_pass(self) -> None:
        self.stand.make_due()

    @precondition(lambda self: self.idle())
    @rule(refused=st.booleans())
    def relay_stops_after_its_claim(self, refused: bool) -> None:
        """It is killed there, or goes on some time; then the broker may refuse what it has claimed."""
        relay = self.stand.relay()
        if refused:
            relay = Relay(lambda: self.stand.alchemy.engine, cast("Any", RefusingPublisher()), WINDOW_SECONDS)
        batch = relay._claim()
        self.stopped.append((batch.claim, partial(self.publish, relay, batch, refused=refused)))

    @precondition(lambda self: self.idle())
    @rule(times=st.integers(1, 2))
    def broker_refuses_all_that_is_due(self, times: int) -> None:
        for _ in range(times):
            self.stand.make_due()
            self.relay_stops_after_its_claim(refused=True)
            self.stopped.pop()[1]()

    def publish(self, relay: Relay, batch: Any, *, refused: bool) -> None:
        own = {row.id for row in self.rows() if row.claim == batch.claim}
        relay._publish(self.stand.alchemy.engine, batch)
        for row in batch.rows:
            if refused and row.id in own and row.failures + 1 == relay_module.MAX_FAILURES:  # I11
                self.reached.add("refused too often")
                (self.dead if row.once else self.refused).add(row.id)

    @precondition(lambda self: self.idle() and self.stopped != [])
    @rule(data=st.data())
    def stopped_process_goes_on(self, data: st.DataObject) -> None:
        """I7: whatever it does now, it changes no row that is another's by then."""
        self.go_on(data.draw(st.integers(0, len(self.stopped) - 1)))

    def go_on(self, index: int) -> None:
        claim, go_on = self.stopped.pop(index)
        others = [row for row in self.rows() if row.claim != claim]

        go_on()

        assert [row for row in self.rows() if row.id in {other.id for other in others}] == others
        if any(row.claim for row in others):
            self.reached.add("row that is another's by now")

    def rows(self) -> list[Any]:
        with self.stand.database.engine.connect() as connection:
            return list(connection.execute(select(outbox).order_by(outbox.c.id)))

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        kept = self.kept()
        self.prune_oldest(data.draw(st.integers(0, len(kept))), kept)

    def kept(self) -> list[str]:
        return [task_id for task_id in self.done if task_id not in self.pruned]

    def prune_oldest(self, number: int, kept: list[str]) -> None:
        """I12: some completions are older than the window, and go; the others are not, and stay, however little is missing."""
        old = kept[:number]
        self.complete_before(WINDOW_SECONDS - 60, kept)
        self.complete_before(WINDOW_SECONDS + 1, old)

        assert upkeep.prune_all(self.stand.alchemy.engine, WINDOW_SECONDS) == len(old)
        # Beyond the window nothing is promised for a copy.
        self.pruned.update(old)

    def complete_before(self, seconds: float, task_ids: list[str]) -> None:
        with self.stand.database.engine.begin() as connection:
            connection.execute(update(outbox).where(outbox.c.id.in_(task_ids)).values(completed_at=from_now(-seconds)))

    # --- what must be true ------------------------------------------------------------------------------------

    @precondition(lambda self: self.idle())
    @invariant()
    def effects_are_those_of_committed_transactions(self) -> None:
        """I3, I9: once each, and nothing of what rolled back or crashed."""
        assert self.stand.effects() == self.effects

    @invariant()
    def nothing_is_sent_by_what_did_not_commit(self) -> None:
        """I1."""
        self.take()
        ghosts = [sent for sent in self.taken if self.sender_of(sent) not in self.committed_sends]
        assert ghosts == []

    def sender_of(self, sent: Sent) -> str:
        name = str(sent.args[0])
        return name if name.startswith("child of ") else sent.id

    @precondition(lambda self: self.idle())
    @invariant()
    def nothing_that_was_committed_is_lost(self) -> None:
        """I2, I6: it was in the broker, or it is in the outbox."""
        self.take()
        rows = self.rows()
        missing = self.committed_sends - {self.sender_of(sent) for sent in self.taken} - {row.task_id for row in rows}
        bodies = [bytes(row.body or b"").decode() for row in rows]
        assert {send for send in missing if not any(f'"{send}"' in body for body in bodies)} == set()

    @precondition(lambda self: self.idle())
    @invariant()
    def once_tasks_are_owed_completed_or_dead(self) -> None:
        """I3, I4, I11: exactly one of the three, each with the columns that belong to it; other messages are due or dead."""
        rows = self.rows()
        states = [(row.completed_at is not None, row.died_at is not None, row.due_at is not None) for row in rows]
        assert all(sum(one) == 1 for one in states)
        assert {row.id for row in rows if row.died_at is not None} == self.dead | self.refused
        assert {row.id for row in rows if row.completed_at is not None} == set(self.done) - self.pruned

    @precondition(lambda self: self.idle())
    @invariant()
    def no_connection_is_left(self) -> None:
        """I10."""
        self.stand.handed_over()
        assert self.stand.alchemy.engine.pool.checkedout() == 0  # type: ignore[attr-defined]

    def teardown(self) -> None:
        """Whatever happened, with the broker up and time passing all that was committed is sent, and done once."""
        if self.session is not None:
            self.end()
        self.revive()
        for _ in range(2):
            self.stand.make_due()
            self.relay_stops_after_its_claim(refused=False)
        while self.stopped:
            self.go_on(0)
        self.revive()
        self.stand.make_due()
        self.stand.relay_all()
        self.take()
        names = {self.sender_of(sent) for sent in self.taken}
        assert self.committed_sends - names - set(self.done) == set()
        for sent in self.candidates() * 2:
            self.run(Run(sent, "returns", meanwhile="returns"))
        kept = self.kept()
        self.prune_oldest(len(kept) // 2, kept)
        self.effects_are_those_of_committed_transactions()
        self.once_tasks_are_owed_completed_or_dead()


def make_work(stand: OutboxStand) -> None:
    """Make the once task of the machine, which says how it ends."""

    @stand.task(name="work", once=True, bind=True, max_retries=None, default_retry_delay=0, max_deliveries=MAX_DELIVERIES)
    def work(self: Any, session: Session, name: str) -> str:
        end = stand.app.conf.delivery.body(self.request.id)
        if end == "crashes":
            raise Crash
        session.add(Effect(name=name))
        stand.effect.delay_on_commit(f"child of {name}")
        session.flush()
        if end == "crashes before its commit":
            raise Crash
        if end == "raises":
            raise LookupError(name)
        if end == "retries":
            raise self.retry(countdown=0)
        return f"done {name}"
