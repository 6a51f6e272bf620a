"""The crash tests' Celery app: a task that sends, one that is sent, one that kills; and what they are told to die of."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from celery import chain
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import celery_alchemy.outbox.outbox
import celery_alchemy.outbox.relay
from celery_alchemy import Alchemy, enqueue
from tests.crash.injection import STRUCK_VARIABLE, Injection
from tests.crash.points import ASYNC_STEP_POINTS, DEATH_POINTS, POISON_DELIVERIES, STEP_POINTS, Fault
from tests.settings import database_url, make_app
from tests.soak.ledger import Effect, promise

# Whatever was left behind is taken up again within a few seconds.
celery_alchemy.outbox.outbox.LEASE_SECONDS = 0.5
celery_alchemy.outbox.relay.LEASE_SECONDS = 1.0
celery_alchemy.outbox.relay.BACKOFF_SECONDS = 0.2
REDELIVER_SECONDS = 1

url = database_url() or "sqlite://"
app = make_app("crash")
is_broker = app.conf.broker_url.startswith("alchemy")
alchemy = Alchemy(
    app,
    url,
    outbox=True,
    broker=is_broker,
    worker_lost_after=2,
    redeliver_after=REDELIVER_SECONDS,
    max_deliveries=100,
    relay_interval_seconds=0.2,
)
folder = Path(os.environ.get(STRUCK_VARIABLE, "."))
injection = Injection(url, folder)
injection.install(app)
# A task class of the library has methods that Celery's annotations do not know.
task = cast("Callable[..., Callable[[Callable[..., Any]], Any]]", app.task)


@task(
    name="step",
    bind=True,
    once=True,
    max_retries=None,
    # Connections are cut.
    autoretry_for=(DBAPIError,),
    retry_kwargs={"countdown": 0.1, "max_retries": None},
)
def step(self: Any, session: Session, name: str, *, fault: list[str] | None = None, children: int = 0) -> str:
    """Write an effect; send children, and others that are taken back."""
    injection.reach("body, before")
    session.add(Effect(name=name, task_id=self.request.id))
    session.flush()
    for number in range(children):
        step.delay_on_commit(promise(session, f"{name}.{number}"))
    if children:
        with session.begin_nested() as savepoint:
            step.delay_on_commit(promise(session, f"ghost of {name}"))
            savepoint.rollback()
    injection.reach("body, after")
    return name


@task(
    name="stepped",
    bind=True,
    once=True,
    max_retries=None,
    autoretry_for=(DBAPIError,),
    retry_kwargs={"countdown": 0.1, "max_retries": None},
)
def stepped(self: Any, session: Session, name: str, *, fault: list[str] | None = None) -> str:
    """Write an effect in each of two steps, and one at the end."""
    celery_alchemy.step("one", work, f"{name}.one", self.request.id, sends=True)
    celery_alchemy.step("two", work, f"{name}.two", self.request.id)
    session.add(Effect(name=name, task_id=self.request.id))
    return name


@task(
    name="stepped coroutine",
    bind=True,
    once=True,
    max_retries=None,
    autoretry_for=(DBAPIError,),
    retry_kwargs={"countdown": 0.1, "max_retries": None},
)
async def stepped_coroutine(self: Any, session: AsyncSession, name: str, *, fault: list[str] | None = None) -> str:
    """Write an effect in each of two steps, one of them a coroutine's, and one at the end."""
    injection.of_coroutine(fault)
    await celery_alchemy.step("one", awaited_work, f"{name}.one", self.request.id)
    await celery_alchemy.step("two", work, f"{name}.two", self.request.id)
    session.add(Effect(name=name, task_id=self.request.id))
    return name


def work(session: Session, name: str, task_id: str, *, sends: bool = False) -> None:
    """Write the effect of a step, and send a task with it."""
    injection.reach("work, before")
    session.add(Effect(name=name, task_id=task_id))
    if sends:
        step.delay_on_commit(promise(session, f"{name}.child"))
    session.flush()
    injection.reach("work, after")


async def awaited_work(session: AsyncSession, name: str, task_id: str) -> None:
    """Do the work of a step that sends a task."""
    await session.run_sync(work, name, task_id, sends=True)


class DoomedError(Exception):
    """What the task that always fails fails with."""


def keep_promise(session: Session, exc: BaseException, name: str, *, fault: list[str] | None = None) -> None:
    """Write the effect that a task owes which has failed for good."""
    session.add(Effect(name=name, task_id=name))


@task(name="doomed", once=True, record_failure=keep_promise)
def doomed(session: Session, name: str, *, fault: list[str] | None = None) -> None:
    """Write an effect that is rolled back, and fail."""
    session.add(Effect(name=name, task_id=name))
    session.flush()
    raise DoomedError(name)


@task(name="poison", once=True, max_deliveries=POISON_DELIVERIES, record_failure=keep_promise)
def poison(session: Session, name: str) -> None:
    """Kill the process that runs it."""
    with (folder / "poisoned").open("ab") as file:
        file.write(b".")
    os.kill(os.getpid(), signal.SIGKILL)


def send(session: Session, name: str, fault: Fault | None) -> str:
    """Promise and send a task with a child and a successor, or one that is to die for good; return its id."""
    given = None if fault is None else [fault.point, fault.action]
    if fault is not None and fault.point in DEATH_POINTS:
        return str(doomed.apply_async_on_commit((promise(session, name),), {"fault": given}, task_id=name, session=session).id)
    if fault is not None and fault.point in (*STEP_POINTS, *ASYNC_STEP_POINTS):
        for part in ("one", "two"):
            promise(session, f"{name}.{part}")
        of_steps = stepped if fault.point in STEP_POINTS else stepped_coroutine
        return str(of_steps.apply_async_on_commit((promise(session, name),), {"fault": given}, session=session).id)
    first = step.si(promise(session, name), fault=given, children=1)
    result = enqueue(session, chain(first, step.si(promise(session, f"{name}.next"))))
    return str(result.parent.id)
