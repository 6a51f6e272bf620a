"""Delivering a message as a worker does, in this process.

It is Celery's own Request and tracer, with a pool that runs the task here.

Between the captured messages and the task.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, cast

from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.app.trace import build_tracer
from celery.concurrency.base import BasePool
from celery.exceptions import TaskRevokedError
from celery.utils.imports import symbol_by_name
from celery.utils.nodenames import gethostname
from celery.worker.request import Request
from kombu.message import Message as KombuMessage
from kombu.serialization import loads, prepare_accept_content

from ..messages.celery_types import AnyTask, App, Fields
from ..messages.message import Message
from ..worker.record_threads import record_threads
from .faults import Crash

__all__ = ["Delivery", "RunState", "deliver"]

#: How a delivery ended: as Celery's states, or ``"LOST"``: the process that ran it was killed.
RunState = Literal["SUCCESS", "FAILURE", "RETRY", "IGNORED", "REJECTED", "REVOKED", "LOST"]


@dataclass(slots=True)
class Delivery:
    """How one delivery of a message ended.

    Attributes:
        state: How the task ended.
        result: What it returned or raised.
        requeued: The broker delivers the message again.
    """

    state: RunState = "LOST"
    result: Any = None
    requeued: bool = False


def deliver(app: App, message: Message, *, redelivered: bool = False) -> Delivery:
    """Deliver a message to its task, in this process.

    Args:
        app: The Celery app.
        message: Of one of its tasks.
        redelivered: What the broker says of it.

    Returns:
        How it ended; a ``Crash`` is told as the loss of the process, with what Celery does about
        that.
    """
    delivery = Delivery()
    task: AnyTask = app.tasks[str(message.task_name)]
    # For each acknowledgement or rejection: whether the broker is to deliver again.
    settled: list[bool] = []
    request = _request_class(task)(
        _as_received(app, message, redelivered=redelivered),
        on_ack=lambda *args, **kwargs: settled.append(False),
        on_reject=lambda logger, errors, requeue=False, **kwargs: settled.append(bool(requeue)),
        app=app,
        task=task,
        hostname=gethostname(),
    )
    try:
        with record_threads.here():
            # What a request asks of a pool.
            request.execute_using_pool(cast("BasePool", _PoolOfOne(app, delivery)))
    except TaskRevokedError:
        delivery.state = "REVOKED"
    except Crash:
        # In the parent process, which is killed with its child: whatever the broker was not told,
        # it delivers again.
        delivery.state = "LOST"
    delivery.requeued = settled[-1] if settled else delivery.state == "LOST"
    return delivery


def _request_class(task: AnyTask) -> type[Request]:
    class_: type[Request] = symbol_by_name(task.Request)
    return class_


def _as_received(app: App, message: Message, *, redelivered: bool) -> KombuMessage:
    # Its stub knows only texts as bodies.
    body: Fields = {"body": message.body}
    return KombuMessage(
        **body,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=dict(message.headers),
        properties=dict(message.properties),
        delivery_info={
            "exchange": message.exchange,
            "routing_key": message.routing_key,
            "priority": message.properties.get("priority"),
            "redelivered": redelivered,
        },
        delivery_tag=message.task_id,
        accept=prepare_accept_content(app.conf.accept_content),
    )


class _PoolOfOne:
    """A worker pool that runs a request where it is.

    Args:
        app: The Celery app.
        delivery: Told how the task ended.
    """

    def __init__(self, app: App, delivery: Delivery) -> None:
        self._app = app
        self._delivery = delivery

    def apply_async(
        self,
        target: object,
        args: tuple[str, str, Fields, bytes, str, str],
        accept_callback: Callable[[int, float], None],
        callback: Callable[[object], None],
        error_callback: Callable[..., None],
        **options: object,
    ) -> None:
        """Run a task as ``trace_task_ret`` of Celery does, and tell the request of its end."""
        accept_callback(os.getpid(), monotonic())
        try:
            failed_and_result = self._trace(*args)
        except Crash as crash:
            lost = self._delivery.result = WorkerLostError(f"Worker exited prematurely: {crash}")
            error_callback(ExceptionInfo((WorkerLostError, lost, crash.__traceback__)))
        else:
            callback(failed_and_result)

    def _trace(
        self,
        name: str,
        task_id: str,
        request: Fields,
        body: bytes,
        content_type: str,
        content_encoding: str,
    ) -> tuple[int, object, float | None]:
        app = self._app
        args, kwargs, embed = loads(
            body,
            content_type,
            content_encoding,
            accept=prepare_accept_content(app.conf.accept_content),
        )
        request.update(
            {"args": args, "kwargs": kwargs, "hostname": gethostname(), "is_eager": False},
            **embed or {},
        )
        # Not the task's cached tracer, which may be that of a worker in another thread.
        trace = build_tracer(name, app.tasks[name], app.loader, gethostname(), app=app)
        value, info, runtime, shown = trace(task_id, args, kwargs, request)
        self._delivery.state = cast("RunState", info.state) if info else "SUCCESS"
        self._delivery.result = info.retval if info else value
        return (1, value, runtime) if info else (0, shown, runtime)
