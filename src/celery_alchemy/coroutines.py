"""Running the body of an ``async def`` task: a coroutine in the process's event loop, in one unit of work.

Beside ``body.py``: the unit of work is the same; only the body is awaited, and the sync half of its AsyncSession is worked in a
greenlet, where SQLAlchemy lets sync code use an async driver.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any, cast

from celery.app.task import Context
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from .arguments import Arguments, Keywords, is_named, load_entities
from .body import MAX_OVERTAKEN, end_failed, fail_once, is_delivery_of_once, key_of_call, report
from .completion import State
from .errors import DeadTaskError
from .failure import failed_for_good, record_if_final
from .injection import Injection
from .loop import process_loop
from .once import OnceUnit
from .owed import Overtaken, error_text, record_death
from .request import UnitOfWork, at_hand, refuse_entities
from .reruns import runs_of, transient_runs, with_transient_retries

__all__ = ["AsyncTask", "in_async_unit_of_work"]


class AsyncTask:
    """What a unit of work asks of its task, answered for a request that runs in the event loop.

    The request is kept here, because Celery's request stack belongs to the thread that waits outside of the loop.
    """

    def __init__(self, task: Any, request: Context) -> None:
        #: The task itself.
        self.of = task
        self.request = request
        self.name: str = task.name
        self.async_session: AsyncSession | None = None
        #: Records a failure when the coroutine has ended, which must not wait for a synchronous session.
        self.record_later: Callable[[], State | None] | None = None

    def fail_for_good(
        self, unit: OnceUnit, exc: BaseException, args: Arguments, kwargs: Keywords, reason: str | None = None
    ) -> State | None:
        """Record that a ``once`` task has failed for good, now or, with a ``record_failure``, when the coroutine has ended."""
        if self.of.failure_record() is None:
            return record_death(self, unit.key, reason or error_text(exc), unit.in_own_session)
        self.record_later = functools.partial(failed_for_good, self, unit.key, exc, args, kwargs, reason=reason)
        return None

    def session_of(self, unit: UnitOfWork) -> AsyncSession:
        """Return the AsyncSession of the request, made at the first use."""
        session = self.async_session
        if session is None:
            made: AsyncSession = self._source().session(unit)
            session = self.async_session = made
            unit.use(made.sync_session)
        return session

    def other_session_of(self, unit: UnitOfWork, database: str) -> AsyncSession:
        """Return the AsyncSession of another of the app's databases, made at the first use."""
        other = unit.other(database)
        source = self.of.of_asked_class(other.task.home().async_source, database)
        made: AsyncSession = source.session(other)
        other.use(made.sync_session)
        return made

    def open_session(self, unit: UnitOfWork, *, deferred: bool = False) -> Session:
        """Return the sync half of a new AsyncSession; the first one is the request's."""
        if self.async_session is None:
            return self.session_of(unit).sync_session
        session: Session = self._source().session(unit).sync_session
        return session

    def _source(self) -> Any:
        return self.of.of_asked_class(self.of.home().async_source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)


def in_async_unit_of_work(task: Any, body: Callable[..., Coroutine[Any, Any, Any]], injection: Injection) -> Callable[..., Any]:
    """Wrap a coroutine function so that Celery can call it and each call is one unit of work."""
    is_annotated = any(parameter.database is not None for parameter in injection.parameters)

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        request = task.request
        if is_annotated:
            task.refuse_spanning()
        make = functools.partial(_Call, task, request, body, injection, args, kwargs)
        if request.called_directly and not request.is_eager and _in_a_loop():
            return _awaited(task, request, make)
        if task.transient_retries and runs_of(request) is None:
            return with_transient_retries(task, run, args, kwargs)
        call = make()
        try:
            return process_loop.run(call.run, call.interrupt)
        except Exception as exc:  # noqa: BLE001 - raised again by fail().
            return call.fail(exc)
        finally:
            call.finish()

    # Celery, and inspect.iscoroutinefunction(), must see the function that it is: wraps() would pass on the mark of a coroutine.
    run.__signature__ = injection.signature  # type: ignore[attr-defined]
    return run


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _awaited(task: Any, request: Context, make: Callable[..., _Call]) -> Any:
    """Run a task that a coroutine awaits: in the coroutine's own loop, with that loop's engine."""
    with transient_runs(task, request) as runs:
        while True:
            call = make(is_awaited=True)
            try:
                return await call.run()
            except Exception as exc:  # noqa: BLE001 - raised again by fail().
                wait = runs.seconds_until_next(exc)
                if wait is None:
                    return await asyncio.to_thread(call.fail, exc)
            finally:
                await asyncio.to_thread(call.finish)
            await asyncio.sleep(wait)


class _Call:
    """One request: what is called, with what, and what is left to do when the coroutine has ended."""

    def __init__(
        self,
        task: Any,
        request: Context,
        body: Callable[..., Coroutine[Any, Any, Any]],
        injection: Injection,
        args: Arguments,
        kwargs: dict[str, Any],
        *,
        is_awaited: bool = False,
    ) -> None:
        self.asked = AsyncTask(task, request)
        self._interrupted_by: BaseException | None = None
        self._is_awaited = is_awaited
        self._body = body
        self._injection = injection
        self._args = args
        self._kwargs = kwargs
        self._units: list[UnitOfWork] = []
        once = is_delivery_of_once(task, request, injection, kwargs)
        self._key = key_of_call(task, args, kwargs) if once else None

    async def run(self) -> Any:
        """Run the body in a unit of work."""
        outer = at_hand.get()
        try:
            if self._key is None:
                return await self._attempt(outer)
            for _ in range(MAX_OVERTAKEN):
                self.asked.async_session = None
                try:
                    return await self._attempt_once(outer, self._key)
                except Overtaken:
                    continue
            raise Overtaken(self._key)
        finally:
            at_hand.set(outer)

    def interrupt(self, exc: BaseException) -> None:
        """Take note of what is about to cancel the coroutine: a soft time limit, or the end of the process."""
        self._interrupted_by = exc

    def fail(self, exc: Exception) -> Any:
        """Record a failure that is final, and raise it; return a result if its work turns out to have been committed.

        Outside of the loop, which must not wait for a synchronous driver.
        """
        if self._key is None:
            record_if_final(self.asked, exc, self._args, self._kwargs)
        elif self.asked.record_later is not None:
            state = self.asked.record_later()
            if state is not None and (state.ending == "returned" or isinstance(exc, DeadTaskError)):
                return cast("OnceUnit", self._units[-1]).replay(state)
        raise exc

    def finish(self) -> None:
        """Send what waited for the end of the transaction; outside of the loop, which must not wait for a broker."""
        for unit in self._units:
            unit.send_unsent()

    def _begin(self, unit: UnitOfWork) -> None:
        unit.sends_elsewhere = True
        self._units.append(unit)
        at_hand.set(unit)

    async def _attempt(self, outer: Any) -> Any:
        unit = UnitOfWork(cast("Any", self.asked), outer)
        self._begin(unit)
        try:
            result = await self._await_body(unit)
            await greenlet_spawn(unit.succeed)
        except BaseException as exc:
            ending = self._ending(exc)
            await greenlet_spawn(end_failed, unit, ending)
            if ending is exc:
                raise
            raise ending from exc
        return result

    def _ending(self, exc: BaseException) -> BaseException:
        """Return what the task ends with: for a cancelled coroutine, what cancelled it.

        A CancelledError of the body's own, such as that of a task which it awaits, is no Exception: Celery would take it for the
        end of the worker.
        """
        if not isinstance(exc, asyncio.CancelledError):
            return exc
        if self._interrupted_by is not None:
            return self._interrupted_by
        return exc if self._is_awaited else CancelledError(f"{self.asked.name} was cancelled: {exc}")

    async def _attempt_once(self, outer: Any, key: str) -> Any:
        unit = OnceUnit(self.asked, outer, key)
        self._begin(unit)
        try:
            state = await greenlet_spawn(unit.start)
            if state.kind in ("completed", "dead"):
                return await greenlet_spawn(report, self.asked, unit, state, self._args, self._kwargs)
            try:
                result = await self._await_body(unit)
                return unit.replay(await greenlet_spawn(unit.succeed_with, "returned", result))
            except Overtaken:
                raise
            except BaseException as exc:  # noqa: BLE001 - every error must be seen here.
                return await greenlet_spawn(fail_once, self.asked, unit, self._ending(exc), self._args, self._kwargs)
        finally:
            await greenlet_spawn(unit.fail, Overtaken())

    async def _await_body(self, unit: UnitOfWork) -> Any:
        injection, args, kwargs = self._injection, self._args, dict(self._kwargs)
        named = is_named(unit, injection)
        own = {parameter.name: kwargs.pop(parameter.name, None) for parameter in injection.parameters}
        sessions = {
            parameter.name: self._session_for(unit, parameter.database if named else None, own[parameter.name])
            for parameter in injection.parameters
        }
        if injection.entities:
            self.asked.session_of(unit)
            args, loaded = await greenlet_spawn(load_entities, unit, injection, args, kwargs)
            kwargs = dict(loaded)
        args, kwargs = injection.fill(args, kwargs, sessions)
        result = await self._body(*args, **kwargs)
        refuse_entities(result, unit.owner)
        return result

    def _session_for(self, unit: UnitOfWork, database: str | None, own: AsyncSession | None) -> AsyncSession:
        """Return the session for a parameter: the caller's own, or one that is made now."""
        if own is None:
            return self.asked.session_of(unit) if database is None else self.asked.other_session_of(unit, database)
        if database is None:
            self.asked.async_session = own
            unit.borrow(own.sync_session)
        else:
            unit.borrow_other(database, own.sync_session)
        return own
