"""Taking in: one document for the same bytes, a new generation for new ones, what searches see."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from conftest import LetterEmbedder
from pipelines import KEYWORDS, LETTERS, add, long_text, offer, process, until_embedding
from ragline import files, pipeline
from ragline.audit import audit
from ragline.errors import DocumentError, EmptyError, TooLargeError, UnreadableError
from ragline.files import LeftOut, find_files, read_file
from ragline.intake import Intake, take_in
from ragline.progress import failures
from ragline.searching import Mode, passages, rank
from ragline.states import State
from ragline.tables import Chunk, Document, Original, Source
from ragline.text import ParsedText


def found(session: Session, query: str) -> list[str]:
    """The quotes that a keyword search gives."""
    return [
        passage.quote for passage in passages(session, rank(session, query, None, None, mode=Mode.KEYWORD))
    ]


def rows(session: Session, table: type[object]) -> int:
    """How many rows a table has."""
    return session.scalar(select(func.count()).select_from(table)) or 0


def test_a_new_file_is_added_and_queued(session: Session) -> None:
    """The caller is told to send its first task."""
    outcome = add(session, "some text")

    assert outcome.intake is Intake.ADDED
    assert outcome.is_queued
    assert session.get_one(Document, outcome.document_id).state is State.QUEUED


def test_the_same_bytes_from_two_places_are_one_document(session: Session) -> None:
    """The second place is a duplicate, found as soon as the document is ready."""
    first = add(session, "the same text", "file:///a.txt")
    second = add(session, "the same text", "file:///b.txt")
    process(session, first.document_id)

    assert (second.intake, second.document_id) == (Intake.DUPLICATE, first.document_id)
    assert rows(session, Document) == 1
    assert set(session.scalars(select(Source.serving_id))) == {first.document_id}
    assert audit(session) == []


def test_an_unchanged_file_is_skipped(session: Session) -> None:
    """Adding it again neither queues it nor changes anything."""
    first = add(session, "some text")
    process(session, first.document_id)

    again = add(session, "some text")

    assert again.intake is Intake.UNCHANGED
    assert not again.is_queued
    assert session.scalars(select(Source.generation)).one() == 1


def test_the_old_generation_serves_until_the_new_one_is_complete(session: Session) -> None:
    """Deleted before replaced (llama_index#22639): searches must see the old text until they see the new one."""
    process(session, add(session, "about whales").document_id)

    replaced = add(session, "about dolphins")

    assert replaced.intake is Intake.REPLACED
    assert pipeline.admit(session, replaced.document_id)
    session.commit()
    assert pipeline.parse(session, replaced.document_id)
    session.commit()
    assert found(session, "whales dolphins") == ["about whales"]
    pipeline.split(session, replaced.document_id, lambda _: LetterEmbedder.counter, batch_chunks=9)
    session.commit()
    assert found(session, "whales dolphins") == ["about dolphins"]
    assert rows(session, Document) == rows(session, Chunk) == rows(session, Original) == 1
    assert session.scalars(select(Source.generation)).one() == 2
    assert audit(session) == []


def test_a_generation_that_fails_leaves_the_old_one_in_place(session: Session) -> None:
    """The reason is kept beside it."""
    process(session, add(session, "about whales").document_id)
    broken = add(session, b"\x00\x01\x02" * 99)

    with pytest.raises(Exception, match="binary") as caught:
        pipeline.parse(session, broken.document_id)
    session.rollback()
    pipeline.fail(session, caught.value, broken.document_id)
    session.commit()

    assert found(session, "whales") == ["about whales"]
    document = session.get_one(Document, broken.document_id)
    assert (document.state, document.is_permanent) == (State.FAILED, True)
    assert audit(session) == []


def test_a_generation_overtaken_by_the_next_is_dropped(session: Session) -> None:
    """Its late tasks find nothing to do, and nothing of it stays."""
    overtaken = add(session, "version 1")
    add(session, "version 2")

    assert session.get(Document, overtaken.document_id) is None
    assert not pipeline.admit(session, overtaken.document_id)
    assert rows(session, Original) == 1


def test_going_back_to_an_old_version_shared_elsewhere_serves_it_at_once(session: Session) -> None:
    """A document that is ready for one place is ready for all."""
    process(session, add(session, "shared", "file:///a.txt").document_id)
    process(session, add(session, "other", "file:///b.txt").document_id)

    outcome = add(session, "shared", "file:///b.txt")

    assert outcome.intake is Intake.REPLACED
    assert not outcome.is_queued
    assert found(session, "other") == []
    assert audit(session) == []


def test_another_model_or_splitter_parses_nothing_again(session: Session, embedder: LetterEmbedder) -> None:
    """The text of the same bytes is taken over; another parser parses them."""
    parsed: list[str] = []

    def parse(data: bytes, name: str) -> ParsedText:
        parsed.append(name)
        return ParsedText(data.decode())

    for recipe in (KEYWORDS, LETTERS, replace(LETTERS, splitter="2"), replace(LETTERS, parser="2")):
        document = process(session, add(session, "some text", recipe=recipe).document_id, embedder, parse)
        assert document.state is State.READY

    assert parsed == ["a.txt", "a.txt"]
    assert audit(session) == []


def test_another_model_processes_the_same_bytes_again(session: Session, embedder: LetterEmbedder) -> None:
    """Re-embedding with the old model (dify#40961) cannot happen: the recipe is part of the document."""
    process(session, add(session, "some text", recipe=KEYWORDS).document_id)

    again = add(session, "some text", recipe=LETTERS)
    document = process(session, again.document_id, embedder)

    assert again.intake is Intake.REPLACED
    assert (document.embedder, document.state) == ("letters", State.READY)
    assert rows(session, Document) == 1
    assert audit(session) == []


def test_a_document_that_failed_for_good_says_why_again(session: Session) -> None:
    """The same bytes are not tried again."""
    first = add(session, "x")
    pipeline.fail(session, EmptyError("Nothing."), first.document_id)
    session.commit()

    again = add(session, "x")

    assert (again.intake, again.reason, again.is_queued) == (Intake.FAILED, "Nothing.", False)


def test_a_document_that_failed_for_a_passing_reason_is_tried_again(session: Session) -> None:
    """Adding it once more queues it."""
    first = add(session, "x")
    pipeline.fail(session, ConnectionError("the database went away"), first.document_id)
    session.commit()
    assert session.get_one(Document, first.document_id).reason == "ConnectionError: the database went away"

    again = add(session, "x")

    assert (again.document_id, again.is_queued) == (first.document_id, True)


def test_a_document_that_failed_half_way_begins_anew(session: Session, embedder: LetterEmbedder) -> None:
    """What the first attempt left behind neither stays nor stands in the way."""
    first = add(session, long_text("whale"), recipe=LETTERS)
    batches = until_embedding(session, first.document_id)
    pipeline.embed(session, first.document_id, batches[0], lambda _: embedder)
    pipeline.fail(session, ConnectionError("the model server went away"), first.document_id)
    session.commit()

    again = add(session, long_text("whale"), recipe=LETTERS)
    document = process(session, again.document_id, embedder)

    assert document.state is State.READY
    assert audit(session) == []


def test_an_unreadable_file_fails_alone_and_recovers(session: Session, tmp_path: Path) -> None:
    """It is listed with its reason; once it can be read it takes its place."""
    file = tmp_path / "a.txt"
    file.mkdir()  # for root too, who may read every file
    offered = read_file(file, max_bytes=10**6)
    refused = take_in(session, offered, KEYWORDS)
    refused_again = take_in(session, read_file(file, max_bytes=10**6), KEYWORDS)
    session.commit()
    file.rmdir()
    file.write_text("now readable")

    outcome = take_in(session, read_file(file, max_bytes=100), KEYWORDS)
    session.commit()

    assert isinstance(offered.problem, UnreadableError)
    assert refused.intake is refused_again.intake is Intake.FAILED
    assert refused.reason is not None
    assert "cannot be read" in refused.reason
    assert outcome.is_queued
    assert rows(session, Document) == 1


def test_a_file_that_is_gone_is_no_document(tmp_path: Path) -> None:
    """It would be kept as failed for ever: the caller says that it is not there."""
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "b.txt", max_bytes=1)


def test_a_file_that_is_too_large_is_refused_unread_until_the_limit_allows_it(
    session: Session, tmp_path: Path
) -> None:
    """Its bytes are not kept; with a larger limit it is queued."""
    file = tmp_path / "large.txt"
    file.write_bytes(b"x" * 101)

    refused = read_file(file, max_bytes=100)
    outcome = take_in(session, refused, KEYWORDS)

    assert isinstance(refused.problem, TooLargeError)
    assert outcome.intake is Intake.FAILED
    assert rows(session, Original) == 0
    assert take_in(session, read_file(file, max_bytes=101), KEYWORDS).is_queued
    assert rows(session, Original) == rows(session, Document) == 1


@pytest.fixture
def specials(tmp_path: Path) -> Iterator[Path]:
    """A folder with a pipe and a socket whose names are those of documents, and a text."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "whale.md").write_text("x")
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(tmp_path)  # the path of a socket is short
        listening.bind("socket.md")
        os.chdir(here)
        yield tmp_path


def test_what_is_no_file_is_left_out_of_folders_and_refused_by_name(specials: Path) -> None:
    """Nobody writes into the pipe, and a device has no end: neither is waited for."""
    left_out = LeftOut()
    found = list(find_files([specials], left_out))
    named = [specials / "pipe.txt", specials / "socket.md", Path("/dev/zero")]
    problems = [read_file(path, max_bytes=9).problem for path in named]

    assert found == [specials / "whale.md"]
    assert left_out.special == [specials / "pipe.txt", specials / "socket.md"]
    assert [str(problem) for problem in problems] == ["It is no ordinary file."] * 3


@pytest.mark.parametrize("told_bytes", [0, 3, 10**9])
def test_no_more_than_the_limit_is_read_whatever_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_bytes: int
) -> None:
    """Files below /proc have no length until they are read, and others grow meanwhile."""
    (tmp_path / "log.txt").write_bytes(b"whale" * 20)
    real = os.stat(tmp_path / "log.txt")
    told = os.stat_result((*real[:6], told_bytes, *real[7:]))
    monkeypatch.setattr(files.os, "fstat", lambda _: told)

    enough, too_much = (read_file(tmp_path / "log.txt", max_bytes=limit) for limit in (100, 99))

    assert (enough.data, enough.size_bytes) == (b"whale" * 20, 100)
    assert (too_much.data, too_much.size_bytes) == (None, 100)
    assert too_much.digest == enough.digest
    assert isinstance(too_much.problem, TooLargeError)


def test_folders_give_their_documents_in_order(tmp_path: Path) -> None:
    """Known formats only, no hidden files, and what else is left out is told; a file that is named is taken."""
    for name in ("b.md", "a.txt", "skip.exe", ".hidden.md", "sub/c.PDF", ".git/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    left_out = LeftOut()
    names = [file.name for file in find_files([tmp_path, tmp_path / "skip.exe"], left_out)]

    assert names == ["a.txt", "b.md", "c.PDF", "skip.exe"]
    assert left_out == LeftOut(other_kinds=[tmp_path / "skip.exe"])


@pytest.mark.parametrize(
    "made", ["node_modules/x/index.js", "pkg/__pycache__/x.txt", "env/pyvenv.cfg", "cache/CACHEDIR.TAG"]
)
def test_what_programs_have_made_is_no_document(tmp_path: Path, made: str) -> None:
    """Installed packages and caches within a folder are passed by; one that is named itself is taken in."""
    made_file = tmp_path / made
    made_file.parent.mkdir(parents=True)
    made_file.write_text("x")
    (made_file.parent / "README.md").write_text("x")
    (tmp_path / "mine.md").write_text("x")

    assert [file.name for file in find_files([tmp_path])] == ["mine.md"]
    assert "README.md" in [file.name for file in find_files([made_file.parent])]


def test_taking_in_is_undone_by_a_rollback(session: Session) -> None:
    """Flushed, sent, then committed (dify): here all of it is the caller's transaction."""
    take_in(session, offer("text"), KEYWORDS)
    session.rollback()

    assert rows(session, Document) == rows(session, Source) == rows(session, Original) == 0


def test_real_documents_go_through_on_every_database(session: Session, documents: Path) -> None:
    """Scripts, encodings and equations of all kinds: what is stored is what was parsed, character by character."""
    for file in find_files([documents]):
        document_id = add(session, file.read_bytes(), file.as_uri()).document_id
        try:
            process(session, document_id)
        except DocumentError as error:
            session.rollback()
            pipeline.fail(session, error, document_id)
            session.commit()

    assert audit(session) == []
    failed = {failure.name for failure in failures(session)}
    assert failed == {"markitdown-scan-no-text.pdf", "pypdf-encrypted.pdf"}
    assert "μητρική" in found(session, "μητρική γλώσσα")[0]
    assert found(session, "ドキュメント")
