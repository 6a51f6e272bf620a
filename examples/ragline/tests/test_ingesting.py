"""`ragline ingest` when something is missing: files, workers, the broker, or the person's patience."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from kombu.asynchronous import Hub
from rich.console import Console

from ragline.arrivals import Taken
from ragline.bars import Bars
from ragline.errors import NobodyWorksError
from ragline.files import LeftOut
from ragline.following import QUIET_SECONDS, UNANSWERED, Patience
from ragline.ingestion import print_left_out
from ragline.progress import Progress
from ragline.states import State
from ragline.workers import wake_at_signals
from servers import Answer, Question, eventually, letter_vectors, serving
from test_commands import ragline

AWAY = "The broker amqp://guest:***@127.0.0.1:1// does not answer: the documents are worked on when"
WHALE = "The blue whale is the largest animal."


@pytest.fixture
def whale(tmp_path: Path) -> Path:
    """A file in a folder."""
    file = tmp_path / "documents" / "whale.md"
    file.parent.mkdir()
    file.write_text(WHALE)
    return file


def test_a_path_that_does_not_exist_is_refused_and_nothing_is_kept(tmp_path: Path, whale: Path) -> None:
    """Neither it nor what was named beside it: a mistake in a list of files is mended and typed again."""
    result = ragline(tmp_path / "home", "ingest", str(whale), str(tmp_path / "wale.md"))

    assert result.returncode == 1
    assert result.stderr == f"{tmp_path / 'wale.md'} is not there: nothing was taken in.\n"
    assert ragline(tmp_path / "home", "list").stdout == "No documents.\n"


def test_files_that_are_gone_are_told_and_forgotten_when_asked_for(tmp_path: Path, whale: Path) -> None:
    """A hint first; with `--prune` they are forgotten, also when the whole path is gone."""
    home, folder = tmp_path / "home", whale.parent
    (folder / "gone.md").write_text("This one goes.")
    ragline(home, "ingest", "--no-wait", str(folder))
    (folder / "gone.md").unlink()

    hinted = ragline(home, "ingest", "--no-wait", str(folder))
    pruned = ragline(home, "ingest", "--no-wait", "--prune", str(folder))
    whale.unlink()
    refused = ragline(home, "ingest", "--no-wait", str(whale))
    named = ragline(home, "ingest", "--no-wait", "--prune", str(whale))

    gone = folder / "gone.md"
    hint = f"1 file is gone but can still be found: {gone}; `ragline ingest --prune {folder}` forgets"
    assert hint in hinted.stdout
    assert f"1 file is gone, and forgotten: {gone}." in pruned.stdout
    assert "1 file: 1 unchanged." in pruned.stdout
    assert "say `ragline ingest --prune`" in refused.stderr
    assert f"1 file is gone, and forgotten: {whale}." in named.stdout
    assert ragline(home, "list").stdout == "No documents.\n"


@pytest.mark.parametrize(
    ("options", "environment", "told"),
    [
        (("--no-worker",), {}, "No worker is running: start one with `ragline worker`."),
        ((), {"RAGLINE_BROKER_URL": "amqp://guest:secret@127.0.0.1:1//"}, AWAY),
    ],
)
def test_ingest_does_not_wait_for_a_worker_that_is_not_there(
    tmp_path: Path, whale: Path, options: tuple[str, ...], environment: dict[str, str], told: str
) -> None:
    """It says what waits, and by its exit code that not all is done."""
    result = ragline(tmp_path / "home", "ingest", *options, str(whale), **environment)

    assert result.returncode == 1
    assert told in result.stdout
    assert result.stderr == ""
    assert "1 document waits in the queue" in result.stdout
    assert "1 file: 1 added." in result.stdout


def test_patience_ends_when_nothing_changes_and_nobody_answers() -> None:
    """Not while something changes, nor for one question without an answer."""
    now = [0.0]
    answers: list[set[str] | None] = [None, set(), {"a", "b"}, *([{"a"}] * UNANSWERED)]
    patience = Patience(["a", "b"], lambda: answers.pop(0), clock=lambda: now[0])

    def look(done: int) -> None:
        now[0] += QUIET_SECONDS
        patience.look(Progress({State.READY: done}, 0, 0, 0))

    for done in range(9):
        look(done)
    for _ in range(3):
        look(8)
    for _ in range(UNANSWERED - 1):
        look(8)
    with pytest.raises(NobodyWorksError, match="No worker takes from b: start one"):
        look(8)
    assert answers == []


def test_a_worker_for_other_work_is_not_waited_for(tmp_path: Path, whale: Path) -> None:
    """One that only embeds reads no documents: `ingest` says which queue nobody takes from."""
    home = tmp_path / "home"
    environment = {**os.environ, "RAGLINE_HOME": str(home)}
    command = [sys.executable, "-c", "from ragline.cli import main; main()"]
    options = ("worker", "--queue", "embedding", "--processes", "1")
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
    try:
        eventually(lambda: b"ready." in (tmp_path / "log").read_bytes(), seconds=60)
        result = ragline(home, "ingest", "--no-worker", str(whale))
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(timeout=60)

    assert result.returncode == 1
    assert "No worker takes from ragline-parsing: start one with `ragline worker`." in result.stdout


def test_an_interrupted_ingest_says_what_waits_and_how_to_go_on(tmp_path: Path, whale: Path) -> None:
    """Ctrl-C lets the worker finish its step; again, it ends at once. What is in the queue stays there."""
    asked: list[Question] = []

    def slow(question: Question) -> Answer:
        asked.append(question)
        answer = letter_vectors(question)
        return Answer(answer.body, delay_seconds=0 if WHALE not in question.body["input"] else 60)

    home = tmp_path / "home"
    with serving(slow) as server:
        environment = {
            "RAGLINE_EMBEDDER": "openai",
            "RAGLINE_EMBEDDINGS_URL": server.url,
            "RAGLINE_EMBEDDINGS_MODEL": "letters",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", "from ragline.cli import main; main()", "ingest", str(whale)],
            env={**os.environ, "RAGLINE_HOME": str(home), "COLUMNS": "200", **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        eventually(lambda: any(WHALE in question.body["input"] for question in asked), seconds=60)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        while "finishes the step" not in (line := process.stdout.readline()):
            assert line, "it ended without a word"
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Interrupted: 1 document waits in the queue, and nothing of it is lost." in told
    assert f"`ragline ingest {whale}` goes on where it was" in told
    assert "`ragline worker` works on what is in the queue" in told


def test_a_worker_does_not_outlive_the_command_that_is_ended(tmp_path: Path, whale: Path) -> None:
    """As when a terminal is closed, or a service manager ends the command: nobody would stop it later."""
    home = tmp_path / "home"
    script = (
        "import os, signal\n"
        "from ragline import workers\n"
        "from ragline.app import settings\n"
        "with workers.temporary_worker(home=settings.home, processes=1) as worker:\n"
        "    print(worker.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    signal.pause()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "RAGLINE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert result.returncode == 128 + signal.SIGHUP
    with pytest.raises(ProcessLookupError):
        os.kill(int(result.stdout), 0)


def test_a_pipe_and_a_device_are_told_and_not_waited_for(tmp_path: Path, whale: Path) -> None:
    """In a folder they are left out; who names one reads why it failed."""
    os.mkfifo(whale.parent / "pipe.txt")
    options = ("ingest", "--no-wait", str(whale.parent), "/dev/zero", "/dev/stdin")

    result = ragline(tmp_path / "home", *options)

    assert result.returncode == 1
    assert f"1 pipe, socket or device was left out: {whale.parent / 'pipe.txt'}.\n" in result.stdout
    assert "3 files: 1 added, 2 failed." in result.stdout
    assert "failed zero: It is no ordinary file." in result.stdout


def test_the_summary_does_not_wait_for_the_end_of_the_worker(tmp_path: Path, whale: Path) -> None:
    """It is read while the worker, which the command then waits for, is still there."""
    program = (
        "from ragline import cli, workers\n"
        "real = workers.stop\n"
        "def stop(worker, **options):\n"
        "    print('ends', worker.poll(), options, flush=True)\n"
        "    real(worker, **options)\n"
        "workers.stop = stop\n"
        "from ragline import helper\n"
        "helper.stop = stop\n"
        "cli.main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "ingest", str(whale)],
        env={**os.environ, "RAGLINE_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )

    assert result.stdout.splitlines()[-3:] == [
        "1 file: 1 added.",
        "ends None {'is_idle': True}",
        "ends 0 {}",
    ]


def test_a_worker_that_sleeps_hears_a_signal_at_once() -> None:
    """Its event loop would sleep until the next timer is due, seconds later."""
    loop = Hub()
    consumer = SimpleNamespace(hub=loop)
    loop.timer.call_after(60, lambda: None)
    silent, _other = socket.socketpair()
    loop.add_reader(silent, lambda: None)
    wake_at_signals(consumer)
    noted: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: noted.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        started = time.monotonic()
        next(loop.loop)
        took = time.monotonic() - started
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.set_wakeup_fd(-1)
        loop.close()

    assert noted == [signal.SIGALRM]
    assert took < 0.9


def test_no_name_tells_the_terminal_anything(tmp_path: Path) -> None:
    """Whatever a file is called, each message is a line of signs that can be seen."""
    home, folder = tmp_path / "home", tmp_path / "docs"
    folder.mkdir()
    bad = "\x1b[31m\n\x9b2J"
    for name in (f"text{bad}.md", f"picture.{bad}"):
        (folder / name).write_bytes(b"\x01" * 99)
    os.mkfifo(folder / f"pipe{bad}.txt")
    commands = [
        ("ingest", str(folder)),
        ("list",),
        ("ingest", f"{folder}/{bad}"),
        ("delete", bad),
        ("delete", f"{folder}/text{bad}.md"),
    ]

    told = [ragline(home, *command) for command in commands]

    for result in told:
        assert "\x1b" not in result.stdout + result.stderr
        assert "\x9b" not in result.stdout + result.stderr
        assert "␛[31m␊\ufffd2J" in result.stdout + result.stderr
    assert [result.stderr.count("\n") for result in told] == [0, 0, 1, 1, 0]


def test_empty_files_of_a_folder_are_no_failure(tmp_path: Path, whale: Path) -> None:
    """Packages of Python have many; one that is named is a mistake."""
    for name in ("__init__.py", "sub/__init__.py"):
        (whale.parent / name).parent.mkdir(exist_ok=True)
        (whale.parent / name).write_text("\n" * len(name.partition("/")[2]))

    result = ragline(tmp_path / "home", "ingest", str(whale.parent))
    named = ragline(tmp_path / "home", "ingest", str(whale.parent / "__init__.py"))

    assert (result.returncode, named.returncode) == (0, 1)
    assert "2 empty files were left out.\n" in result.stdout
    assert "1 file: 1 added.\n" in result.stdout
    assert "failed __init__.py: The file is empty." in named.stdout


def test_documents_are_counted_up_to_one_total(tmp_path: Path, whale: Path) -> None:
    """Two files of the same bytes are one document: no bar shows another number of them."""
    (whale.parent / "copy.md").write_text(WHALE)

    result = ragline(tmp_path / "home", "ingest", str(whale.parent))

    assert re.findall(r"documents .*?(\d+/\S+)", result.stdout) == ["1/1"]
    assert re.findall(r"taking in .*?(\d+/\d+)", result.stdout) == ["2/2"]


def test_all_kinds_that_were_left_out_are_named() -> None:
    """However many there are; the most frequent first."""
    console = Console(width=80, file=StringIO(), record=True)
    kinds = [f".k{number}" for number in range(9)]
    files = [Path(f"a{kind}") for kind in kinds] + [Path("b.K3"), Path("Makefile"), Path("LICENSE")]

    print_left_out(Taken(left_out=LeftOut(other_kinds=files), vanished=[Path("c.md")]), console)

    told = console.export_text()
    assert told.startswith("12 files of other kinds were left out (.k3 (2), without an extension (2), .k0, ")
    assert all(kind in told for kind in kinds)
    assert "Gone before it could be read: c.md." in told


def test_no_spinner_is_left_on_the_screen() -> None:
    """Neither when all is done nor when it was broken off; and no bar of which nothing is known."""
    file = StringIO()
    console = Console(width=80, file=file, force_terminal=True)

    def break_off() -> None:
        with Bars(console) as bars:
            bars.add_task("documents", total=9, completed=3, note="")
            bars.add_task("chunks", total=None, note="")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()

    last = file.getvalue().rpartition("documents")
    assert "3/9" in last[2]
    assert "chunks" not in last[2]
    assert not any("\u2800" <= sign <= "\u28ff" for sign in last[0][-20:])
