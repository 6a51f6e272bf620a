"""Notices when a process reaches a point, and lets die what is to die there.

Wraps SQLAlchemy's statements and commits, the publisher's one send, the worker's acknowledgement and the storing of results; the
library has no hook for it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import amqp
from celery import Celery
from celery._state import get_current_task
from celery.worker.request import Request
from kombu.exceptions import OperationalError
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.pool import NullPool

from celery_alchemy.broker import taking
from celery_alchemy.broker.claims import Claim, Delivery
from celery_alchemy.broker.tables import BrokerTables
from celery_alchemy.databases import LoneStatement
from celery_alchemy.databases.tables import moved
from celery_alchemy.messages import batches as pipeline
from celery_alchemy.messages import publisher
from celery_alchemy.outbox import lone_statement, outbox, relay, settlement, step_records
from celery_alchemy.outbox.prepared import prepared
from celery_alchemy.requests import once_statements as completion
from tests.crash.points import Fault

#: Folder in which every fault that struck leaves a file; it strikes no second time.
STRUCK_VARIABLE = "CELERY_ALCHEMY_TEST_STRUCK"
#: The file in that folder that has the broker wiped before the next worker starts.
WIPE = "wipe"
BROKER_DOWN_SECONDS = 1.0

_STATEMENTS: list[tuple[Any, str]] = [
    (outbox._INSERT, "insert"),
    (settlement._DELETE_SENT, "settle"),
    (settlement._KEEP_OWED, "settle"),
    (completion.DIE, "die"),
    (step_records._LOAD, "load"),
    (step_records._FORGET, "forget"),
]

#: Those that are sent as they were made once.
_PREPARED: dict[Any, str] = {
    completion.COMPLETE: "complete",
    completion.COMPLETE_AND_KEEP: "complete",
    completion.COMPLETE_UNSEEN: "complete",
    completion.COMPLETE_UNSEEN_AND_KEEP: "complete",
    outbox._INSERT: "insert",
    step_records._INSERT: "keep",
}


class Injection:
    """The one fault of a forked process, or those of the tasks that a worker runs.

    Args:
        url: The database whose connections are cut.
        folder: Where faults that struck leave a file.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.fault: Fault | None = None
        self._url = url
        self._folder = folder
        self._broker_down_until = 0.0
        self._local = threading.local()
        self._of_coroutine: ContextVar[Fault | None] = ContextVar("fault", default=None)
        self._of_claims: dict[str, Fault] = {}
        self._of_ends: dict[str, Fault] = {}

    # --- where ---------------------------------------------------------------------------------------------------------------

    def install(self, app: Celery) -> None:
        """Wrap everything that is to be noticed."""
        event.listen(Engine, "before_cursor_execute", self._before_statement)
        event.listen(Engine, "after_cursor_execute", self._after_statement)
        self._wrap(DefaultDialect, "do_commit", self._around_commit)
        self._wrap(lone_statement, "_execute", self._around_lone_statement)
        self._wrap(relay, "claim_due", self._around_claim)
        self._wrap(outbox.Outbox, "hand_over", self._around_hand_over)
        self._wrap(outbox, "deliver", self._around_deliver)
        self._wrap(publisher, "send", self._around_send)
        self._wrap(publisher, "confirmed_together", self._around_send)
        self._wrap(pipeline._ConfirmingChannel, "_flush", self._around_amqp_publish)
        self._wrap(amqp.Channel, "_basic_publish", self._around_amqp_publish)
        self._wrap(taking, "take", self._around_take)
        self._wrap(taking, "acknowledge", self._around_end)
        self._wrap(Request, "acknowledge", self._around_acknowledge)
        self._wrap(app.backend, "mark_as_done", self._around_result)

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(lambda: original(*args, **kwargs), *args)

        setattr(owner, name, wrapper)

    def _before_statement(self, connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        what = _name_of(more[1])
        if what is not None:
            self._local.last = what
            self.reach(f"{what}, before", connection.connection)

    def _after_statement(self, connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        what = _name_of(more[1])
        if what is not None:
            self.reach(f"{what}, after", connection.connection)

    def _around_commit(self, commit: Callable[[], None], dialect: Any, dbapi_connection: Any) -> None:
        what = getattr(self._local, "last", None)
        self._local.last = None
        if what is None:
            commit()
            return
        self.reach(f"{what}'s COMMIT, before", dbapi_connection)
        commit()
        self.reach(f"{what}'s COMMIT, after", dbapi_connection)

    def _around_lone_statement(
        self, execute: Callable[[], Any], connection: Any, dialect: Dialect, statement: LoneStatement, parameters: Any
    ) -> Any:
        """Reach the points of a start, which is its own COMMIT."""
        if statement is not moved(completion.START, dialect.default_schema_name):
            return execute()
        for moment in ("start", "start's COMMIT"):
            self.reach(f"{moment}, before", connection)
        answer = execute()
        for moment in ("start", "start's COMMIT"):
            self.reach(f"{moment}, after", connection)
        return answer

    def _around_claim(self, claim: Callable[[], Any], table: Any, *args: Any) -> Any:
        connection = table.connection
        self.reach("claim, before", connection.connection)
        rows = claim()
        self._local.last = "claim"
        self.reach("claim, after", connection.connection)
        return rows

    def _around_hand_over(self, hand_over: Callable[[], None], outbox: Any, rows: Any, claim: str) -> None:
        task = get_current_task()
        fault = None if task is None else _fault_of(task.request.kwargs)
        if fault is not None:
            # What follows the commit happens in another thread, which knows of no task.
            self._of_claims[claim] = fault
        hand_over()

    def _around_deliver(self, deliver: Callable[[], bool], group: Any, *args: Any) -> bool:
        faults = [self._of_claims.pop(one.claim, None) for one in group]
        self._local.fault = next((fault for fault in faults if fault is not None), None)
        try:
            return deliver()
        finally:
            self._local.fault = None

    def _around_send(self, send: Callable[[], Any], *args: Any) -> Any:
        self.reach("publish, before")
        self._refuse_if_down()
        self._local.sends = True
        sent = send()
        self._local.sends = False
        if sent != set():
            self.reach("publish, after")
            self._refuse_if_down()
        return sent

    def _around_amqp_publish(self, publish: Callable[[], Any], *args: Any) -> Any:
        published = publish()
        if getattr(self._local, "sends", False):
            self.reach("confirm, before")
        return published

    def _around_acknowledge(self, acknowledge: Callable[[], None], request: Any) -> None:
        fault = _fault_of(request.kwargs)
        if fault is not None and not request.acknowledged:
            self._reach_with(fault, "parent: acknowledge, before")
            # What takes the messages ends the delivery later, if the database is the broker.
            self._of_ends[request.id] = fault
        acknowledge()
        if fault is not None:
            self._reach_with(fault, "parent: acknowledge, after")

    def _around_take(self, take: Callable[[], list[Delivery]], tables: BrokerTables, *args: Any) -> list[Delivery]:
        taken = take()
        faults = [_fault_of(json.loads(delivery.payload["body"])[1]) for delivery in taken]
        self._of_round("take", tables, next((fault for fault in faults if fault is not None), None))
        return taken

    def _around_end(self, end: Callable[[], None], tables: BrokerTables, worker: str, claims: Sequence[Claim]) -> None:
        faults = [self._of_ends.pop(claim.row_id, None) for claim in claims]
        fault = next((fault for fault in faults if fault is not None), None)
        if fault is not None:
            self._reach_with(fault, "taker: end, before", tables.connection.connection)
        end()
        self._of_round("end", tables, fault)

    def _of_round(self, what: str, tables: BrokerTables, fault: Fault | None) -> None:
        """Note what the round's COMMIT is about, and reach the point before it."""
        if fault is not None and fault.point.startswith(f"taker: {what}"):
            self._local.fault, self._local.last = fault, what
            self.reach(f"{what}, after", tables.connection.connection)

    def _around_result(self, mark: Callable[[], None], *args: Any) -> None:
        self.reach("result, before")
        mark()
        self.reach("result, after")

    def of_coroutine(self, given: Sequence[str] | None) -> None:
        """Note the fault of the ``async def`` task that runs: Celery's current task is not known in SQLAlchemy's greenlets."""
        self._of_coroutine.set(_fault_of({"fault": given}))

    # --- what ----------------------------------------------------------------------------------------------------------------

    def reach(self, what: str, dbapi_connection: Any = None) -> None:
        """Say that this process is at a point."""
        if self.fault is not None:
            self._reach_with(self.fault, f"{self.fault.point.split(':')[0]}: {what}", dbapi_connection)
        elif (fault := self._of_coroutine.get()) is not None:
            self._reach_with(fault, f"coroutine: {what}", dbapi_connection)
        elif (task := get_current_task()) is not None:
            fault = _fault_of(task.request.kwargs)
            if fault is not None:
                self._reach_with(fault, f"child: {what}", dbapi_connection)
        elif getattr(self._local, "fault", None) is not None:
            who = "taker" if self._local.fault.point.startswith("taker") else "child"
            self._reach_with(self._local.fault, f"{who}: {what}", dbapi_connection)

    def _reach_with(self, fault: Fault, point: str, dbapi_connection: Any = None) -> None:
        if point == fault.point and self._is_first(fault):
            self._act(fault, dbapi_connection)

    def _is_first(self, fault: Fault) -> bool:
        try:
            os.close(os.open(self._folder / fault.slug, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _act(self, fault: Fault, dbapi_connection: Any) -> None:
        action = fault.action
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action in ("kill worker", "wipe"):
            if action == "wipe":
                (self._folder / WIPE).touch()
            parent = os.getppid()
            os.kill(parent, signal.SIGKILL)
            while os.getppid() == parent:
                time.sleep(0.01)
        elif action == "broker":
            self._broker_down_until = time.monotonic() + BROKER_DOWN_SECONDS
        elif fault.point.endswith("COMMIT, after"):
            _lose_answer(dbapi_connection)
        else:
            _cut(self._url, _driver_connection(dbapi_connection))

    def _refuse_if_down(self) -> None:
        if time.monotonic() < self._broker_down_until:
            raise OperationalError("the broker is down")


def _name_of(context: Any) -> str | None:
    compiled = getattr(context, "compiled", None)
    schema = context.dialect.default_schema_name
    if compiled is None:
        texts = (prepared(moved(own, schema), context.dialect).text for own in _PREPARED)
        return next((name for text, name in zip(texts, _PREPARED.values(), strict=True) if context.statement == text), None)
    names = (name for own, name in _STATEMENTS if moved(own, schema) is compiled.statement)
    return next(names, None)


def _fault_of(kwargs: Any) -> Fault | None:
    given = (kwargs or {}).get("fault")
    return Fault(*given) if given else None


def _driver_connection(dbapi_connection: Any) -> Any:
    """Return what the driver knows, of what SQLAlchemy's pool hands out."""
    return getattr(dbapi_connection, "driver_connection", dbapi_connection)


def _cut(url: str, connection: Any) -> None:
    """Have the server cut a connection, through another one."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as other:
        if engine.dialect.name == "postgresql":
            other.exec_driver_sql(f"SELECT pg_terminate_backend({connection.info.backend_pid})")
        else:
            other.exec_driver_sql(f"KILL {connection.thread_id()}")


def _lose_answer(dbapi_connection: Any) -> None:
    """Break a connection and have the driver notice, as if it had waited for the answer to COMMIT.

    Raises:
        Exception: The driver's own error for a connection that was closed.
    """
    with socket.socket(fileno=os.dup(_socket_number(_driver_connection(dbapi_connection)))) as twin:
        twin.shutdown(socket.SHUT_RDWR)
    dbapi_connection.cursor().execute("SELECT 1")


def _socket_number(connection: Any) -> int:
    if hasattr(connection, "fileno"):
        return int(connection.fileno())
    # PyMySQL has a socket, asyncmy a transport.
    own = getattr(connection, "_sock", None) or connection._transport.get_extra_info("socket")
    return int(own.fileno())
