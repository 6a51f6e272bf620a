"""What a page shows beside a list of documents: states counted, one document whole, a passage in its text."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ragline.errors import NoSuchDocumentError
from ragline.places import file_name
from ragline.progress import Entry, entries
from ragline.states import WORKING, State
from ragline.tables import Document, DocumentText, Original
from ragline.text import Block, Heading, Kind, Span

AROUND_CHARACTERS = 700
"""How much text a person needs to see where a passage stands."""
_STAMPS = [getattr(Document, f"{state.value}_at") for state in State]


@dataclass(frozen=True, slots=True)
class Detail:
    """One document, with all that is known of it.

    Attributes:
        reached: when it came into each state that it has been in, in the order of time.
        characters: the length of its text, once it is parsed.
        pages: how many pages it has, or None for a format without pages.
        encoding: what its text was in, or None for a format that says so itself.
        embedder: the embedder of its vectors.
        headings: those of its text, in its order.
    """

    entry: Entry
    reached: dict[State, dt.datetime]
    characters: int | None
    pages: int | None
    encoding: str | None
    embedder: str
    headings: Sequence[Heading]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A range of a document's text, and the text around it.

    Attributes:
        name: the document's, as lists have it.
        start: where `before` begins, in characters of the whole text.
        end: where `after` ends.
        length: of the whole text.
        blocks: the code and the tables between `start` and `end`.
    """

    name: str
    before: str
    quote: str
    after: str
    start: int
    end: int
    length: int
    blocks: Sequence[Block]

    @property
    def is_start(self) -> bool:
        """Whether nothing stands before it that is not here."""
        return self.start == 0

    @property
    def is_end(self) -> bool:
        """Whether nothing stands after it that is not here."""
        return self.end >= self.length


def one(session: Session, document_id: int) -> Entry:
    """A document as lists have it.

    Raises:
        NoSuchDocumentError: it is gone.
    """
    found = entries(session, limit=1, document_ids=[document_id])
    if not found:
        raise NoSuchDocumentError(document_id)
    return found[0]


def detail(session: Session, document_id: int) -> Detail:
    """All that is known of a document.

    Raises:
        NoSuchDocumentError: it is gone.
    """
    entry = one(session, document_id)
    document = session.get_one(Document, document_id)
    stamps = ((state, getattr(document, f"{state.value}_at")) for state in State)
    reached = dict(sorted(((state, at) for state, at in stamps if at is not None), key=lambda pair: pair[1]))
    text = session.execute(
        select(
            func.char_length(DocumentText.text),
            DocumentText.page_starts,
            DocumentText.encoding,
            DocumentText.headings,
        ).where(DocumentText.document_id == document_id)
    ).one_or_none()
    characters, page_starts, encoding, titles = text or (None, [], None, [])
    headings = [Heading(start, level, title) for start, level, title in titles]
    pages = len(page_starts) or None
    return Detail(entry, reached, characters, pages, encoding, document.embedder, headings)


def excerpt(
    session: Session, document_id: int, start: int, end: int, *, around: int = AROUND_CHARACTERS
) -> Excerpt:
    """A range of a document's text with what stands around it.

    Args:
        session: any session.
        document_id: whose.
        start: where the range begins, in characters.
        end: where it ends, `start` or later.
        around: how many characters of the text before and after it.

    Raises:
        NoSuchDocumentError: it is gone, or has no text yet.
    """
    first, last = max(0, start - around), end + around
    row = session.execute(
        select(
            func.substr(DocumentText.text, first + 1, last - first),
            func.char_length(DocumentText.text),
        ).where(DocumentText.document_id == document_id)
    ).one_or_none()
    if row is None:
        raise NoSuchDocumentError(document_id)
    name = one(session, document_id).name
    text, length = row
    at, to, last = start - first, end - first, first + len(text)
    shapes = blocks_of(session, document_id, first, last)
    return Excerpt(name, text[:at], text[at:to], text[to:], first, last, length, shapes)


def blocks_of(session: Session, document_id: int, start: int, end: int) -> list[Block]:
    """The code and the tables between two places of a document's text; none of one that is gone."""
    kept = session.scalar(select(DocumentText.blocks).where(DocumentText.document_id == document_id)) or []
    return [
        Block(max(first, start), min(last, end), Kind(kind))
        for first, last, kind in kept
        if first < end and start < last
    ]


def hits(session: Session, document_id: int, words: str, *, limit: int) -> list[Span]:
    """Where words stand in a document's text, in its order and in characters of the whole text.

    Args:
        session: any session.
        document_id: whose.
        words: what to find, as it is written; small letters and capitals are alike, and so is all
            white space between words.
        limit: no more than so many.

    Raises:
        NoSuchDocumentError: it is gone, or has no text yet.
    """
    text = session.scalar(select(DocumentText.text).where(DocumentText.document_id == document_id))
    if text is None:
        raise NoSuchDocumentError(document_id)
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    found = re.finditer(pattern, text, re.IGNORECASE) if pattern else iter(())
    return [hit.span() for hit in islice(found, limit)]


def original(session: Session, document_id: int) -> tuple[str, bytes]:
    """The file name of a document and its bytes as they were added.

    Raises:
        NoSuchDocumentError: it is gone, or was refused unread.
    """
    row = session.execute(
        select(Document.name, Original.data)
        .join(Original, Original.digest == Document.digest)
        .where(Document.id == document_id)
    ).one_or_none()
    if row is None:
        raise NoSuchDocumentError(document_id)
    return row.name, row.data


def count_states(session: Session) -> dict[State, int]:
    """How many documents are in each state, those without any too."""
    counts = dict.fromkeys(State, 0)
    for state, count in session.execute(select(Document.state, func.count()).group_by(Document.state)):
        counts[state] = count
    return counts


def count_retryable(session: Session) -> int:
    """How many documents failed for a reason that may pass."""
    may_pass = (Document.state == State.FAILED, Document.is_permanent.is_(False))
    return session.scalar(select(func.count()).select_from(Document).where(*may_pass)) or 0


@dataclass(frozen=True, slots=True)
class Look:
    """The newest documents and the counts of all, at one moment.

    Attributes:
        documents: by id, the newest first.
        states: how many documents are in each state.
        retryable: how many failed for a reason that may pass.
        marks: what tells that a document has changed since.
    """

    documents: Mapping[int, Entry]
    states: Mapping[State, int]
    marks: Mapping[int, tuple[object, ...]]
    retryable: int = 0

    @property
    def is_working(self) -> bool:
        """Whether anything is on its way."""
        return any(self.states[state] for state in WORKING)


NOTHING = Look({}, {}, {})


def look(session: Session, before: Look = NOTHING, *, limit: int) -> Look:
    """Look at the newest documents; only what has changed since the look before is read anew.

    Args:
        session: any session.
        before: what was seen before.
        limit: how many documents.
    """
    newest = select(Document.id, Document.state, *_STAMPS).order_by(Document.id.desc()).limit(limit)
    marks = {row[0]: tuple(row[1:]) for row in session.execute(newest)}
    # Chunks and vectors are counted for documents at work alone: those of others do not change.
    stale = [
        document_id
        for document_id, mark in marks.items()
        if mark[0] in WORKING or before.marks.get(document_id) != mark
    ]
    fresh = _read(session, stale)
    fresh |= _read(session, _relabelled(before, marks, fresh))
    known = {
        document_id: fresh.get(document_id) or before.documents.get(document_id) for document_id in marks
    }
    documents = {document_id: entry for document_id, entry in known.items() if entry is not None}
    states = count_states(session)
    retryable = count_retryable(session) if states[State.FAILED] else 0
    return Look(documents, states, marks, retryable)


def _read(session: Session, document_ids: Collection[int]) -> dict[int, Entry]:
    if not document_ids:
        return {}
    found = entries(session, limit=len(document_ids), document_ids=document_ids)
    return {entry.id: entry for entry in found}


def _relabelled(before: Look, marks: Mapping[int, object], fresh: Mapping[int, Entry]) -> list[int]:
    """The documents that are told from others in another way, since one of their name came or went."""
    seen = before.documents
    came = {file_name(entry.name) for key, entry in fresh.items() if key not in seen}
    went = {file_name(entry.name) for key, entry in seen.items() if key not in marks}
    return [
        key
        for key, entry in seen.items()
        if key in marks and key not in fresh and file_name(entry.name) in came | went
    ]
