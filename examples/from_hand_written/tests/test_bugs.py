"""Each bug, in the old code and not in the new."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from celery.app.trace import build_tracer
from celery.utils import uuid
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from celery_alchemy.testing import LeakError, Sent, no_leaks
from from_hand_written import models, step_1_with_block, step_2_hooks, step_3_scoped_session
from from_hand_written import with_celery_alchemy as ours
from from_hand_written.models import Base, Document, SessionLocal, engine


@pytest.fixture
def alchemy() -> Alchemy:
    """What the fixtures of celery-alchemy work on."""
    return ours.alchemy


@pytest.fixture(autouse=True)
def _tables() -> Iterator[None]:
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    ours.alchemy.create_tables()
    with SessionLocal.begin() as session:
        session.add(Document(id=1, title="first"))
    yield
    step_3_scoped_session.session.remove()
    engine.dispose()


def _titles() -> list[str]:
    with SessionLocal() as session:
        return list(session.scalars(select(Document.title).order_by(Document.id)))


class _Sends:
    """Notes, for each send of the old code, which documents a worker would find."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, task: Any) -> None:
        self.found: list[list[str]] = []
        monkeypatch.setattr(task, "delay", lambda document_id: self.found.append(_titles()))


def test_1_task_is_sent_before_its_row_is_there(monkeypatch: pytest.MonkeyPatch, sent: Sent) -> None:
    """A worker that is quick finds the row only with the new code."""
    old = _Sends(monkeypatch, step_1_with_block.index)
    step_1_with_block.import_document("old")
    assert old.found == [["first"]]

    document_id = ours.import_document("new")
    assert sent == [ours.index.s(document_id)]
    assert _titles() == ["first", "old", "new"]


def test_2_task_is_sent_for_a_row_that_is_rolled_back(monkeypatch: pytest.MonkeyPatch, sent: Sent) -> None:
    """The new code sends nothing when it fails."""
    old = _Sends(monkeypatch, step_1_with_block.index)
    with pytest.raises(ValueError, match="needs a title"):
        step_1_with_block.import_document("")
    assert len(old.found) == 1

    with pytest.raises(ValueError, match="needs a title"):
        ours.import_document("")
    assert sent == []


@pytest.mark.parametrize(("task", "held"), [(step_1_with_block.index, 1), (ours.index, 0)], ids=["old", "new"])
def test_3_connection_is_held_during_slow_work(task: Any, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of ten serves ten old tasks, or any number of new ones."""
    seen: list[int] = []
    pool: Any = engine.pool

    def look(title: str) -> str:
        seen.append(pool.checkedout())
        return title

    monkeypatch.setattr(models, "slow_work", look)

    task(1)

    assert seen == [held]


@pytest.mark.parametrize(("task", "state"), [(step_1_with_block.index, "new"), (ours.index, "failed")], ids=["old", "new"])
def test_4_failure_is_rolled_back_with_the_work(task: Any, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for the document learns of its failure only with the new code."""

    def fail(title: str) -> str:
        raise LookupError(title)

    monkeypatch.setattr(models, "slow_work", fail)

    task.apply((1,))

    with SessionLocal() as session:
        assert session.get_one(Document, 1).state == state


@pytest.mark.parametrize(("task", "title"), [(step_1_with_block.append, "first!!"), (ours.append, "first!")], ids=["old", "new"])
def test_5_second_delivery_writes_a_second_time(task: Any, title: str) -> None:
    """Brokers deliver twice at times."""
    for _ in range(2):
        task.apply((1, "!"), task_id=f"{task.app.main}-delivered-twice", throw=True)

    assert _titles() == [title]


def test_6_threads_share_a_session() -> None:
    """One thread's task replaces the other's session; requests of the new code have one each."""
    old, new = step_2_hooks.import_document, ours.alchemy
    together = threading.Barrier(2)
    of_old: list[bool] = []
    of_new: list[Session] = []

    @ours.celery.task(shared=False)
    def keep(session: Session) -> None:
        of_new.append(session)
        together.wait(10)

    def request() -> None:
        old.before_start("id", (), {})
        mine = old.session
        together.wait(10)
        of_old.append(old.session is mine)
        together.wait(10)
        mine.close()
        keep()

    threads = [threading.Thread(target=request) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert new.app is ours.celery
    assert of_old.count(True) == 1
    assert of_new[0] is not of_new[1]


def _stored_state(task: Any, *args: Any) -> str:
    """Run a task as a worker does, and return the state that its caller reads."""
    task_id = uuid()
    with warnings.catch_warnings():
        # Celery says that a hook has failed, and goes on.
        warnings.simplefilter("ignore", RuntimeWarning)
        build_tracer(task.name, task, app=task.app)(task_id, list(args), {}, {"id": task_id, "args": list(args), "kwargs": {}})
    return str(task.AsyncResult(task_id).state)


def test_7_commit_fails_after_the_success_was_stored() -> None:
    """With the new code the task has failed, as its rows have."""

    def refuse(session: Session) -> None:
        raise OperationalError("COMMIT", {}, Exception("refused"))

    event.listen(Session, "before_commit", refuse)
    try:
        states = [_stored_state(task, "a title") for task in (step_2_hooks.import_document, ours.import_document)]
    finally:
        event.remove(Session, "before_commit", refuse)
        step_2_hooks.import_document.session.close()

    assert states == ["SUCCESS", "FAILURE"]
    assert _titles() == ["first"]


def test_8_ignored_task_keeps_its_connection() -> None:
    """After ten of the old ones a pool of ten is empty."""
    with pytest.raises(LeakError, match=r"step_2_hooks\.py"), no_leaks():
        step_2_hooks.skip.apply((1,))
    step_2_hooks.skip.session.close()

    with no_leaks():
        ours.skip.apply((1,))


@pytest.mark.parametrize(
    ("task", "titles"),
    [(step_3_scoped_session.import_document, ["renamed", "bad"]), (ours.import_and_rename, ["first"])],
    ids=["old", "new"],
)
def test_9_task_in_a_task_commits_half_of_the_outer_one(task: Any, titles: list[str]) -> None:
    """The outer task fails; of its work nothing may stay."""
    task.apply(("bad",))

    assert _titles() == titles
