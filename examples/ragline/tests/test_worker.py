"""Real workers: documents go through whole while processes, or all workers at once, are killed."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
from celery_alchemy.operations.dead_tasks import status
from rich.console import Console
from sqlalchemy import func, select

from pipelines import empty_index
from ragline import following
from ragline.app import alchemy, settings
from ragline.arrivals import take_in_files
from ragline.audit import audit
from ragline.errors import RaglineError
from ragline.intake import Outcome
from ragline.progress import Progress as Counts
from ragline.progress import failures
from ragline.states import NO_EMBEDDER, State
from ragline.tables import Source
from ragline.workers import check_runs, child_processes, temporary_worker

DOCUMENTS = 40
DEADLINE_SECONDS = 150
CONSOLE = Console(file=io.StringIO())

Outcomes = dict[str, Outcome]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents of several chunks and one that is bad, beside an empty index."""
    empty_index()
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(DOCUMENTS):
        paragraphs = (f"Paragraph {at} of document {number} is about savepoints." for at in range(60))
        (folder / f"document-{number}.md").write_text("\n\n".join(paragraphs))
    (folder / "empty.html").write_text("<p></p>")
    return folder


@contextmanager
def worker() -> Iterator[Popen[bytes]]:
    """A worker of two processes."""
    with temporary_worker(home=settings.home, processes=2) as process:
        yield process


def take_in(*paths: Path, taken: Callable[[Outcomes], None] = lambda _: None) -> Outcomes:
    """Take documents in; `taken` is called after each."""
    return take_in_files(paths, NO_EMBEDDER, CONSOLE, lambda outcomes, _: taken(outcomes))


def follow(outcomes: Outcomes, process: Popen[bytes], *, until: int | None = None) -> Counts:
    """Follow the documents until some, or all, are settled."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (counts := following.count(outcomes.values())).settled < (counts.total if until is None else until):
        assert time.monotonic() < deadline, f"not settled in time: {counts}, {status(alchemy.engine)}"
        assert process.poll() is None, (settings.home / "worker.log").read_text()
        time.sleep(0.05)
    return counts


def check_whole(counts: Counts) -> None:
    """Every document is ready, whole and found once; the bad one failed, with its reason; no message is left."""
    assert counts.documents == {State.READY: DOCUMENTS, State.FAILED: 1}
    with alchemy.session() as session:
        assert audit(session) == []
        assert [failure.reason for failure in failures(session)] == ["The document holds no text."]
        assert session.scalar(select(func.count(Source.id))) == DOCUMENTS + 1
    messages = status(alchemy.engine)
    assert (messages["waiting"], messages["owed"], messages["dead"]) == (0, 0, 1)


def test_killed_worker_processes_lose_and_double_nothing(folder: Path) -> None:
    """A crashed worker's tasks are orphaned (ragflow#15805): here others do them, each once."""
    killed: list[int] = []

    with worker() as process:

        def kill_some(outcomes: Outcomes) -> None:
            """In the middle of the work: what was not taken in yet cannot be done yet."""
            if len(outcomes) % 10:
                return
            follow(outcomes, process, until=len(outcomes) // 2)
            # Those that were killed are replaced in a while.
            while not (alive := set(child_processes(process.pid)) - set(killed)):
                time.sleep(0.05)
            victim = min(alive)
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

        counts = follow(take_in(folder, taken=kill_some), process)

    assert len(killed) == DOCUMENTS // 10
    check_whole(counts)


def test_idle_processes_that_are_killed_are_replaced(tmp_path: Path) -> None:
    """A process that is killed while it waits for a task takes nothing with it that the others need."""
    before, after = tmp_path / "before.md", tmp_path / "after.md"
    before.write_text("A document that comes before the kill.")
    after.write_text("A document that comes after the kill.")

    with worker() as process:
        follow(take_in(before), process)
        for idle in child_processes(process.pid):
            os.kill(idle, signal.SIGKILL)
        counts = follow(take_in(after), process)

    assert counts.documents == {State.READY: 1}


def test_worker_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    """Its documents would never be settled: `ragline ingest` and `ragline demo` say where it tells why."""
    file = tmp_path / "whale.md"
    file.write_text("The blue whale is the largest animal.")
    empty_index()
    outcomes = take_in(file)
    with Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()

    with pytest.raises(RaglineError, match=r"The worker ended; .*worker\.log tells why"):
        following.follow(outcomes.values(), CONSOLE, lambda _: check_runs(ended, settings.home))

    empty_index()


def test_documents_go_on_after_all_workers_are_gone_at_once(folder: Path) -> None:
    """The queue is lost and documents run for ever (ragflow#8575): here what they held is another's soon."""
    with worker() as process:

        def kill_all(outcomes: Outcomes) -> None:
            """In the middle of the work: the other half of the documents is taken in when nobody works."""
            if len(outcomes) == DOCUMENTS // 2:
                follow(outcomes, process, until=1)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

        outcomes = take_in(folder, taken=kill_all)
    before = following.count(outcomes.values())

    with worker() as process:
        counts = follow(outcomes, process)

    assert 1 <= before.settled <= DOCUMENTS // 2
    check_whole(counts)
