"""`ragline demo`: real documents through a worker whose processes are killed, counted and searched."""

from __future__ import annotations

import importlib.metadata
import os
import pydoc_data.topics
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from sqlalchemy import func, select

from ragline import following, ingestion, presentation
from ragline.app import alchemy, settings
from ragline.arrivals import take_in_files
from ragline.audit import audit
from ragline.intake import Outcome
from ragline.minilm.embedder import has_onnx
from ragline.progress import failures
from ragline.retrieval import find
from ragline.states import NO_EMBEDDER
from ragline.steps import count_steps
from ragline.tables import Source
from ragline.workers import check_runs, child_processes, temporary_worker

PROCESSES = 2
KILL_AT = (0.25, 0.6)
"""A worker process is killed each time this share of the files is taken in, and half of those are done."""
MAX_CHARACTERS = 500_000
"""About 700 chunks, half a minute of embedding on two slow cores."""
MAX_README_CHARACTERS = 30_000
QUESTIONS = (
    "What happens when an exception is raised inside a with statement?",
    "Which object does a for loop call to get the next item?",
    "How are default parameter values evaluated?",
)
# Made to fail, each for a reason of its own.
BAD_FILES = {
    "empty.html": b"<p></p>",
    "picture.txt": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "broken.pdf": b"%PDF-1.7\nthis is no PDF after all\n",
}


def run(console: Console) -> list[str]:
    """Run the demonstration in the home of the settings, which should be fresh.

    Returns:
        What does not add up, one sentence each; empty when all is well.
    """
    started = time.monotonic()
    embedder = ingestion.choose_embedder(console)
    folder = settings.home / "documents"
    files = write_documents(
        folder, MAX_CHARACTERS if embedder == NO_EMBEDDER or has_onnx() else MAX_CHARACTERS // 2
    )
    console.print(
        f"{files} files: the language reference inside this Python, READMEs of the packages installed here,"
        f" a copy of one, and {len(BAD_FILES)} that are bad on purpose.\n"
        f"A worker of {PROCESSES} processes on one SQLite file, which is the broker too; some are killed."
    )
    with temporary_worker(home=settings.home, processes=PROCESSES) as worker:
        killer = _Killer(worker, files)
        outcomes = take_in_files([folder], embedder, console, killer.look)
        following.follow(outcomes.values(), console, lambda _: check_runs(worker, settings.home))
    ingestion.print_summary(outcomes, console)
    problems = _check(files, console)
    for question in QUESTIONS:
        console.rule(f"[bold]{question}")
        found = find(question, limit=1).passages
        presentation.print_passages(found, question, console)
        if not found:
            problems.append(f"Nothing was found for {question!r}.")
    verdict = "[green]The counts add up" if not problems else f"[red]{len(problems)} counts do not add up"
    killed = f"{len(killer.killed)} worker processes were killed with SIGKILL"
    if not problems:
        killed += ", and no document was lost or taken in twice"
    console.print(f"{verdict}[/]: {killed}; {time.monotonic() - started:.0f} seconds in all.")
    return problems


def write_documents(folder: Path, max_characters: int) -> int:
    """Write the documents of the demonstration below a folder.

    Returns:
        How many files were written.
    """
    folder.mkdir(parents=True)
    written = characters = 0
    copied = None
    for name, content in _documents():
        if characters + len(content) > max_characters:
            continue
        (folder / name).write_text(content, encoding="utf-8")
        characters += len(content)
        written += 1
        copied = copied or folder / name
    if copied is not None:
        shutil.copy(copied, folder / f"copy of {copied.name}")
        written += 1
    for name, data in BAD_FILES.items():
        (folder / name).write_bytes(data)
    return written + len(BAD_FILES)


def _documents() -> Iterator[tuple[str, str]]:
    readmes = _readmes()
    for topic, content in pydoc_data.topics.topics.items():
        yield f"python-{topic.lower()}.rst", content
        if readme := next(readmes, None):
            yield readme


def _readmes() -> Iterator[tuple[str, str]]:
    seen = set()
    for distribution in sorted(
        importlib.metadata.distributions(), key=lambda found: (found.name or "").lower()
    ):
        name = (distribution.name or "").lower()
        metadata = distribution.metadata.json
        content = metadata.get("description") or ""
        if name in seen or not isinstance(content, str) or not 1000 <= len(content) <= MAX_README_CHARACTERS:
            continue
        seen.add(name)
        declared = metadata.get("description_content_type") or "text/x-rst"
        yield f"readme-{name}{'.md' if 'markdown' in declared else '.rst'}", content


def _check(files: int, console: Console) -> list[str]:
    with alchemy.session() as session:
        problems = audit(session)
        failed = {failure.name for failure in failures(session)}
        sources = session.scalar(select(func.count(Source.id)))
    if failed != set(BAD_FILES):
        problems.append(f"Failed: {', '.join(sorted(failed))}; expected: {', '.join(sorted(BAD_FILES))}.")
    steps = count_steps()
    if steps.waiting or steps.begun:
        problems.append(f"{steps.waiting} steps wait, and {steps.begun} are begun.")
    if steps.dead != len(BAD_FILES):
        problems.append(f"{steps.dead} steps failed for good, and not {len(BAD_FILES)}.")
    if sources != files:
        problems.append(f"{files} files were taken in, and {sources} are known.")
    for problem in problems:
        console.print(f"[red]{problem}[/red]", soft_wrap=True)
    return problems


class _Killer:
    """Kills processes of the worker in the middle of its work, of which the rest is held back until then."""

    def __init__(self, worker: subprocess.Popen[bytes], files: int) -> None:
        self.worker = worker
        self.moments = {round(share * files) for share in KILL_AT}
        self.killed: list[int] = []

    def look(self, outcomes: dict[str, Outcome], bar: Progress) -> None:
        """Kill a process if this is a moment for it; called after each file that was taken in."""
        if len(outcomes) not in self.moments:
            return
        while (counts := following.count(outcomes.values())).settled < counts.total / 2:
            check_runs(self.worker, settings.home)
            time.sleep(following.LOOK_SECONDS)
        victim = [pid for pid in child_processes(self.worker.pid) if pid not in self.killed][-1]
        os.kill(victim, signal.SIGKILL)
        self.killed.append(victim)
        bar.console.print(f"[red]Killed worker process {victim} with SIGKILL.[/red]")
