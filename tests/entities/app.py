"""Tasks that take entities, for real workers and for the test's process, whose own app sends them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated, Any

from celery import Celery
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, ForUpdate
from tests.entities.library import Base, Copy, Work
from tests.settings import database_url, make_app
from tests.stand import task_of


def tasks_of(app: Celery) -> Any:
    """Make the tasks of the library's workers in an app; they are the attributes of what is returned."""

    @task_of(app, name="shout")
    def shout(work: Annotated[Work, ForUpdate]) -> str:
        work.title = work.title.upper()
        return work.title

    @task_of(app, name="append")
    def append(before: str, work: Work, suffix: str) -> str:
        work.title += suffix
        return f"{before} {work.title}"

    @task_of(app, name="titles")
    def titles(works: list[Work], nobody: Work | None = None) -> list[str]:
        return [work.title for work in works] + ([] if nobody is None else ["somebody"])

    @task_of(app, name="gather")
    def gather(results: list[str], copy: Copy) -> str:
        return f"{copy.shelf}{copy.number}: {' '.join(sorted(results))}"

    @task_of(app, name="lengthen", once=lambda work: f"{work.id}")
    def lengthen(work: Work) -> str:
        work.title += "+"
        return work.title

    @task_of(app, name="hand_on")
    def hand_on(session: Session, work: Work) -> str:
        return str(lengthen.delay_on_commit(work).id)

    return SimpleNamespace(shout=shout, append=append, titles=titles, gather=gather, lengthen=lengthen, hand_on=hand_on)


def library_of(app: Celery, url: str) -> Any:
    """Give an app its Alchemy, with an outbox, and the tasks."""
    app.conf.accept_content = ["json", "yaml", "msgpack", "pickle"]
    Alchemy(app, url, outbox=True, models=Base)
    return tasks_of(app)


app = make_app("library")
library_of(app, database_url() or "sqlite://")
