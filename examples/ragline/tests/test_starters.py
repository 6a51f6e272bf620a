"""Commands that start a worker and are killed with SIGKILL: the worker ends too, and loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from ragline.workers import ENDS_WITH_STARTER, child_processes, end_with_starter
from servers import Answer, Question, eventually, letter_vectors, serving
from test_commands import ragline
from test_confinement import is_alive
from test_deployment import running

ENDED_SECONDS = 10.0


def kill_and_see_all_end(process: subprocess.Popen[str]) -> None:
    """Kill a command: all that it has started ends."""
    family = descendants(process.pid)
    process.kill()
    process.wait()
    try:
        eventually(lambda: not any(map(is_alive, family)), seconds=ENDED_SECONDS)
    finally:
        for pid in filter(is_alive, family):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    return [one for child in child_processes(pid) for one in (child, *descendants(child))]


def test_worker_ends_with_a_server_that_is_killed(tmp_path: Path) -> None:
    """Nobody would stop it later, and a new `ragline serve --worker` would start one more."""
    with running("serve", "--worker", "--port", "0", RAGLINE_HOME=str(tmp_path)) as served:
        eventually(lambda: len(descendants(served.pid)) >= 3, seconds=60)

        kill_and_see_all_end(served)


def test_worker_ends_with_a_server_that_is_killed_before_it_is_ready(tmp_path: Path) -> None:
    """It has not begun to listen to signals, nor taken a step."""
    with running("serve", "--worker", "--port", "0", RAGLINE_HOME=str(tmp_path)) as served:
        eventually(lambda: bool(child_processes(served.pid)), seconds=60)

        kill_and_see_all_end(served)


def test_worker_of_a_killed_ingest_ends_the_step_that_it_is_at(tmp_path: Path) -> None:
    """What it has begun is not done twice: the vectors that were asked for are stored."""
    whale = tmp_path / "whale.md"
    whale.write_text("The blue whale is the largest animal.")
    asked = threading.Event()

    def slow(question: Question) -> Answer:
        answer = letter_vectors(question)
        if whale.read_text() not in question.body["input"]:
            return answer
        asked.set()
        return Answer(answer.body, delay_seconds=2)

    home = tmp_path / "home"
    with serving(slow) as server:
        environment = {
            "RAGLINE_EMBEDDER": "openai",
            "RAGLINE_EMBEDDINGS_URL": server.url,
            "RAGLINE_EMBEDDINGS_MODEL": "letters",
        }
        with running("ingest", str(whale), RAGLINE_HOME=str(home), **environment) as process:
            assert asked.wait(60)

            kill_and_see_all_end(process)

        listed = ragline(home, "list", "--json", **environment)

    assert '"state": "ready"' in listed.stdout


def test_worker_that_a_person_starts_is_its_own_master(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its standard input may be anything, also one that is at its end."""
    monkeypatch.delenv(ENDS_WITH_STARTER, raising=False)
    before = threading.enumerate()

    end_with_starter()

    assert threading.enumerate() == before
