"""Tasks that are revoked before a worker has them: their rows end, and their results say so.

Beside the queues. The channel brings the remote control here that its process sends, since no
worker may be alive that could hear it. A task that a worker has is for that worker to end.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Executable, delete, select, union_all, update

from ..databases.tables import Found, Rows, from_now
from ..messages.celery_types import App, Fields
from ..messages.message import Message
from ..outbox.outbox import shown
from .homes import BrokerHome
from .outside_results import app_of, received, request_of
from .tables import BrokerTables, begun

__all__ = ["revoke_waiting", "revoked_by", "unfinished"]

#: Of kombu's ``Mailbox``, behind the name of the app's control exchange.
_CONTROL_EXCHANGE = ".pidbox"

#: As Celery's workers say it, and what the row of a ``once`` task says then.
_REVOKED = "revoked"
_REASON = f"the task was {_REVOKED}"

#: Ids of one statement, which names them four times: SQLite before 3.32 takes 999 parameters.
_IDS = 200


def revoked_by(message: Message) -> Sequence[str]:
    """Return the ids of the tasks that a message revokes; none of any other message.

    One for named workers means their tasks alone.

    Args:
        message: What this process sends.
    """
    if not message.exchange.endswith(_CONTROL_EXCHANGE):
        return ()
    # Of this process itself, whatever it serialises with.
    said: Fields = received(message, [message.content_type]).decode()
    if said.get("method") != "revoke" or said.get("destination") or said.get("pattern"):
        return ()
    ids = (said.get("arguments") or {}).get("task_id") or ()
    return [ids] if isinstance(ids, str) else [str(task_id) for task_id in ids]


def revoke_waiting(home: BrokerHome, task_ids: Sequence[str]) -> None:
    """End the tasks that wait in a queue, due or not.

    A ``once`` task is dead then; of others no row is left.

    They are set aside first, with the reason. Whoever revokes them again ends what a process has
    left there which could not write their results.

    Args:
        home: The broker's database.
        task_ids: Their ids; those that do not wait are left alone.
    """
    for start in range(0, len(task_ids), _IDS):
        with begun(home.place, home.engine()) as tables:
            revoked = _set_aside(tables, task_ids[start : start + _IDS])
        if not revoked:
            continue
        app = app_of(home)
        for row in revoked:
            _keep_result(app, row)
        with begun(home.place, home.engine()) as tables:
            c = tables.messages.c
            done = (c.id.in_([row.id for row in revoked]), c.once.is_(False), c.error == _REASON)
            tables.run(delete(tables.messages).where(*done, c.died_at.is_not(None)))


def _set_aside(tables: BrokerTables, task_ids: Sequence[str]) -> Rows:
    """Give no worker the tasks of these ids that wait, and return their rows."""
    c = tables.messages.c
    # Not one UPDATE: InnoDB would lock all the rows that it looks through.
    found = tables.run(unfinished(tables, task_ids)).all()
    # What a worker has. Its task may be owed in another row: kept for another broker, it was sent
    # to this one.
    taken = {row.task_id for row in found if row.queue is not None and row.claim is not None}
    keys = [row.id for row in found if row.queue is not None or row.task_id not in taken]
    if not keys:
        return []
    ended = {"died_at": from_now(0), "due_at": None, "claim": None, "error": _REASON}
    waiting = update(tables.messages).where(c.id.in_(keys), c.due_at.is_not(None))
    tables.run(waiting.values(**ended))
    revoked = select(c.id, c.task_id, c.task_name, c.body, c.envelope)
    is_revoked = (c.id.in_(keys), c.died_at.is_not(None), c.error == _REASON)
    return tables.run(revoked.where(*is_revoked)).all()


def unfinished(tables: BrokerTables, task_ids: Sequence[str]) -> Executable:
    """Return a query for the rows of tasks that wait, are taken or are dead.

    Task ids have no index: on SQLite a row in a batch would cost half as much again. Each part goes
    through an index that has no completed rows, which are kept for days: of a million of those and
    few others it reads for 1 to 2 ms, instead of 100 on PostgreSQL and 1800 on MariaDB.
    """
    c = tables.messages.c
    tasks = (c.task_id.in_([shown(task_id) for task_id in task_ids]), c.completed_at.is_(None))
    parts = (
        (c.queue.is_not(None), c.due_at.is_not(None)),
        (c.queue.is_not(None), c.claim.is_not(None)),
        (c.queue.is_(None), c.due_at.is_not(None)),
        (c.died_at.is_not(None),),
    )
    columns = (c.id, c.task_id, c.queue, c.claim)
    return union_all(*(select(*columns).where(*tasks, *part) for part in parts))


def _keep_result(app: App, row: Found) -> None:
    """Write that a task was revoked, as the worker does which discards one."""
    request = request_of(app, row)
    keeps = not request.ignore_result or app.conf.task_store_errors_even_if_ignored
    task_id: str = request.get("id")
    app.backend.mark_as_revoked(task_id, _REVOKED, request=request, store_result=keeps)
