"""Documents and chunks a second through ragline's pipeline, beside the same work in one plain Python loop.

    python benchmarks/ingest.py --rounds 3 --characters 300000

The loop parses, splits and embeds the documents of the demo one after the other, without Celery, database or
messages: the limit. The workers do the same with everything that ragline promises. The overhead is the CPU
time of all worker processes, the parent included, that is not spent on parsing, splitting and embedding.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ragline.intake import Offer

WARM_UP_DOCUMENTS = 8
DEADLINE_SECONDS = 900


@dataclass(frozen=True)
class Run:
    """What one run took.

    Attributes:
        documents: how many were made ready.
        chunks: how many chunks they have.
        seconds: from the first document to the last, the model loaded before.
        overhead: CPU time beside the work, as a share of the work; 0 for the loop.
    """

    documents: int
    chunks: int
    seconds: float
    overhead: float = 0.0


def loop(folder: Path) -> Run:
    """The work without anything around it, in this process."""
    from ragline.app import settings
    from ragline.embedders import load_embedder
    from ragline.formats import detect_format
    from ragline.minilm.embedder import MiniLM
    from ragline.parsers import parse
    from ragline.splitter import split

    embedder = load_embedder(MiniLM.name, settings.cache)
    assert embedder is not None
    embedder.embed(["loaded before the clock runs"])
    documents = chunks = 0
    started = time.perf_counter()
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        detect_format(data, file.name)
        parsed = parse(data, file.name)
        passages = [parsed.text[chunk.start : chunk.end] for chunk in split(parsed, embedder.counter)]
        for at in range(0, len(passages), settings.batch_chunks):
            embedder.embed(passages[at : at + settings.batch_chunks])
        documents += 1
        chunks += len(passages)
    return Run(documents, chunks, time.perf_counter() - started)


def pipeline(folder: Path, processes: int, clocks: Path) -> Run:
    """The same documents through a worker of so many processes, in the home of the settings."""
    from sqlalchemy import func, select

    from ragline.app import alchemy, app, create_tables, settings
    from ragline.tables import Document
    from ragline.workers import running_workers

    create_tables(alchemy)
    files = sorted(folder.iterdir())
    warm_up = []
    for number in range(WARM_UP_DOCUMENTS):
        file = settings.home / f"warm-up-{number}.txt"
        file.write_text(f"Document {number} has every process load the model.", encoding="utf-8")
        warm_up.append(file)
    with _worker(processes) as worker:
        while not running_workers(app):
            assert worker.poll() is None, (settings.home / "worker.log").read_text()
        _take_in(_offers(warm_up))
        before = _settled()
        offers = _offers(files)
        work, cpu = _sum(clocks), _cpu_seconds(worker.pid)
        started = time.time()
        _take_in(offers)
        documents, chunks = _settled()
        work, cpu = _sum(clocks) - work, _cpu_seconds(worker.pid) - cpu
        with alchemy.session() as session:
            ended = session.scalar(select(func.max(Document.ready_at)))
    assert ended is not None
    return Run(documents - before[0], chunks - before[1], ended.timestamp() - started, (cpu - work) / work)


def _offers(files: list[Path]) -> list[Offer]:
    from ragline.app import settings
    from ragline.files import read_file

    return [read_file(file, max_bytes=settings.max_bytes) for file in files]


def _take_in(offers: list[Offer]) -> None:
    from ragline import controls
    from ragline.app import alchemy
    from ragline.minilm.embedder import MiniLM
    from ragline.recipes import recipe_for

    recipe = recipe_for(MiniLM.name)
    for offer in offers:
        with alchemy.begin() as session:
            controls.add(session, offer, recipe)


def _settled() -> tuple[int, int]:
    """Wait until nothing more happens, and return how many documents and chunks there are."""
    from ragline.app import alchemy
    from ragline.progress import measure

    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        with alchemy.session() as session:
            counts = measure(session)
        if counts.settled == counts.total:
            return counts.total, counts.chunks
        assert time.monotonic() < deadline, counts
        time.sleep(0.5)


@contextmanager
def _worker(processes: int) -> Iterator[subprocess.Popen[bytes]]:
    from ragline.app import settings
    from ragline.workers import stop, worker_arguments

    with (settings.home / "worker.log").open("ab") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "timed", *worker_arguments(processes=processes)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield worker
    finally:
        stop(worker)


def _sum(clocks: Path) -> float:
    return sum(float(file.read_text(encoding="ascii") or 0) for file in clocks.iterdir())


def _cpu_seconds(worker: int) -> float:
    """The CPU time of a worker and its processes so far (Linux)."""
    from ragline.workers import child_processes

    ticks = 0
    for process in (worker, *child_processes(worker)):
        # Fields 14 and 15 are user and system time (Source: proc(5)); the name before them may hold spaces.
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _in_a_process_of_its_own(kind: str, folder: Path, threads: dict[str, str]) -> Run:
    """Every run begins with a fresh process and a fresh home."""
    with tempfile.TemporaryDirectory() as place:
        clocks = Path(place, "clocks")
        clocks.mkdir()
        environment = {
            **os.environ,
            **threads,
            "RAGLINE_HOME": str(Path(place, "home")),
            "RAGLINE_BENCHMARK_CLOCKS": str(clocks),
        }
        output = subprocess.run(
            [sys.executable, __file__, "--run", kind, "--folder", str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
    return Run(**json.loads(output.splitlines()[-1]))


def _join(folder: Path, count: int) -> None:
    """Make one document of every so many."""
    files = sorted(folder.iterdir())
    for at in range(0, len(files), count):
        some = files[at : at + count]
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in some)
        for file in some:
            file.unlink()
        (folder / f"joined-{at}.rst").write_text(text, encoding="utf-8")


def _compare(rounds: int, characters: int, joined: int) -> None:
    from ragline.demo import BAD_FILES, write_documents

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "documents")
        write_documents(folder, characters)
        for name in BAD_FILES:
            (folder / name).unlink()
        for copy in folder.glob("copy of *"):
            copy.unlink()
        _join(folder, joined)
        kinds = ("loop", "1", "2")
        runs: dict[str, list[Run]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind in kinds:  # in turn, so that other load on the machine hits all alike
                runs[kind].append(_in_a_process_of_its_own(kind, folder, {"OMP_NUM_THREADS": "1"}))
    print("| | documents/s | chunks/s | times the loop | overhead |")
    print("|---|---|---|---|---|")
    limit = statistics.median(run.seconds for run in runs["loop"])
    for kind in kinds:
        seconds = statistics.median(run.seconds for run in runs[kind])
        ratio = statistics.median(
            alone.seconds / run.seconds for alone, run in zip(runs["loop"], runs[kind], strict=True)
        )
        overhead = statistics.median(run.overhead for run in runs[kind])
        run = runs[kind][0]
        name = {"loop": "plain loop", "1": "1 process", "2": "2 processes"}[kind]
        print(
            f"| {name} | {run.documents / seconds:.1f} | {run.chunks / seconds:.1f}"
            f" | {ratio:.2f} | {overhead:.1%} |"
        )
    first = runs["loop"][0]
    print(f"\n{first.documents} documents, {first.chunks} chunks, {limit:.1f} s in the loop,")
    print(f"median of {rounds} rounds, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}.")


def main() -> None:
    """Compare, or be one of the compared."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--characters", type=int, default=300_000, help="how much text the documents have")
    options.add_argument("--joined", type=int, default=1, help="how many of them make one document")
    options.add_argument("--run", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.run is None:
        _compare(given.rounds, given.characters, given.joined)
    elif given.run == "loop":
        print(json.dumps(asdict(loop(given.folder))))
    else:
        clocks = Path(os.environ["RAGLINE_BENCHMARK_CLOCKS"])
        print(json.dumps(asdict(pipeline(given.folder, int(given.run), clocks))))


if __name__ == "__main__":
    main()
