"""The commands: what a person types and reads, and settings that cannot be used."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from pipelines import empty_index
from ragline import __version__, cli, demo
from ragline.bars import Bars
from ragline.errors import ConfigurationError
from ragline.progress import Order
from ragline.searching import Mode
from ragline.settings import QUEUES, settings_from
from ragline.states import State


def ragline(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a person does, in a home of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from ragline.cli import main; main()", *arguments],
        env={**os.environ, "RAGLINE_HOME": str(home), "COLUMNS": "200", **environment},
        capture_output=True,
        stdin=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_folder_is_ingested_and_searched_with_one_command_each(tmp_path: Path) -> None:
    """No worker is running: one is started for the time being. The bad file fails alone, with its reason."""
    home, folder = tmp_path / "home", tmp_path / "documents"
    folder.mkdir()
    (folder / "whale.md").write_text("# Whales\n\nThe blue whale is the largest animal.\n")
    (folder / "bee.html").write_text("<h1>Bees</h1><p>Bees dance to tell where flowers are.")
    (folder / "bad.txt").write_bytes(b"\x7fELF" + bytes(range(256)))
    (folder / "photo.png").write_bytes(b"left out")

    ingested = ragline(home, "ingest", str(folder))
    again = ragline(home, "ingest", str(folder))
    found = ragline(home, "search", "where do bees dance?", "--json")
    read = ragline(home, "search", "whale")
    status = ragline(home, "status", "--json")

    assert ingested.returncode == 1, ingested.stdout + ingested.stderr
    assert "3 files: 2 added, 1 failed." in ingested.stdout
    assert "bad.txt: This is a program" in ingested.stdout
    assert "1 file of another kind was left out (.png); a file that is named is taken." in ingested.stdout
    assert "3 files: 2 unchanged, 1 failed." in again.stdout
    (passage,) = json.loads(found.stdout)
    assert passage["quote"] == "Bees\n\nBees dance to tell where flowers are."
    assert (passage["name"], passage["start"], passage["heading"]) == ("bee.html", 0, "Bees")
    assert "1. whale.md, characters 0-47" in read.stdout
    report = json.loads(status.stdout)
    assert report["documents"]["ready"] == 2
    assert report["documents"]["failed"] == 1
    assert report["failures"][0]["name"] == "bad.txt"
    assert report["search"] == "keywords only"


def test_a_document_that_failed_is_told_once_with_all_its_places(tmp_path: Path) -> None:
    """After `ingest` of some files, only where they are."""
    home = tmp_path / "home"
    files = [tmp_path / name for name in ("one.txt", "two.txt", "three.txt")]
    for file in files:
        file.write_bytes(b"\x7fELF" + bytes(range(256)))

    first = ragline(home, "ingest", str(files[0]), str(files[1]))
    second = ragline(home, "ingest", str(files[2]))
    status = ragline(home, "status")

    assert first.stdout.count("  failed ") == 2
    assert [line for line in second.stdout.splitlines() if "  failed " in line] == [
        "  failed three.txt: This is a program, which holds no text that ragline can read."
    ]
    assert [line for line in status.stdout.splitlines() if "  failed " in line] == [
        "  failed one.txt, also three.txt and 1 more: This is a program, which holds no text that ragline can read."
    ]


def test_a_document_is_listed_paused_resumed_and_deleted_from_the_command_line(tmp_path: Path) -> None:
    """By path or id; what cannot be done is told in one line, and nothing of it is done."""
    home, file, other = tmp_path / "home", tmp_path / "whale.md", tmp_path / "bee.md"
    file.write_text("The blue whale is the largest animal.")
    other.write_text("Bees dance.")
    ragline(home, "ingest", "--no-wait", str(file), str(other))

    paused = ragline(home, "pause", str(file))
    again = ragline(home, "pause", "2", str(file))
    listed = json.loads(ragline(home, "list", "--json").stdout)
    resumed = ragline(home, "resume", "1")
    deleted = ragline(home, "delete", "whale.md", "bee.md")
    nothing = ragline(home, "list")

    assert paused.stdout == "whale.md (1): paused.\n"
    assert (again.returncode, again.stderr) == (1, "whale.md is paused: it cannot be paused now.\n")
    assert [(row["name"], row["state"]) for row in listed] == [("bee.md", "queued"), ("whale.md", "paused")]
    assert resumed.stdout == f"whale.md (1): queued again.\n{NOBODY}\n"
    assert deleted.stdout == "whale.md (1): deleted.\nbee.md (2): deleted.\n"
    assert nothing.stdout == "No documents.\n"


def test_what_is_deleted_is_told_by_the_name_that_was_given(tmp_path: Path) -> None:
    """Three places of the same bytes: one goes, then the document with the other two, then a folder."""
    home, folder = tmp_path / "home", tmp_path / "docs"
    for name, content in (("a", "one"), ("b", "one"), ("c", "one"), ("d", "two")):
        (folder / name).mkdir(parents=True)
        (folder / name / "same.txt").write_text(content)
    ragline(home, "ingest", "--no-wait", str(folder))

    ambiguous = ragline(home, "delete", "same.txt")
    place = ragline(home, "delete", "b/same.txt")
    paused = ragline(home, "pause", "c/same.txt")
    document = ragline(home, "delete", "1")
    below = ragline(home, "delete", str(folder / "d"))

    assert ambiguous.stderr.startswith("4 places are called same.txt: a/same.txt (1), b/same.txt (1), ")
    assert place.stdout == "b/same.txt (1): deleted; it stays in 2 other places.\n"
    assert paused.stdout == "c/same.txt (1) and 1 other place: paused.\n"
    assert document.stdout == "a/same.txt (1) and 1 other place: deleted.\n"
    assert below.stdout == f"{folder / 'd'} (1 place): deleted.\n"


def on_a_terminal(home: Path, *arguments: str, answer: str | None) -> tuple[int, str]:
    """Run a command in a terminal and answer its question, by Ctrl-C for None: exit code, and what is shown."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from ragline.cli import main; main()", *arguments]
    environment = {**os.environ, "RAGLINE_HOME": str(home), "COLUMNS": "200"}
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # how a terminal says that nobody is at its other end any more
        while True:
            # Asked again, as a person would: Python loses a signal just before it waits for a line.
            if select.select([ours], [], [], 0.2)[0]:
                shown += os.read(ours, 1000)
            elif shown.endswith(b"[y/N]: ") and answer is None:
                process.send_signal(signal.SIGINT)
            elif shown.endswith(b"[y/N]: "):
                os.write(ours, answer.encode() + b"\n")
    os.close(ours)
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown.decode())
    return process.wait(timeout=100), plain.replace("\r\n", "\n")


def test_who_deletes_at_a_terminal_is_asked_first(tmp_path: Path) -> None:
    """With the names of what goes and the number of its passages; with no, nothing and Ctrl-C nothing is deleted."""
    home, folder = tmp_path / "home", tmp_path / "docs"
    for name, content in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "three")):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.txt").write_text(content)
    ragline(home, "ingest", str(folder))

    kept = [on_a_terminal(home, "delete", "c.txt", answer=answer) for answer in ("n", "", None)]
    before = json.loads(ragline(home, "list", "--json").stdout)
    two = on_a_terminal(home, "delete", "b.txt", str(folder / "c"), answer="y")
    sure = on_a_terminal(home, "delete", "--yes", "d.txt", answer="n")
    short = on_a_terminal(home, "delete", "-y", "nothing.txt", answer="n")
    after = json.loads(ragline(home, "list", "--json").stdout)

    assert [code for code, _ in kept] == [1, 1, 130]
    for _, shown in kept:
        assert shown.startswith("c.txt (2)\nDelete this, with 1 passage? It cannot be undone. [y/N]: ")
        assert shown.endswith("Nothing was deleted.\n")
    assert len(before) == 3
    assert two[0] == 0
    assert two[1].startswith(
        f"b.txt (1); it stays in 1 other place\n{folder / 'c'} (1 place)\n"
        "Delete these, with 1 passage? It cannot be undone. [y/N]: "
    )
    assert two[1].endswith(
        f"b.txt (1): deleted; it stays in 1 other place.\n{folder / 'c'} (1 place): deleted.\n"
    )
    assert sure == (0, "d.txt (3): deleted.\n")
    assert short == (1, "There is no document nothing.txt: `ragline list` shows all.\n")
    assert [row["name"] for row in after] == ["a.txt"]


NOBODY = "No worker is running: start one with `ragline worker`."


def test_who_does_not_wait_is_told_that_nobody_works(tmp_path: Path) -> None:
    """Else it looks as if all were well, and nothing ever happens."""
    home, file = tmp_path / "home", tmp_path / "whale.md"
    file.write_text("The blue whale is the largest animal.")

    ingested = ragline(home, "ingest", "--no-wait", str(file))
    ragline(home, "cancel", "1")
    retried = ragline(home, "retry", "1")

    waits = "1 document waits in the queue; `ragline status` shows how far they are."
    assert ingested.stdout.endswith(f"{NOBODY}\n{waits}\n1 file: 1 added.\n")
    assert retried.stdout == f"whale.md (1): queued again.\n{NOBODY}\n"


def test_what_was_refused_for_good_is_not_tried_again_unasked(tmp_path: Path) -> None:
    """The same would come of it; a limit may have been raised meanwhile: then it is asked for."""
    home, file = tmp_path / "home", tmp_path / "bad.txt"
    file.write_bytes(b"\x7fELF" + bytes(range(256)))
    ragline(home, "ingest", str(file))

    refused = ragline(home, "retry", "bad.txt")
    forced = ragline(home, "retry", "--force", "bad.txt")

    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "bad.txt failed for a reason that trying again does not change: This is a"
    )
    assert refused.stderr.endswith(
        "With `--force` it is tried all the same, for instance with another limit.\n"
    )
    assert forced.stdout == f"bad.txt (1): queued again.\n{NOBODY}\n"


def test_a_list_that_ends_says_how_many_more_there_are(tmp_path: Path) -> None:
    """And no name is cut where a program reads it."""
    home, folder = tmp_path / "home", tmp_path / "docs"
    folder.mkdir()
    names = [f"{number}-{'very-' * 40}long-name.md" for number in range(3)]
    for name in names:
        (folder / name).write_text(name)
    ragline(home, "ingest", "--no-wait", str(folder))

    some = ragline(home, "list", "--limit", "1", COLUMNS="80").stdout
    every = ragline(home, "list", "--limit", "3", "--state", "queued", COLUMNS="80").stdout

    assert some.endswith("2 more: `--limit 3` shows all.\n")
    assert "more:" not in every
    assert all(name in every for name in names)


def test_a_list_is_filtered_by_words_and_sorted(tmp_path: Path) -> None:
    """As the page's is: words of the name or of a folder, in any order."""
    home, folder = tmp_path / "home", tmp_path / "docs"
    for name in ("animals/whale.md", "animals/bee.md", "plants/fern.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name * len(name))
    ragline(home, "ingest", "--no-wait", str(folder))

    animals = json.loads(
        ragline(home, "list", "--called", "animals docs", "--order", "name", "--json").stdout
    )
    largest = ragline(home, "list", "--called", "md animals", "--order", "largest", "--limit", "1").stdout
    none = ragline(home, "list", "--called", "fungi").stdout

    assert [row["name"] for row in animals] == ["bee.md", "whale.md"]
    assert "whale.md" in largest
    assert largest.endswith("1 more: `--limit 2` shows all.\n")
    assert none == "No document is called so.\n"


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_package_is_the_command_too(option: str) -> None:
    """Where scripts are not on the path, `python -m ragline` is."""
    command = [sys.executable, "-m", "ragline", "list", option]

    assert (
        "Usage: python -m ragline list"
        in subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    )


def test_progress_shows_whole_numbers_on_a_narrow_terminal() -> None:
    """The bar gives way: 80 columns have room for the counts, the time and the states of documents."""
    console = Console(width=80, record=True, file=StringIO())
    bar = Bars(console)
    note = "17 embedding, 3 failed, 20 ready, 53 splitting"
    bar.add_task("documents", total=1093, completed=1023, note=note)

    console.print(bar.get_renderable())

    assert f"1023/1093 0:00:00 {note}" in console.export_text()


def test_servers_that_are_away_are_told_in_a_line(tmp_path: Path) -> None:
    """Without the broker everything is taken in and counted; without the database nothing is."""
    file = tmp_path / "whale.md"
    file.write_text("The blue whale is the largest animal.")
    broker = {"RAGLINE_BROKER_URL": "amqp://guest@127.0.0.1:1//"}
    database = {"RAGLINE_DATABASE_URL": "postgresql://postgres:secret@127.0.0.1:1/none"}

    taken = ragline(tmp_path / "home", "ingest", "--no-wait", str(file), **broker)
    status = ragline(tmp_path / "home", "status", **broker)
    nothing = ragline(tmp_path / "home", "status", **database)

    assert "1 file: 1 added." in taken.stdout
    assert (status.returncode, nothing.returncode) == (0, 1)
    # Owed while the hand-over that failed holds it, then waiting.
    assert re.search(r"Steps: (1 wait, 0 begun|0 wait, 1 begun) .* 0 given up", status.stdout)
    assert "Workers: unknown, the broker amqp://guest@127.0.0.1:1// does not answer." in status.stdout
    assert nothing.stderr.startswith("The database cannot be used: ")
    assert nothing.stderr.count("\n") == 1
    assert "Traceback" not in status.stderr + nothing.stderr
    assert "secret" not in nothing.stderr


def test_the_demo_ends_well_without_the_model(tmp_path: Path) -> None:
    """Worker processes are killed, the counts add up, and cited passages are found, by keywords alone."""
    result = ragline(tmp_path, "demo")

    assert result.returncode == 0, result.stdout + result.stderr
    assert "The counts add up: 2 worker processes were killed with SIGKILL" in result.stdout
    assert "3 failed" in result.stdout
    # Several topics of the language reference share their text: which one is cited first is their order of arrival.
    assert re.search(r"1\. python-\w+\.rst, characters", result.stdout)


def test_the_demo_fails_when_the_counts_do_not_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is nowhere, and failures that are missing, are named, and the exit code says so."""
    empty_index()
    problems = demo._check(1, Console(file=StringIO()))
    monkeypatch.setattr(demo, "run", lambda console: problems)
    monkeypatch.setenv("RAGLINE_HOME", str(tmp_path))

    result = CliRunner().invoke(cli.cli, ["demo"])

    assert problems[-1] == "1 files were taken in, and 0 are known."
    assert result.exit_code == 1


def test_an_empty_home_is_no_error(tmp_path: Path) -> None:
    """Status says how to begin, and a search says that there is nothing to be found."""
    status, search = ragline(tmp_path, "status"), ragline(tmp_path, "search", "anything")

    assert status.returncode == search.returncode == 0
    assert "ragline ingest" in status.stdout
    assert search.stderr == "The index is empty: no document is ready to be searched yet.\n"


HEAVY = {
    "numpy",
    "bs4",
    "charset_normalizer",
    "docx",
    "lxml",
    "pypdfium2",
    "httpx",
    "tokenizers",
    "onnxruntime",
    "snowballstemmer",
}


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["list"], set()),
        (["status"], set()),
        (["search", "whale"], {"snowballstemmer"}),
    ],
)
def test_commands_load_only_what_they_need(tmp_path: Path, arguments: list[str], allowed: set[str]) -> None:
    """What they load is most of the time they take: nobody who looks waits for parsers."""
    program = (
        "import sys\nfrom ragline import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        f"print(*sorted({HEAVY!r} & set(sys.modules)), sep='\\n', file=sys.stderr)"
    )

    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "RAGLINE_HOME": str(tmp_path), "RAGLINE_EMBEDDER": "none"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert HEAVY & set(result.stderr.split()) <= allowed


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("status",), {"RAGLINE_MAX_BYTES": "many"}, "RAGLINE_MAX_BYTES='many'"),
        (("eval", "/nowhere"), {}, "/nowhere holds neither"),
        (("cancel", "nothing.md"), {}, "There is no document nothing.md: `ragline list` shows all."),
        (("show", "nothing.md"), {}, "There is no document nothing.md: `ragline list` shows all."),
        (("show", "1", "--characters", "9-3"), {}, "--characters 9-3 is no range such as 0-1200."),
        (("retry",), {}, "Name documents, or give --all."),
        (("status",), {"RAGLINE_HOME": "/proc/nowhere"}, "RAGLINE_HOME: /proc/nowhere cannot be made"),
        (("status",), {"RAGLINE_HOME": "/etc/passwd"}, "RAGLINE_HOME: /etc/passwd is no folder."),
        (("worker",), {"RAGLINE_BROKER_URL": "nonsense://x"}, "RAGLINE_BROKER_URL: write it as"),
        (("status",), {"RAGLINE_BROKER_URL": "redis://h:port"}, "RAGLINE_BROKER_URL: write it as"),
        (("status",), {"RAGLINE_DATABASE_URL": f"sqlite:///{__file__}"}, "file is not a database"),
        (("serve", "--host", "no.such.host.invalid"), {}, "--host no.such.host.invalid: there is no"),
        (("serve", "--host", "203.0.113.9"), {}, "203.0.113.9 port 8000 cannot be served: "),
        (("ingest", "/nowhere/a.md", "/nowhere"), {}, "/nowhere/a.md, /nowhere are not there: nothing"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], environment: Mapping[str, str], message: str
) -> None:
    """No traceback, exit code 1, and what to do."""
    pytest.importorskip("uvicorn" if "serve" in arguments else "typer")
    result = ragline(tmp_path, *arguments, **environment)

    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (("search", "x", "--mode", "best"), tuple(Mode)),
        (("list", "--state", "lost"), tuple(State)),
        (("list", "--order", "smallest"), tuple(Order)),
        (("worker", "--queue", "all"), QUEUES),
        (("worker", "--log-level", "loud"), ("debug", "info", "warning", "error", "critical")),
    ],
)
def test_a_choice_that_does_not_exist_is_told_with_those_that_do(
    arguments: tuple[str, ...], choices: tuple[str, ...]
) -> None:
    """Before anything is done, and in the help too."""
    result = CliRunner().invoke(cli.cli, list(arguments), env={"COLUMNS": "300"})
    told = CliRunner().invoke(cli.cli, [arguments[0], "--help"], env={"COLUMNS": "300"})

    assert result.exit_code == 2
    for choice in choices:
        assert choice in result.output
        assert choice in told.output


@pytest.mark.parametrize("command", ["search", "ask"])
@pytest.mark.parametrize("query", ["", " ", "\n\t\u3000"])
def test_who_asks_nothing_is_told_so(tmp_path: Path, command: str, query: str) -> None:
    """In a sentence, with the exit code of every argument that cannot be used; a program gets no empty list."""
    options = ["--json"] if query else []

    result = ragline(tmp_path, command, query, *options)

    assert (result.returncode, result.stdout) == (2, "")
    assert "Nothing was asked: type a question, or words." in result.stderr


def test_the_version_is_told() -> None:
    """Without a command, and before any setting is read."""
    assert CliRunner().invoke(cli.cli, ["--version"]).output == f"ragline {__version__}\n"


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RAGLINE_EMBEDDER": "best"}, "RAGLINE_EMBEDDER"),
        ({"RAGLINE_BATCH_CHUNKS": "0"}, "RAGLINE_BATCH_CHUNKS"),
        ({"RAGLINE_DATABASE_URL": "oracle://localhost/x"}, "RAGLINE_DATABASE_URL"),
        ({"RAGLINE_DATABASE_URL": "somewhere"}, "RAGLINE_DATABASE_URL"),
        ({"RAGLINE_DATABASE_URL": "postgresql://h:port/x"}, "RAGLINE_DATABASE_URL"),
        ({"RAGLINE_BROKER_URL": "amqp://a//;nonsense://b"}, "RAGLINE_BROKER_URL"),
        ({"RAGLINE_CHAT_URL": "http://h:port", "RAGLINE_CHAT_MODEL": "m"}, "RAGLINE_CHAT_URL"),
        ({"RAGLINE_QUEUES": "a b"}, "RAGLINE_QUEUES"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(environment: Mapping[str, str], named: str) -> None:
    """The error says which variable it is."""
    with pytest.raises(ConfigurationError, match=named):
        settings_from(environment)


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_command_is_documented() -> None:
    """README.md names each in its table, and no other."""
    told = set(
        re.findall(
            r"`(?:ragline )?([a-z]+(?: fetch)?)\b[^`]*`",
            README.split("## Commands", 1)[1].split("\n## ", 1)[0],
        )
    )
    group: Any = typer.main.get_command(cli.cli)
    commands = {name for name, command in group.commands.items() if not hasattr(command, "commands")}

    assert commands | {"model fetch"} <= told
    assert set(re.findall(r"^\| `ragline ([a-z]+)", README, flags=re.MULTILINE)) <= set(group.commands)


def test_every_setting_is_documented() -> None:
    """README.md has a line for each variable that is read, and no other."""

    class Environment(dict[str, str]):
        """Remembers what it was asked for."""

        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return super().get(name, default)

    asked: set[str] = set()
    endpoints = {
        f"RAGLINE_{which}_{name}": value
        for which in ("EMBEDDINGS", "CHAT")
        for name, value in (("URL", "http://localhost"), ("MODEL", "m"))
    }
    settings_from(Environment(endpoints))

    told = set(re.findall(r"RAGLINE_\w+", README.split("## Settings", 1)[1].split("\n## ", 1)[0]))
    asked.discard("RAGLINE_CHAT_DIMENSIONS")  # read as of any endpoint, but answers have none
    assert told == {name for name in asked if name.startswith("RAGLINE_")}


def test_defaults_follow_the_desktop_conventions() -> None:
    """Data and cache go where XDG says, unless ragline's own variables say otherwise."""
    settings = settings_from({"XDG_DATA_HOME": "/data", "XDG_CACHE_HOME": "/cache"})
    moved = settings_from({"RAGLINE_HOME": "/mine", "RAGLINE_BROKER_URL": "redis://localhost"})

    assert (settings.home, settings.cache) == (Path("/data/ragline"), Path("/cache/ragline"))
    assert settings.database_is_broker
    assert moved.database_url == "sqlite+pysqlite:////mine/ragline.db"
    assert not moved.database_is_broker


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgres://h/d", "postgresql+psycopg://h/d"),
        ("mariadb://h/d", "mysql+pymysql://h/d"),
        ("mysql+mysqldb://h/d", "mysql+mysqldb://h/d"),
    ],
)
def test_a_database_url_without_a_driver_gets_the_one_that_ragline_installs(given: str, used: str) -> None:
    """As its provider shows it, without knowing SQLAlchemy's drivers."""
    assert settings_from({"RAGLINE_DATABASE_URL": given}).database_url == used
