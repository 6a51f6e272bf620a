"""The soak's Celery app: tasks that write their effect, fan out, retry, fail in between and send what they take back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, cast
from uuid import uuid4

from celery import chain
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import celery_alchemy.messages.publisher
import celery_alchemy.outbox.outbox
import celery_alchemy.outbox.relay
from celery_alchemy import Alchemy, enqueue
from tests.settings import database_url, make_app
from tests.soak.ledger import Effect, promise

# Minutes in which every lease, pause and repetition comes often.
celery_alchemy.outbox.outbox.LEASE_SECONDS = 3.0
celery_alchemy.outbox.relay.LEASE_SECONDS = 4.0
celery_alchemy.messages.publisher.PAUSE_SECONDS = 1.0
#: Shorter than many a pause of a stopped process, so that tasks run twice at the same time.
REDELIVER_SECONDS = 6
#: Of a worker whose broker is the database: shorter than many a pause, too.
LOST_SECONDS = 4.0
#: Killing is the rule here, so that only a task that cannot end is dead.
MAX_DELIVERIES = 1000

app = make_app("soak")
app.conf.update(task_ignore_result=True, worker_cancel_long_running_tasks_on_connection_loss=True)
alchemy = Alchemy(
    app,
    database_url(),
    outbox=True,
    # Where no other one is given.
    broker=not app.conf.broker_url,
    worker_lost_after=LOST_SECONDS,
    redeliver_after=REDELIVER_SECONDS,
    max_deliveries=MAX_DELIVERIES,
    relay_interval_seconds=0.5,
)

# A task class of the library has methods that Celery's annotations do not know.
task = cast("Callable[..., Callable[[Callable[..., Any]], Any]]", app.task)


class TroubleError(Exception):
    """A body failed; another attempt will not."""


# The database cuts connections, so that any body and any commit may fail.
_options: dict[str, Any] = {
    "max_retries": None,
    "autoretry_for": (DBAPIError, TroubleError),
    "retry_kwargs": {"countdown": 0.5, "max_retries": None},
}


def new_name(kind: str) -> str:
    """Return a name that nothing else has."""
    return f"{kind}-{uuid4().hex}"


def write_effect(running: Any, session: Session, name: str) -> None:
    """Write the effect first, so that an end at any later moment has something to take back, and stay a while."""
    session.add(Effect(name=name, task_id=running.request.id))
    session.flush()
    time.sleep(random.uniform(0, 0.02))


@task(name="step", bind=True, once=True, **_options)
def step(self: Any, session: Session, name: str, children: int = 0, trouble: str = "") -> str:
    """Write an effect, send children, and send others in a SAVEPOINT that rolls back."""
    write_effect(self, session, name)
    if trouble == "retry" and self.request.retries == 0:
        raise self.retry(countdown=0)
    if trouble == "error" and self.request.retries == 0:
        raise TroubleError(name)
    for number in range(children):
        step.delay_on_commit(promise(session, f"{name}.{number}"), trouble=random.choice(("", "", "retry", "error")))
    if children:
        with session.begin_nested() as savepoint:
            step.delay_on_commit(promise(session, new_name("ghost")))
            savepoint.rollback()
    return name


@task(name="keyed", bind=True, once=lambda name: name, **_options)
def keyed(self: Any, session: Session, name: str) -> None:
    """Write an effect, however often and under whatever task ids it was sent."""
    write_effect(self, session, name)


@task(name="plain", bind=True)
def plain(self: Any, session: Session, name: str) -> None:
    """Write an effect without any care; only sent by what rolls back."""
    write_effect(self, session, name)


def send_chain(session: Session) -> None:
    """Promise and send a chain of three."""
    names = [promise(session, new_name("link")) for _ in range(3)]
    enqueue(session, chain(*(step.si(name) for name in names)))


def send_keyed(session: Session) -> None:
    """Promise one effect and send its task twice."""
    name = promise(session, new_name("keyed"))
    keyed.apply_async_on_commit((name,), session=session)
    keyed.apply_async_on_commit((name,), session=session)


def send_family(session: Session) -> None:
    """Promise and send a task with children."""
    name = promise(session, new_name("step"))
    trouble = random.choice(("", "", "", "retry", "error"))
    step.apply_async_on_commit((name, random.randint(0, 3), trouble), session=session)


def send_ghosts(session: Session) -> None:
    """Promise and send what the caller rolls back."""
    step.apply_async_on_commit((promise(session, new_name("ghost")), 1), session=session)
    plain.apply_async_on_commit((promise(session, new_name("ghost")),), session=session)
