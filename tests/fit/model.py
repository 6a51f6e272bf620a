"""The oracle: what a plan must leave in the database and send, and which callables it must run.

Written from the promises of the documentation, without a look at how they are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.fit.plans import (
    Attempt,
    Block,
    Call,
    Clash,
    Commit,
    Hear,
    Plan,
    Read,
    Release,
    Remove,
    Rollback,
    Savepoint,
    Send,
    Step,
    Write,
)

__all__ = ["Expected", "expected_of"]

#: What Celery makes of an ending that stands.
STATES = {
    "returns": "SUCCESS",
    "ignores": "IGNORED",
    "rejects": "REJECTED",
    "exits": "SystemExit",
    "retries": "RETRY",
}
OUTCOMES = {"returns": "success", "ignores": "ignore", "rejects": "reject", "retries": "retry"}


@dataclass
class Expected:
    """What must come of a plan.

    Attributes:
        rows: Tenant and name of each committed row, in the order of the commits.
        sent: The names of the tasks that were sent, in order.
        heard: The callables that ran, in order.
        state: How the last attempt ended.
        runs: How often a body was started.
        error: The name of the error where one of the library's own ended the body;
            "transient" for one that may pass.
    """

    rows: list[tuple[str | None, str]] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    state: str = ""
    runs: int = 0
    error: str | None = None


class _RefusedError(Exception):
    """The library refuses a step; its name is the error's."""


class _Session:
    """A session: its transaction, and SAVEPOINTs in it.

    Args:
        expected: Where a commit goes.
        tenant: Whose rows it writes.
    """

    def __init__(self, expected: Expected, tenant: str | None) -> None:
        self._expected = expected
        self._tenant = tenant
        self._rows: list[list[str]] = [[]]
        self._waiting: list[list[tuple[str, str]]] = [[]]
        self._ends: list[str] = []
        self.has_begun = False
        self.is_unflushed = False
        #: A statement of the transaction has written; also one that a SAVEPOINT has taken back.
        self.wrote = False

    def write(self, name: str, *, flushed: bool) -> None:
        self._rows[-1].append(name)
        self.has_begun = self.is_unflushed = True
        if flushed:
            self.flush()

    def read(self) -> None:
        self.has_begun = True
        self.flush()

    def flush(self) -> None:
        self.wrote = self.wrote or self.is_unflushed
        self.is_unflushed = False

    def send(self, name: str) -> None:
        self.has_begun = True
        self._waiting[-1].append(("sent", name))

    def hear(self, name: str, on: str) -> None:
        if on == "end":
            self._ends.append(f"end {name}")
        else:
            self.has_begun = True
            self._waiting[-1].append(("heard", f"commit {name}"))

    @property
    def waits(self) -> bool:
        return any(self._waiting)

    @property
    def has_written(self) -> bool:
        return self.wrote or self.is_unflushed

    @property
    def commit_is_final(self) -> bool:
        """A commit now would do what a second run must not do again: write, send, call what waits for it."""
        return self.has_written or self.waits

    def begin_savepoint(self) -> None:
        self.read()
        self._rows.append([])
        self._waiting.append([])

    def end_savepoint(self, *, kept: bool) -> None:
        rows, waiting = self._rows.pop(), self._waiting.pop()
        if kept:
            self.flush()
            self._rows[-1] += rows
            self._waiting[-1] += waiting
        else:
            self.is_unflushed = False

    def commit(self) -> None:
        while len(self._rows) > 1:
            self.end_savepoint(kept=True)
        self._expected.rows += [(self._tenant, name) for name in self._rows[0]]
        for kind, name in self._waiting[0]:
            (self._expected.sent if kind == "sent" else self._expected.heard).append(name)
        self.end()

    def end(self) -> None:
        """End the transaction; without a commit nothing of it stays."""
        self._rows, self._waiting = [[]], [[]]
        self.has_begun = self.wrote = self.is_unflushed = False
        ends, self._ends = self._ends, []
        self._expected.heard += ends


class _Run:
    """One run of the body."""

    def __init__(self, plan: Plan, expected: Expected) -> None:
        self._plan = plan
        self._expected = expected
        self.session = _Session(expected, plan.tenant)
        #: The body has committed writes by itself.
        self.is_final = False

    def steps(self, steps: tuple[Step, ...], prefix: str) -> None:
        for index, step in enumerate(steps):
            self._step(step, f"{prefix}.{index}")

    def _step(self, step: Step, name: str) -> None:
        session = self.session
        if isinstance(step, Write):
            session.write(name, flushed=step.flushed)
        elif isinstance(step, Read):
            session.read()
        elif isinstance(step, Send):
            self._send(name, step.by)
        elif isinstance(step, Hear):
            session.hear(name, step.on)
        elif isinstance(step, Savepoint):
            session.begin_savepoint()
            self.steps(step.steps, name)
            session.end_savepoint(kept=step.ending == "released")
        elif isinstance(step, Clash):
            session.begin_savepoint()
            session.write("never", flushed=True)
            session.end_savepoint(kept=False)
        elif isinstance(step, (Block, Call)):
            self._others(step, name)
        else:
            self._end_transaction(step)

    def _send(self, name: str, by: str) -> None:
        # The applications with an outbox defer plain sends from transactions that have written.
        if by == "delay" and not (self._plan.outbox and self.session.has_written):
            self._expected.sent.append(name)
        else:
            self.session.send(name)

    def _end_transaction(self, step: Commit | Rollback | Release | Remove) -> None:
        session = self.session
        if isinstance(step, Remove):
            session.end()
            return
        if not session.has_begun and not isinstance(step, Commit):
            return
        if isinstance(step, Rollback):
            session.end()
            return
        has_work = session.has_written or session.waits
        if isinstance(step, Release) and not step.commit and has_work:
            raise _RefusedError("UncommittedChangesError")
        if self._plan.once and has_work:
            raise _RefusedError("OnceCommitError")
        self.is_final = self.is_final or session.commit_is_final
        session.commit()

    def _others(self, step: Block | Call, name: str) -> None:
        if isinstance(step, Call) and step.how == "lend":
            _work(self.session, name)
            return
        # Blocks have no task and no tenant; a task that is called has both.
        other = _Session(self._expected, self._plan.tenant if isinstance(step, Call) else None)
        _work(other, name)
        if step.kept:
            other.commit()
            self.is_final = True
        else:
            other.end()


def _work(session: _Session, name: str) -> None:
    session.write(f"{name}.row", flushed=True)
    session.send(f"{name}.sent")
    session.hear(name, "commit")
    session.hear(name, "end")


def expected_of(plan: Plan) -> Expected:
    """Say what must come of a plan."""
    expected = Expected()
    for number, attempt in enumerate(plan.attempts):
        _attempt(plan, expected, attempt, number)
        if expected.state != "RETRY":
            break
    if plan.records and expected.state == "FAILURE":
        expected.rows.append((plan.tenant, "failed"))
    if plan.within:
        expected.rows.append((None, "outer"))
        expected.sent.append("outer")
    return expected


def _attempt(plan: Plan, expected: Expected, attempt: Attempt, number: int) -> None:
    """Run one attempt, again and again while it fails with what may pass."""
    left = plan.transient_retries
    while True:
        fails = expected.runs < plan.failures
        expected.runs += 1
        run = _Run(plan, expected)
        try:
            run.steps(attempt.steps, f"{number}")
        except _RefusedError as refused:
            run.session.end()
            expected.state, expected.error = "FAILURE", str(refused)
            return
        if not fails:
            _end(plan, expected, run.session, attempt, number)
            return
        run.session.end()
        if not left or run.is_final:
            expected.state, expected.error = "FAILURE", "transient"
            return
        left -= 1


def _end(plan: Plan, expected: Expected, session: _Session, attempt: Attempt, number: int) -> None:
    if attempt.in_savepoint:
        session.begin_savepoint()
        session.write(f"{number}.inside", flushed=False)
        session.send(f"{number}.inside")
    expected.state = STATES.get(attempt.ending, "FAILURE")
    if OUTCOMES.get(attempt.ending) in plan.commit_on:
        session.commit()
    else:
        session.end()
