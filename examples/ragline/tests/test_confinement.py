"""No document holds a worker: what takes too much is ended and told, and the next one is parsed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from tests.waiting import eventually

from office import archive, raw_docx
from pipelines import empty_index
from ragline.app import alchemy, settings
from ragline.confinement import Confinement
from ragline.errors import CrashedError, DamagedError, DocumentError, ParserError, TooLargeError, TooSlowError
from ragline.limits import Limits
from ragline.progress import failures
from ragline.states import State
from ragline.tables import Document
from ragline.workers import stop, worker_arguments
from test_worker import take_in

SLOW = b"<html>" + b"<p>a" * 1_900_000
"""Within the limit of elements, and many seconds of work."""
SMALL = (b"# Title\n\ntext", "a.md")
ENTITIES = "".join(f'<!ENTITY {chr(98 + level)} "{f"&{chr(97 + level)};" * 10}">' for level in range(9))
BOMB = f'<!DOCTYPE w [<!ENTITY a "aaaaaaaaaa">{ENTITIES}]>'
"""A document type in which `&j;` is ten billion letters."""
WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


@pytest.fixture
def confined() -> Iterator[Callable[..., Confinement]]:
    """Makes confinements that end with the test."""
    made: list[Confinement] = []

    def make(**limits: int) -> Confinement:
        made.append(Confinement(Limits(**limits)))
        return made[-1]

    yield make
    for confinement in made:
        confinement.close()


def is_alive(pid: int) -> bool:
    """Whether a process is there, and has not ended yet."""
    with suppress(ProcessLookupError, FileNotFoundError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def in_mid_document(
    confinement: Confinement, name: str = "slow.html"
) -> tuple[threading.Thread, list[object]]:
    """Have a slow document parsed by a thread; what comes of it is in the list."""
    ended: list[object] = []

    def parse() -> None:
        try:
            ended.append(confinement.parse(SLOW, name).text[:1])
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=parse)
    thread.start()
    eventually(lambda: confinement.pids, what="the process has been started")
    return thread, ended


def test_a_process_is_reused_while_it_is_well(confined: Callable[..., Confinement]) -> None:
    """Starting one takes half a second, a small document a millisecond."""
    confinement = confined()

    first = confinement.parse(*SMALL)
    pids = confinement.pids
    with pytest.raises(DamagedError):
        confinement.parse(b"%PDF-1.7 broken", "a.pdf")

    assert confinement.parse(*SMALL) == first
    assert [heading.title for heading in first.headings] == ["Title"]
    assert confinement.pids == pids
    assert len(pids) == 1


def test_a_process_of_a_large_worker_is_reused(confined: Callable[..., Confinement]) -> None:
    """What counts is its own memory, not that of the worker that started it."""
    confinement = confined(memory_bytes=400_000_000)
    held = b"x" * 300_000_000
    del held

    confinement.parse(*SMALL)
    pids = confinement.pids
    confinement.parse(*SMALL)

    assert len(pids) == 1
    assert confinement.pids == pids


def test_a_document_that_takes_too_long_is_ended_with_its_reason(
    confined: Callable[..., Confinement],
) -> None:
    """The limit is processor time; the next document has a new process."""
    confinement = confined(seconds=1)
    confinement.parse(*SMALL)
    before = confinement.pids

    with pytest.raises(TooSlowError, match="longer than the limit of 1 seconds"):
        confinement.parse(SLOW, "slow.html")

    assert confinement.parse(*SMALL).text
    assert len(confinement.pids) == 1
    assert confinement.pids != before
    assert not any(map(is_alive, before))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (SLOW, "a.html"),
        (raw_docx("<w:p><w:r><w:t>a</w:t></w:r></w:p>" * 200_000), "a.docx"),
        (b"name,value\n" + b"a,b\n" * 2_000_000, "a.csv"),
        (json.dumps([{"a": number} for number in range(800_000)]).encode(), "a.json"),
    ],
    ids=["html", "docx", "csv", "json"],
)
def test_a_document_that_takes_too_much_memory_is_refused_with_its_reason(
    confined: Callable[..., Confinement], data: bytes, name: str
) -> None:
    """In whichever library the memory ends, the reason is not that the document is damaged."""
    confinement = confined(memory_bytes=140_000_000, elements=10**9, characters=10**9)

    with pytest.raises(TooLargeError, match="more memory than the limit of 140 MB"):
        confinement.parse(data, name)

    assert confinement.parse(*SMALL).text


@pytest.mark.parametrize(
    ("data", "name", "kind", "reason"),
    [
        (b"<p>" * 16_000_000, "a.html", TooLargeError, "2,000,000 elements"),
        (raw_docx("<w:p/>" * 3_000_000), "a.docx", TooLargeError, "2,000,000 elements"),
        (archive({"word/document.xml": bytes(500_000_000)}), "a.docx", TooLargeError, "200,000,000 bytes"),
        (archive({"xl/workbook.xml": bytes(500_000_000)}), "a.xlsx", TooLargeError, "200,000,000 bytes"),
        (
            archive({"word/document.xml": f"{BOMB}<w:document {WORD}><w:body>&j;</w:body></w:document>"}),
            "a.docx",
            DamagedError,
            "damaged",
        ),
        (archive({"xl/workbook.xml": f"{BOMB}<workbook>&j;</workbook>"}), "a.xlsx", DamagedError, "damaged"),
        (raw_docx("<w:sdt>" * 100_000 + "</w:sdt>" * 100_000), "a.docx", DamagedError, "damaged"),
        (b"a " * 11_000_000, "a.txt", TooLargeError, "20,000,000 characters"),
        (b"a," * 11_000_000, "a.csv", TooLargeError, "20,000,000 characters"),
        (b"[" + b"1," * 3_000_000 + b"1]", "a.json", TooLargeError, "2,000,000 elements"),
        (archive({f"{number}": "" for number in range(200_000)}), "a.docx", DocumentError, "ZIP archive"),
    ],
    ids="html docx zeros-docx zeros-xlsx entities-docx entities-xlsx deep text csv json members".split(),
)
def test_a_document_that_is_made_to_hold_a_worker_is_refused(
    confined: Callable[..., Confinement], data: bytes, name: str, kind: type[DocumentError], reason: str
) -> None:
    """Bombs of ZIP and XML, deep nesting, too many elements or characters: each has its reason."""
    with pytest.raises(kind, match=reason) as caught:
        confined().parse(data, name)

    assert not isinstance(caught.value, TooSlowError)


def test_a_document_that_crashes_its_parser_is_refused_and_not_tried_again(
    confined: Callable[..., Confinement],
) -> None:
    """The libraries are written in C; what ends one of them ends no worker."""
    confinement = confined()
    thread, ended = in_mid_document(confinement)

    os.kill(confinement.pids[0], signal.SIGSEGV)
    thread.join()

    assert isinstance(ended[0], CrashedError)
    assert "SIGSEGV" in str(ended[0])
    assert confinement.pids == []


def test_a_process_that_somebody_kills_is_replaced_and_the_document_parsed(
    confined: Callable[..., Confinement],
) -> None:
    """Once; a document whose process is killed twice fails for a reason that may pass."""
    confinement = confined()
    confinement.parse(*SMALL)
    os.kill(confinement.pids[0], signal.SIGKILL)
    assert confinement.parse(*SMALL).text

    thread, ended = in_mid_document(confinement)
    while thread.is_alive():
        for pid in confinement.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        thread.join(0.05)

    assert isinstance(ended[0], ParserError)
    assert not isinstance(ended[0], DocumentError)


PARENT = """
import sys
from ragline.confinement import Confinement
from ragline.limits import Limits
confinement = Confinement(Limits())
confinement.parse(b"x", "a.txt")
print(*confinement.pids, flush=True)
if sys.argv[1] == "busy":
    confinement.parse(b"<html>" + b"<p>a" * 1_900_000, "a.html")
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_a_process_dies_with_the_one_that_started_it(state: str) -> None:
    """Killed as hard as can be: nobody is there any more to end it, and it ends in mid-document too."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)

        parent.kill()

    eventually(lambda: not is_alive(pid), what="the process has ended")


def _parse_in_fork(confinement: Confinement, before: list[int]) -> None:
    assert confinement.parse(*SMALL).text
    assert set(confinement.pids).isdisjoint(before)


def test_a_forked_process_has_one_of_its_own(confined: Callable[..., Confinement]) -> None:
    """Daemonic too, as the processes of Celery's prefork pool are; its parent's goes on."""
    confinement = confined()
    confinement.parse(*SMALL)
    before = confinement.pids

    child = multiprocessing.get_context("fork").Process(
        target=_parse_in_fork, args=(confinement, before), daemon=True
    )
    child.start()
    child.join()

    assert child.exitcode == 0
    assert confinement.parse(*SMALL).text
    assert confinement.pids == before


def test_threads_parse_at_the_same_time(confined: Callable[..., Confinement]) -> None:
    """Each has the text of its own document; there are no more processes than threads."""
    confinement = confined()
    names = [f"{number} " * 20_000 for number in range(40)]

    with ThreadPoolExecutor(3) as threads:
        parsed = threads.map(lambda text: confinement.parse(text.encode(), "a.txt").text, names)

    assert list(parsed) == names
    assert 1 <= len(confinement.pids) <= 3


def test_a_process_sees_none_of_the_secrets_of_its_worker(
    confined: Callable[..., Confinement], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a document could make of its parser gets no key of anything."""
    monkeypatch.setenv("RAGLINE_CHAT_KEY", "secret")
    confinement = confined()
    confinement.parse(*SMALL)

    environment = Path(f"/proc/{confinement.pids[0]}/environ").read_bytes()

    assert b"RAGLINE" not in environment
    assert b"PATH=" in environment


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_the_others_go_on_when_a_document_takes_too_long(pool: str, tmp_path: Path) -> None:
    """In every pool of a worker: its reason is told, and they are ready."""
    empty_index()
    slow = tmp_path / "slow.html"
    slow.write_bytes(SLOW)
    for number in range(6):
        (tmp_path / f"{number}.md").write_text(f"Document number {number}.")

    environment = {**os.environ, "RAGLINE_PARSE_SECONDS": "1"}
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "ragline.app",
        *worker_arguments(processes=2),
        f"--pool={pool}",
    ]
    with (settings.home / "worker.log").open("ab") as log:
        worker = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        outcomes = take_in(slow, *sorted(tmp_path.glob("*.md")))
        ids = [outcome.document_id for outcome in outcomes.values()]
        eventually(lambda: not unsettled(ids), timeout=120, what="all documents are ready or failed")
    finally:
        stop(worker)

    with alchemy.session() as session:
        assert [(failure.name, failure.reason) for failure in failures(session)] == [
            ("slow.html", "Reading it takes longer than the limit of 1 seconds.")
        ]


def unsettled(ids: list[int]) -> list[State]:
    """The states of those documents that are neither ready nor failed."""
    with alchemy.session() as session:
        states = [session.get_one(Document, document_id).state for document_id in ids]
    return [state for state in states if state not in (State.READY, State.FAILED)]
