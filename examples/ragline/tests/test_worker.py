"""Real workers: documents go through whole while processes, or all workers at once, are killed."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
from celery_alchemy.upkeep import status
from rich.console import Console
from rich.progress import Progress
from sqlalchemy import func, select

from pipelines import empty_index
from ragline import ingestion
from ragline.app import alchemy, settings
from ragline.audit import audit
from ragline.embedders import NO_EMBEDDER
from ragline.intake import Outcome
from ragline.progress import Progress as Counts
from ragline.progress import failures
from ragline.states import State
from ragline.tables import Source
from ragline.workers import child_processes, temporary_worker

DOCUMENTS = 40
DEADLINE_SECONDS = 150
CONSOLE = Console(file=io.StringIO())


@pytest.fixture
def outcomes(tmp_path: Path) -> dict[str, Outcome]:
    """An empty index into which documents of several chunks, and one that is bad, have been taken."""
    empty_index()
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(DOCUMENTS):
        paragraphs = (f"Paragraph {at} of document {number} is about savepoints." for at in range(60))
        (folder / f"document-{number}.md").write_text("\n\n".join(paragraphs))
    (folder / "empty.md").write_bytes(b"")
    return ingestion.take_in_files([folder], NO_EMBEDDER, CONSOLE)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no worker is done between two looks."""
    monkeypatch.setattr(ingestion, "LOOK_SECONDS", 0.05)


@contextmanager
def worker() -> Iterator[Popen[bytes]]:
    """A worker of two processes."""
    with temporary_worker(home=settings.home, processes=2) as process:
        yield process


def follow(outcomes: dict[str, Outcome], process: Popen[bytes], act: Callable[[Counts], None]) -> Counts:
    """Follow the documents to their end, or to the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS

    def look(counts: Counts, _: Progress) -> None:
        assert time.monotonic() < deadline, f"not settled in time: {counts}, {status(alchemy.engine)}"
        assert process.poll() is None, (settings.home / "worker.log").read_text()
        act(counts)

    return ingestion.follow(outcomes, CONSOLE, look)


def check_whole(counts: Counts) -> None:
    """Every document is ready, whole and found once; the bad one failed, with its reason; no message is left."""
    assert counts.documents == {State.READY: DOCUMENTS, State.FAILED: 1}
    with alchemy.session() as session:
        assert audit(session) == []
        assert [failure.reason for failure in failures(session)] == ["The file is empty."]
        assert session.scalar(select(func.count(Source.id))) == DOCUMENTS + 1
    messages = status(alchemy.engine)
    assert (messages["waiting"], messages["owed"], messages["dead"]) == (0, 0, 1)


def test_killed_worker_processes_lose_and_double_nothing(outcomes: dict[str, Outcome]) -> None:
    """A crashed worker's tasks are orphaned (ragflow#15805): here others do them, each once."""
    killed: list[int] = []

    with worker() as process:

        def kill_some(counts: Counts) -> None:
            if len(killed) < 3 and counts.settled >= (len(killed) + 1) * DOCUMENTS // 5:
                alive = [pid for pid in child_processes(process.pid) if pid not in killed]
                if alive:
                    os.kill(alive[0], signal.SIGKILL)
                    killed.append(alive[0])

        counts = follow(outcomes, process, kill_some)

    assert killed
    check_whole(counts)


def test_idle_processes_that_are_killed_are_replaced(tmp_path: Path) -> None:
    """A process that is killed while it waits for a task takes nothing with it that the others need."""
    before, after = tmp_path / "before.md", tmp_path / "after.md"
    before.write_text("A document that comes before the kill.")
    after.write_text("A document that comes after the kill.")

    with worker() as process:
        follow(ingestion.take_in_files([before], NO_EMBEDDER, CONSOLE), process, lambda _: None)
        for idle in child_processes(process.pid):
            os.kill(idle, signal.SIGKILL)
        counts = follow(ingestion.take_in_files([after], NO_EMBEDDER, CONSOLE), process, lambda _: None)

    assert counts.documents == {State.READY: 1}


class AllKilledError(Exception):
    """The worker and all of its processes were killed."""


def test_documents_go_on_after_all_workers_and_their_messages_are_gone(outcomes: dict[str, Outcome]) -> None:
    """The queue is lost and documents run for ever (ragflow#8575): here what is owed is sent again."""
    with worker() as process:

        def kill_all(counts: Counts) -> None:
            if counts.settled:
                os.killpg(process.pid, signal.SIGKILL)
                raise AllKilledError

        with pytest.raises(AllKilledError):
            follow(outcomes, process, kill_all)
    for message in (settings.home / "broker" / "messages").iterdir():
        message.unlink()
    before = ingestion.count(outcomes)
    assert before.settled < before.total, "the worker was done before it was killed"

    with worker() as process:
        counts = follow(outcomes, process, lambda _: None)

    check_whole(counts)
