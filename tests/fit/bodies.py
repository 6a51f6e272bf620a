"""Tasks that carry out plans: one interpreter for plain and for async sessions.

It is a coroutine in both cases; under a plain session nothing in it ever waits.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import SessionTask, enqueue, on_commit, on_end, released
from tests.fit.forms import Application, Mark
from tests.fit.plans import (
    Block,
    Call,
    Clash,
    Commit,
    Ending,
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
from tests.stand import task_of

__all__ = ["send", "task_for"]

Steps = tuple[Step, ...]
T = TypeVar("T")

#: What a server says of a deadlock or a serialization failure: the statement that has it say so.
_FAILING = {
    "postgresql": "DO $$ BEGIN RAISE EXCEPTION 'no luck' USING ERRCODE = '40001'; END $$",
    "mysql": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213",
    "mariadb": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213",
}


def task_for(application: Application, plan: Plan) -> Any:
    """Return the task that carries a plan out; it is used again, as those of applications are."""
    options: dict[str, Any] = {
        "commit_on": plan.commit_on,
        "transient_retries": plan.transient_retries,
        **({"record_failure": _record} if plan.records else {}),
    }
    key = (plan.is_async, plan.shape, plan.once, *options.items())
    if plan.once:
        options["once"] = True if plan.once == "id" else _key
    if key not in application.tasks:
        options.update(_base(application), bind=True, name=f"work {key}")
        application.tasks[key] = task_of(application.app, **options)(_body(application, plan))
    return application.tasks[key]


def _record(session: Session, exc: BaseException) -> None:
    session.add(Mark(name="failed"))


def _key() -> str:
    return "the only one"


def _base(application: Application) -> dict[str, Any]:
    """Return the options of a task whose class brings its own sessions, and what is around them."""
    if application.factory is None:
        return {}
    members = {"abstract": True, "session_factory": application.factory}
    return {"base": type("OwnTask", (SessionTask,), members), "around": application.around}


def _body(application: Application, plan: Plan) -> Any:
    shape = plan.shape

    def session_of(task: Any) -> Any:
        return task.session if shape == "attribute" else application.registry

    async def works_async(self: Any, session: AsyncSession) -> str:
        return await _perform(application, self, _AsyncHand(session))

    async def works_async_alone(self: Any) -> str:
        return await _perform(application, self, _AsyncHand(session_of(self)))

    def works(self: Any, session: Session) -> str:
        return _drive(_perform(application, self, _Hand(session)))

    def works_alone(self: Any) -> str:
        return _drive(_perform(application, self, _Hand(session_of(self))))

    if plan.is_async:
        return works_async if shape == "parameter" else works_async_alone
    return works if shape == "parameter" else works_alone


def _drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        value: T = ended.value
        return value
    raise AssertionError("the body of a plain task has waited for something")


# --- the two kinds of sessions ------------------------------------------------------------------


class _Hand:
    """A plain session, or a registry of such, under the names of an AsyncSession."""

    is_async = False

    def __init__(self, session: Any) -> None:
        self.session = session

    @property
    def sync_session(self) -> Session:
        """The Session itself."""
        session: Session = self.session if isinstance(self.session, Session) else self.session()
        return session

    async def done(self, value: Any) -> Any:
        """Wait for what a method of the session has returned, where there is something to."""
        return value

    async def in_sync(self, work: Callable[[Session], None]) -> None:
        """Do something with the Session itself."""
        work(self.sync_session)

    @asynccontextmanager
    async def nested(self) -> AsyncIterator[None]:
        """Be in a SAVEPOINT."""
        with self.session.begin_nested():
            yield

    async def release(self, *, commit: bool) -> None:
        with released(self.session, commit=commit):
            pass

    async def block(self, application: Application, name: str, *, kept: bool) -> None:
        with application.alchemy.begin() as session:
            await _work(application, _Hand(session), name)
            if not kept:
                raise LookupError


class _AsyncHand(_Hand):
    is_async = True

    @property
    def sync_session(self) -> Session:
        session = self.session if isinstance(self.session, AsyncSession) else self.session()
        sync: Session = session.sync_session
        return sync

    async def done(self, value: Any) -> Any:
        return await value

    async def in_sync(self, work: Callable[[Session], None]) -> None:
        session = self.session if isinstance(self.session, AsyncSession) else self.session()
        await session.run_sync(work)

    @asynccontextmanager
    async def nested(self) -> AsyncIterator[None]:
        async with self.session.begin_nested():
            yield

    async def release(self, *, commit: bool) -> None:
        async with released(self.session, commit=commit):
            pass

    async def block(self, application: Application, name: str, *, kept: bool) -> None:
        async with application.alchemy.async_session() as session:
            await _work(application, _AsyncHand(session), name)
            if not kept:
                raise LookupError
            await session.commit()


# --- the interpreter ----------------------------------------------------------------------------


async def _perform(application: Application, task: Any, hand: _Hand) -> str:
    """Carry out the attempt that this request is, and end as it says."""
    plan, number = application.plan, task.request.retries
    attempt = plan.attempts[number]
    fails = application.runs < plan.failures
    application.runs += 1
    if plan.shape == "registry":
        assert task.session is application.registry()
    application.sessions.append(hand.sync_session)
    await _steps(application, hand, attempt.steps, f"{number}")
    if attempt.in_savepoint:
        await hand.done(hand.session.begin_nested())
        hand.session.add(Mark(name=f"{number}.inside"))
        send(application, hand.session, f"{number}.inside", by="task")
    if fails:
        await _fail(hand, plan, attempt.ending)
    else:
        await _end(task, hand, plan, attempt.ending)
    return f"done {number}"


async def _fail(hand: _Hand, plan: Plan, ending: Ending) -> None:
    """Fail with what may pass, now or in the commit."""

    def lose(session: Session) -> None:
        statement = _FAILING.get(session.get_bind().dialect.name)
        if statement is None:
            raise OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))
        session.execute(text(statement))

    at_commit = plan.fails_at == "commit" and "success" in plan.commit_on
    if at_commit and ending == "returns":
        hand.session.add(Mark(name="in vain"))
        event.listen(hand.sync_session, "before_commit", lose)
    else:
        await hand.in_sync(lose)


async def _end(task: Any, hand: _Hand, plan: Plan, ending: Ending) -> None:
    if ending == "duplicate":
        hand.session.add_all([Mark(name="never", slot="one"), Mark(name="never", slot="one")])
        if "success" not in plan.commit_on:
            await hand.done(hand.session.flush())
    elif ending == "retries":
        raise task.retry(countdown=0)
    elif ending != "returns":
        raise {
            "raises": LookupError,
            "ignores": Ignore,
            "rejects": Reject,
            "soft limit": SoftTimeLimitExceeded,
            "exits": SystemExit,
        }[ending]


async def _steps(application: Application, hand: _Hand, steps: Steps, prefix: str) -> None:
    for index, step in enumerate(steps):
        await _step(application, hand, step, f"{prefix}.{index}")


async def _step(application: Application, hand: _Hand, step: Step, name: str) -> None:
    session = hand.session
    if isinstance(step, Send):
        send(application, session, name, by=step.by)
    elif isinstance(step, Hear):
        _hear(application, session, name, step.on)
    elif isinstance(step, Savepoint):
        await _savepoint(application, hand, step, name)
    elif isinstance(step, (Block, Call)):
        await _others(application, hand, step, name)
    elif isinstance(step, Clash):
        await _clash(hand)
    else:
        await _use(hand, step, name)


async def _use(hand: _Hand, step: Step, name: str) -> None:
    """Do what is one call of the session."""
    session = hand.session
    if isinstance(step, Write):
        session.add(Mark(name=name))
        if step.flushed:
            await hand.done(session.flush())
    elif isinstance(step, Read):
        await hand.done(session.execute(select(func.count()).select_from(Mark)))
    elif isinstance(step, Release):
        await hand.release(commit=step.commit)
    else:
        calls = {Commit: "commit", Rollback: "rollback", Remove: "remove"}
        await hand.done(getattr(session, calls[type(step)])())


async def _savepoint(application: Application, hand: _Hand, step: Savepoint, name: str) -> None:
    if step.ending == "raised":
        with suppress(LookupError):
            async with hand.nested():
                await _steps(application, hand, step.steps, name)
                raise LookupError
        return
    savepoint = await hand.done(hand.session.begin_nested())
    await _steps(application, hand, step.steps, name)
    await hand.done(savepoint.commit() if step.ending == "released" else savepoint.rollback())


async def _clash(hand: _Hand) -> None:
    with suppress(IntegrityError):
        async with hand.nested():
            hand.session.add_all([Mark(name="never", slot="one"), Mark(name="never", slot="one")])
            await hand.done(hand.session.flush())


async def _others(application: Application, hand: _Hand, step: Block | Call, name: str) -> None:
    try:
        if isinstance(step, Block):
            await hand.block(application, name, kept=step.kept)
        else:
            await _run_inner(application, hand, step, name)
    except LookupError:
        assert not step.kept


async def _run_inner(application: Application, hand: _Hand, step: Call, name: str) -> None:
    inner = _inner(application, is_async=hand.is_async)
    if step.how == "apply":
        inner.apply(args=[name], kwargs={"kept": step.kept}).get()
        return
    lent = {"session": hand.session} if step.how == "lend" else {}
    await hand.done(inner(name, kept=step.kept, **lent))


def send(application: Application, session: Any, name: str, *, by: str) -> None:
    """Send a task whose name says from where."""
    note = _note(application)
    if by == "delay":
        note.delay(name)
    elif by == "task":
        note.delay_on_commit(name)
    else:
        enqueue(session, note.s(name))


def _hear(application: Application, session: Any, name: str, on: str) -> None:
    listen = on_commit if on == "commit" else on_end
    listen(session, lambda: application.heard.append(f"{on} {name}"))


async def _work(application: Application, hand: _Hand, name: str) -> None:
    """Do what blocks and inner tasks do."""
    application.sessions.append(hand.sync_session)
    hand.session.add(Mark(name=f"{name}.row"))
    await hand.done(hand.session.flush())
    send(application, hand.session, f"{name}.sent", by="task")
    _hear(application, hand.session, name, "commit")
    _hear(application, hand.session, name, "end")


# --- the other tasks ----------------------------------------------------------------------------


def _note(application: Application) -> Any:
    if "note" not in application.tasks:
        application.tasks["note"] = task_of(application.app, name="note")(_nothing)
    return application.tasks["note"]


def _nothing(name: str) -> None:
    """Be sent."""


def _inner(application: Application, *, is_async: bool) -> Any:
    """Return the task that bodies call."""
    key = ("inner", is_async)

    async def inner_async(session: AsyncSession, name: str, *, kept: bool) -> None:
        await _work(application, _AsyncHand(session), name)
        if not kept:
            raise LookupError

    def inner(session: Session, name: str, *, kept: bool) -> None:
        _drive(_work(application, _Hand(session), name))
        if not kept:
            raise LookupError

    if key not in application.tasks:
        made = task_of(application.app, name=f"inner {is_async}", **_base(application))
        application.tasks[key] = made(inner_async if is_async else inner)
    return application.tasks[key]
