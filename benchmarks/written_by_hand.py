"""What ``targets.py`` compares: the same work by the library, and as a good engineer would write it by hand."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import rivals
from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, enqueue, step
from celery_alchemy.messages.recording import recording
from celery_alchemy.requests.once_keys import ROW_HEADER

READ = text("SELECT text FROM line WHERE id = :id")
CHANGE = text("UPDATE line SET text = :text WHERE id = :id")
NOTE = text("INSERT INTO done (id) VALUES (:id) ON CONFLICT DO NOTHING")
LOOK = text("SELECT id FROM done WHERE id = :id")
OWE = text("INSERT INTO owed (id, starts) VALUES (:id, 0)")
START = text("UPDATE owed SET starts = starts + 1 WHERE id = :id AND completed_at IS NULL")
END = text("UPDATE owed SET completed_at = now() WHERE id = :id AND completed_at IS NULL")
KEEP_STEP = text("INSERT INTO step (id, name, value) VALUES (:id, :name, :value)")
KEEP_MESSAGE = text("INSERT INTO message (id, body, envelope) VALUES (:id, :body, :envelope)")
KEEP = text("INSERT INTO to_send (id, task, arguments) VALUES (:id, :task, :arguments)")

#: Steps of one task.
STEPS = 20


def work(session: Session, task_id: str) -> None:
    """Read a row and change it."""
    session.execute(READ, {"id": 1}).scalar_one()
    session.execute(CHANGE, {"id": 1, "text": task_id})


class Tasks:
    """Tasks that read a row, change it and commit.

    Args:
        made: The app, its Alchemy and the database.
    """

    def __init__(self, made: rivals.Shop) -> None:
        self._made = made
        url = rivals.psycopg(rivals.CONNINFO)
        self.app = app = Celery("tasks", broker=made.broker, set_as_current=False)
        app.conf.update(made.app.conf.changes)
        # An engine made by Alchemy, and one as it is made by hand.
        self._alchemy = Alchemy(app, url, outbox=True)
        self._engine = create_engine(url)
        with self._engine.begin() as connection:
            connection.execute(text("CREATE TABLE done (id text PRIMARY KEY)"))
            connection.execute(text("CREATE TABLE owed (id text PRIMARY KEY, starts int, completed_at timestamptz)"))
            connection.execute(text("CREATE TABLE step (id text, name text, value text, PRIMARY KEY (id, name))"))
            connection.execute(rivals.ADD_LINE)
        self._make_tasks()
        self._make_steps()

    def _task(self, function: Any, **options: Any) -> Any:
        return self.app.task(name=f"bench.{uuid4().hex}", shared=False, **options)(function)

    def _make_tasks(self) -> None:
        def plain(task_id: str) -> None:
            """Do nothing."""

        def untouched(session: Session, task_id: str) -> None:
            """Ask for a session and do nothing."""

        def by_hand(task_id: str) -> None:
            with Session(self._engine) as session:
                work(session, task_id)
                session.commit()

        def row_by_hand(task_id: str) -> None:
            with Session(self._engine) as session:
                if not session.execute(NOTE, {"id": task_id}).rowcount:
                    return
                work(session, task_id)
                session.commit()

        def once_by_hand(task_id: str) -> None:
            with Session(self._engine) as session:
                if session.execute(LOOK, {"id": task_id}).first() is not None:
                    return
                work(session, task_id)
                session.execute(NOTE, {"id": task_id})
                session.commit()

        def owed_by_hand(task_id: str) -> None:
            with Session(self._engine) as session:
                if not session.execute(START, {"id": task_id}).rowcount:
                    return
                session.commit()
                work(session, task_id)
                session.execute(END, {"id": task_id})
                session.commit()

        self.plain = self._task(plain)
        self.untouched = self._task(untouched)
        self.by_hand = self._task(by_hand)
        self.row_by_hand = self._task(row_by_hand)
        self.once_by_hand = self._task(once_by_hand)
        self.owed_by_hand = self._task(owed_by_hand)
        self.used = self._task(work)
        self.once = self._task(work, once=True)

    def _make_steps(self) -> None:
        def stepped(session: Session, task_id: str) -> None:
            for number in range(STEPS):
                step(f"step {number}", work, task_id=task_id)

        def steps_by_hand(task_id: str) -> None:
            with Session(self._engine) as session:
                for number in range(STEPS):
                    work(session, task_id)
                    session.execute(KEEP_STEP, {"id": task_id, "name": f"step {number}", "value": "null"})
                    session.commit()

        self.stepped = self._task(stepped, once=True)
        self.steps_by_hand = self._task(steps_by_hand)

    def owed(self, task: Any, count: int) -> list[str]:
        """Send tasks that stay owed, as if the broker had them, and return their ids."""
        with self._alchemy.begin() as session:
            ids = [enqueue(session, task.s("x")).id for _ in range(count)]
        self._alchemy.drain(30)
        return ids

    def owed_rows(self, count: int) -> list[str]:
        """Write rows that tasks by hand are owed by, and return their ids."""
        ids = [str(uuid4()) for _ in range(count)]
        with self._engine.begin() as connection:
            connection.execute(OWE, [{"id": task_id} for task_id in ids])
        return ids

    def request(self, task_id: str, *, owed: bool) -> dict[str, Any]:
        """Return the request of a delivery."""
        headers = {ROW_HEADER: task_id} if owed else {}
        return {"id": task_id, "args": (), "kwargs": {}, "is_eager": False, "delivery_info": {}, **headers}


class Sending:
    """Transactions that insert a row and send a task.

    Args:
        made: The app, its Alchemy and the database.
    """

    def __init__(self, made: rivals.Shop) -> None:
        self._made = made
        self.after = 0.0
        app = Celery("direct", broker=made.broker, set_as_current=False)
        app.conf.update(made.app.conf.changes)
        self._direct = Alchemy(app, made.engine)
        self._line: Any = app.task(name="line", shared=False)(rivals.add_line)
        with made.engine.begin() as connection:
            connection.execute(text("CREATE TABLE to_send (id text PRIMARY KEY, task text, arguments text)"))
            connection.execute(text("CREATE TABLE message (id text PRIMARY KEY, body bytea, envelope text)"))

    def outbox(self) -> None:
        """Send through the outbox."""
        self._made.enqueue()

    def direct(self) -> None:
        """Send on commit, without an outbox."""
        with Session(self._made.engine) as session:
            session.execute(rivals.ADD_LINE)
            enqueue(session, self._line.s())
            session.commit()

    def by_hand(self) -> None:
        """Write what another process is to send."""
        row = {"id": str(uuid4()), "task": "line", "arguments": json.dumps([[], {}])}
        with Session(self._made.engine) as session:
            session.execute(rivals.ADD_LINE)
            session.execute(KEEP, row)
            session.commit()

    def message_by_hand(self) -> None:
        """Write the message that Celery makes, for another process to send: the least that an outbox of messages costs."""
        with Session(self._made.engine) as session:
            session.execute(rivals.ADD_LINE)
            with recording(self._made.app) as messages:
                self._made.line.delay()
            [message] = messages
            row = {"id": str(uuid4()), "body": message.body, "envelope": message.envelope()}
            session.execute(KEEP_MESSAGE, row)
            session.commit()
