"""Processes that send and end: `python -m tests.delivery.ends WAY`, and an app for a worker that is stopped.

The broker is slow, so that a process which does not wait for its messages ends before they are out.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

WAY = sys.argv[1] if __name__ == "__main__" else ""

if WAY == "gevent":
    from gevent import monkey

    monkey.patch_all()
elif WAY == "eventlet":
    import eventlet

    eventlet.monkey_patch()

from sqlalchemy.orm import Session  # noqa: E402 - after the patches.

from celery_alchemy import Alchemy, enqueue  # noqa: E402
from celery_alchemy.messages.message import Message  # noqa: E402
from celery_alchemy.messages.publisher import Publisher  # noqa: E402
from tests.settings import database_url, make_app  # noqa: E402

#: Where the messages go: a queue that the worker of this app does not consume.
QUEUE_VARIABLE = "CELERY_ALCHEMY_TEST_ELSEWHERE"
SLOW_SECONDS_VARIABLE = "CELERY_ALCHEMY_TEST_SLOW_SECONDS"

app = make_app("ends")
alchemy = Alchemy(app, database_url() or "sqlite://", outbox=True, relay=False)


if QUEUE_VARIABLE in os.environ:
    app.conf.task_routes = {"arrives": {"queue": os.environ[QUEUE_VARIABLE]}}


@app.task(shared=False, name="arrives")
def arrives(name: str) -> None:
    """Is never run: its messages are counted."""


@app.task(shared=False, name="sends")
def sends(session: Session, name: str) -> None:
    """Send as a task of a worker."""
    enqueue(session, arrives.s(name))


_publish = Publisher.publish


def _publish_slowly(publisher: Publisher, messages: Iterable[Message], within: float = float("inf")) -> Any:
    threading.Event().wait(float(os.environ.get(SLOW_SECONDS_VARIABLE, "0.3")))
    return _publish(publisher, messages, within)


if QUEUE_VARIABLE in os.environ:
    Publisher.publish = _publish_slowly  # type: ignore[method-assign]


def send(name: str = "sent") -> None:
    """Commit one message."""
    with alchemy.begin() as session:
        enqueue(session, arrives.s(name))


def in_thread() -> None:
    """End with the thread that sends."""
    thread = threading.Thread(target=send)
    thread.start()
    thread.join()


def in_fork() -> None:
    """Send before a fork, in the child, and after it; the child ends as a child of gunicorn does."""
    send("before")
    pid = os.fork()
    send("in both")
    if pid == 0:
        sys.exit(0)
    os.waitpid(pid, 0)


def in_process_of(module: str, method: str) -> Callable[[], None]:
    """Return what sends in a child that ends by `os._exit`, and in its parent."""

    def run() -> None:
        send("before")
        context: Any = __import__(module).get_context(method)
        child = context.Process(target=send)
        child.start()
        child.join()

    return run


def in_greenlet() -> None:
    """Send in a greenlet."""
    import gevent

    gevent.spawn(send).join()


def in_green_thread() -> None:
    """Send in a green thread."""
    eventlet.spawn(send).wait()


def in_loop() -> None:
    """Send in an event loop that ends."""
    import asyncio

    async def send_there() -> None:
        async with alchemy.async_session() as session:
            enqueue(session, arrives.s("sent"))
            await session.commit()

    asyncio.run(send_there())


#: Each with the number of messages that it commits.
WAYS: dict[str, tuple[Callable[[], None], int]] = {
    "script": (send, 1),
    "thread": (in_thread, 1),
    "fork": (in_fork, 3),
    "multiprocessing, fork": (in_process_of("multiprocessing", "fork"), 2),
    "multiprocessing, spawn": (in_process_of("multiprocessing", "spawn"), 2),
    "billiard": (in_process_of("billiard", "fork"), 2),
    "gevent": (in_greenlet, 1),
    "eventlet": (in_green_thread, 1),
    "asyncio": (in_loop, 1),
}

if __name__ == "__main__":
    WAYS[WAY][0]()
