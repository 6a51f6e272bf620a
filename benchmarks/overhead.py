"""What a session costs a task: microseconds for one task in Celery's own tracer, beside every other way to get a session.

Run it with ``make bench-overhead``, or ``python benchmarks/overhead.py --help``. It times nothing but
``celery.app.trace.build_tracer``: no broker, no result backend. All contenders are measured in
turn, round after round, so that whatever else the machine does meets all of them. Compared are CPU
times, of the best rounds of two contenders in the same process: waiting for the server is the same
for all who send the same statements, and its scatter is a hundred times what is looked for; the
best rounds are those that nothing else disturbed.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any, NamedTuple

import contenders
from celery import Celery
from celery.app.trace import build_tracer
from chart import draw
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from table import OURS, Comparison, Row

#: Contenders that may share a process, with what they are compared to in it. Those apart have hooks that would slow the others: ours
#: on SQLAlchemy's Session, wireup's on Celery's signals.
REFERENCES = ("plain", "hand_written")
GROUPS: dict[str, tuple[str, ...]] = {
    "ours": (*REFERENCES, "hand_written_sessionmaker", "injected", "self_session"),
    "others": (*REFERENCES, "before_start", "dishka", "modern_di", "flask"),
    "wireup": (*REFERENCES, "wireup"),
}
POSTGRESQL = "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
SCHEMA = "celery_alchemy_overhead"


# Timed after as many calls as bring code and data of this contender back into the processor's caches.
WARM_UP_CALLS = 20


class Spent(NamedTuple):
    """Microseconds for one task: as a clock on the wall tells, and as this process has computed."""

    wall_us: float
    cpu_us: float


@dataclass(frozen=True)
class Cell:
    """One thing that is timed.

    Attributes:
        database: "sqlite" or "postgresql".
        work: A key of ``contenders.ACTS``.
        group: A key of GROUPS: the process it runs in.
        contender: A function of ``contenders.py``.
    """

    database: str
    work: str
    group: str
    contender: str


# --- in a process of its own ---------------------------------------------------------------------------------------------


def serve(pipe: Connection, group: str, url: URL) -> None:
    """Time what is asked for: receives ``((contender, work), calls)``, sends a Spent; ends at None."""
    app = Celery("overhead", set_as_current=True)
    app.conf.update(task_ignore_result=True, broker_url="memory://")
    names = {key: _declare(app, url, *key) for key in _keys(group)}
    # Looked up in the app, as a worker does: what the decorator returned is a proxy.
    tracers = {key: build_tracer(name, app.tasks[name], app=app) for key, name in names.items()}
    gc.collect()
    gc.freeze()
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        key, calls = asked
        pipe.send(_time(tracers[key], calls))


def _keys(group: str) -> Iterator[tuple[str, str]]:
    for contender in GROUPS[group]:
        for work in contenders.ACTS:
            if contender != "plain" or work == "untouched":
                yield contender, work


def _declare(app: Celery, url: URL, contender: str, work: str) -> str:
    ours, by_hand = contenders.ACTS[work]
    name = f"{contender}.{work}"
    declare: contenders.Contender = getattr(contenders, contender)
    declare(app, url, name, ours if contender in OURS else by_hand)
    return name


def _time(trace: Any, calls: int) -> Spent:
    # As a worker hands it over.
    request = {
        "id": "5cc5d0f2", "task": "body", "delivery_info": {}, "retries": 0, "is_eager": False,
        "timelimit": [None, None], "hostname": "worker@host", "called_directly": False,
    }  # fmt: skip
    gc.collect()
    gc.disable()
    for _ in range(WARM_UP_CALLS):
        outcome = trace("5cc5d0f2", (1,), {}, request)
    wall, cpu = perf_counter(), thread_time()
    for _ in range(calls):
        outcome = trace("5cc5d0f2", (1,), {}, request)
    spent = Spent((perf_counter() - wall) / calls * 1e6, (thread_time() - cpu) / calls * 1e6)
    gc.enable()
    if outcome[0] != 1:
        raise RuntimeError(f"the task failed: {outcome}")
    return spent


# --- in the first process ------------------------------------------------------------------------------------------------


@contextmanager
def serving(group: str, url: URL) -> Iterator[Connection]:
    """Start a process that serves a group; a fresh interpreter, which has imported nothing but its own contenders."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, group, url), daemon=True)
    process.start()
    there.close()
    here.recv()
    try:
        yield here
        here.send(None)
    finally:
        process.join(timeout=30)
        here.close()


def measure(urls: dict[str, URL], options: argparse.Namespace) -> dict[Cell, list[Spent]]:
    """Return what each round took; the lists of all cells are as long and in the same order."""
    times: dict[Cell, list[Spent]] = defaultdict(list)
    for generation in range(options.generations):
        # Two processes of the same program differ by a few percent, by where its memory happens to lie. So several.
        with ExitStack() as stack:
            pipes = {
                (database, group): stack.enter_context(serving(group, url))
                for database, url in urls.items()
                for group in options.groups
            }
            for number in range(options.rounds):
                _say(f"process set {generation + 1} of {options.generations}, round {number + 1} of {options.rounds}")
                for cell in _one_round(list(pipes)):
                    pipe = pipes[cell.database, cell.group]
                    pipe.send(((cell.contender, cell.work), options.calls))
                    times[cell].append(pipe.recv())
    _say("")
    return times


def _one_round(processes: list[tuple[str, str]]) -> Iterator[Cell]:
    """Name the cells in random order, but those that are compared with each other at one go."""
    random.shuffle(processes)
    for database, group in processes:
        for work in random.sample(list(contenders.ACTS), len(contenders.ACTS)):
            same_work = [contender for contender, its_work in _keys(group) if its_work == work]
            for contender in random.sample(same_work, len(same_work)):
                yield Cell(database, work, group, contender)


def _say(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{progress:60}", end="", file=sys.stderr)


def _best_cpu(spent: list[Spent], rounds: int) -> list[float]:
    """Return the CPU microseconds of the best round of each set of processes."""
    return [min(one.cpu_us for one in spent[start : start + rounds]) for start in range(0, len(spent), rounds)]


def compared(times: dict[Cell, list[Spent]], rounds: int) -> list[Comparison]:
    """Put the cells of a database and a work side by side, each against the reference in its own process."""
    comparisons: dict[tuple[str, str], Comparison] = {}
    for cell, own in times.items():
        if cell.contender in REFERENCES and cell.group != "ours":
            continue
        reference = "plain" if cell.work == "untouched" else "hand_written"
        best = _best_cpu(own, rounds)
        best_others = _best_cpu(times[Cell(cell.database, cell.work, cell.group, reference)], rounds)
        row = Row(
            cell.contender,
            median_us=median(spent.wall_us for spent in own),
            min_us=min(spent.wall_us for spent in own),
            more_us=median(a - b for a, b in zip(best, best_others, strict=True)),
            ratio=median(a / b for a, b in zip(best, best_others, strict=True)),
        )
        comparison = comparisons.setdefault((cell.database, cell.work), Comparison(cell.database, cell.work, reference, []))
        comparison.rows.append(row)
    order = list(contenders.ACTS)
    return sorted(comparisons.values(), key=lambda c: (c.database != "sqlite", order.index(c.work)))


@contextmanager
def databases(postgresql: str) -> Iterator[dict[str, URL]]:
    """Make the tables on a SQLite file and in a PostgreSQL schema, and remove them at the end."""
    with tempfile.TemporaryDirectory() as folder:
        urls = {"sqlite": URL.create("sqlite", database=str(Path(folder) / "overhead.db"))}
        _create_tables(urls["sqlite"])
        server = create_engine(postgresql, isolation_level="AUTOCOMMIT")
        try:
            with server.connect() as connection:
                connection.execute(text(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE"))
                connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
        except OperationalError as error:
            print(f"PostgreSQL is not measured, name a server with --postgresql: {error.orig}")
            yield urls
            return
        settings = f"-csearch_path={SCHEMA} -csynchronous_commit=off"
        urls["postgresql"] = make_url(postgresql).update_query_dict({"options": settings})
        _create_tables(urls["postgresql"])
        try:
            yield urls
        finally:
            with server.connect() as connection:
                connection.execute(text(f"DROP SCHEMA {SCHEMA} CASCADE"))


def _create_tables(url: URL) -> None:
    engine = contenders.engine_for(url)
    contenders.Base.metadata.create_all(engine)
    with contenders.Session(engine) as session:
        session.add(contenders.Book(id=1, title="Emma"))
        session.commit()
    engine.dispose()


def main() -> None:
    """Measure, print the tables and the bar, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="rounds for each set of processes (%(default)s)")
    parser.add_argument("--generations", type=int, default=4, help="sets of processes (%(default)s)")
    parser.add_argument("--calls", type=int, default=40, help="tasks in one timing (%(default)s)")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS, help="(all)")
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], help="(both)")
    parser.add_argument("--postgresql", default=POSTGRESQL, help="URL of a server (%(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("build/overhead.svg"), help="(%(default)s)")
    options = parser.parse_args()
    with databases(options.postgresql) as urls:
        wanted = {name: url for name, url in urls.items() if name in options.databases}
        comparisons = compared(measure(wanted, options), options.rounds)
    for comparison in comparisons:
        print(comparison.as_text())
    for comparison in comparisons:
        print(comparison.verdict())
    print(draw(comparisons, options.plot))


if __name__ == "__main__":
    main()
