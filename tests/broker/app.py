"""The app of the broker's tests: a worker serves it, with the database as its broker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from tests.settings import database_url, make_app

#: Seconds without a heartbeat after which a worker of these tests counts as lost.
LOST_SECONDS = 2.0


def make(app: Celery, url: str) -> Alchemy:
    """Give an app the database for its broker, and the tasks of the tests."""
    alchemy = Alchemy(app, url, broker=True, worker_lost_after=LOST_SECONDS, max_deliveries=3)
    task: Any = app.task

    @task(name="add", shared=False)
    def add(x: int, y: int) -> int:
        return x + y

    @task(name="eta", shared=False, bind=True)
    def eta(self: Any) -> str:
        return str(self.request.eta)

    @task(name="write", shared=False)
    def write(session: Session, name: str) -> None:
        session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": name})

    @task(name="write once", shared=False, once=True)
    def write_once(session: Session, name: str, marks: str) -> str:
        """Write, and at the first start be killed with the whole worker."""
        session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": name})
        _die_at_first_start(marks)
        return name

    @task(name="write at the gate", shared=False, once=True)
    def write_at_the_gate(session: Session, name: str, marks: str, gate: str) -> str:
        """Say that it has begun, and write when the gate is open."""
        session.execute(text("SELECT 1"))
        with Path(marks).open("a") as file:
            file.write("begun\n")
        while not Path(gate).exists():
            time.sleep(0.02)
        session.execute(text("INSERT INTO effect (name) VALUES (:name)"), {"name": name})
        return name

    @task(name="wait", shared=False, acks_late=True)
    def wait(marks: str, seconds: float) -> None:
        """Say that it has begun, and wait."""
        with Path(marks).open("a") as file:
            file.write("begun\n")
        time.sleep(seconds)

    @task(name="kill the worker", shared=False, acks_late=True)
    def kill_the_worker(marks: str, after_seconds: float = 0.5) -> None:
        with Path(marks).open("a") as file:
            file.write("begun\n")
        time.sleep(after_seconds)
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    @task(name="end the process", shared=False, acks_late=True)
    def end_the_process(marks: str) -> None:
        """As a crash in C code does, at once."""
        with Path(marks).open("a") as file:
            file.write("begun\n")
        os.kill(os.getpid(), signal.SIGKILL)

    _make_those_that_last(task)
    _make_ends_at_the_gate(task)
    return alchemy


def _make_those_that_last(task: Any) -> None:
    @task(name="write and wait", shared=False)
    def write_and_wait(session: Session, gate: str) -> None:
        """Write, and end when the gate is open."""
        session.execute(text("INSERT INTO effect (name) VALUES ('written')"))
        while not Path(gate).exists():
            time.sleep(0.02)

    @task(name="limited", shared=False, time_limit=2)
    def limited(pid_file: str) -> None:
        """Say which process it is, and run into a time limit."""
        Path(pid_file).write_text(str(os.getpid()))
        time.sleep(60)

    @task(name="tell", shared=False, ignore_result=True)
    def tell(seconds: float) -> None:
        """Have the worker send events at the begin and the end."""
        time.sleep(seconds)


def _make_ends_at_the_gate(task: Any) -> None:
    def wait_at_the_gate(marks: str, gate: str) -> None:
        Path(marks).touch()
        while not Path(gate).exists():
            time.sleep(0.02)

    @task(name="end at the gate", shared=False, acks_late=True)
    def end_at_the_gate(marks: str, gate: str) -> str:
        wait_at_the_gate(marks, gate)
        return "ended"

    @task(name="fail at the gate", shared=False, once=True)
    def fail_at_the_gate(marks: str, gate: str) -> None:
        wait_at_the_gate(marks, gate)
        raise ValueError("at the gate")


def _die_at_first_start(marks: str) -> None:
    path = Path(marks)
    if not path.exists():
        path.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


_url = database_url()
if _url is not None:
    app = make_app("broker-tests")
    make(app, _url)
