"""What the API takes and gives, as OpenAPI describes it."""

from __future__ import annotations

import datetime as dt

from pydantic import BaseModel, Field

from ragline.answers import Part
from ragline.asking import Answer as Answered
from ragline.intake import Intake
from ragline.progress import Entry
from ragline.reading import Detail
from ragline.retrieval import Found
from ragline.searching import Passage as FoundPassage
from ragline.states import State
from ragline.text import Block as FoundBlock
from ragline.text import Kind
from ragline.words import marked_spans


class Problem(BaseModel):
    """Why a request was not done."""

    detail: str = Field(description="For the person who asked.")


class Document(BaseModel):
    """A document in a list."""

    id: int
    name: str = Field(description="That of its file, with the folders that tell it from others.")
    uris: list[str] = Field(description="The places that show it or wait for it.")
    size_bytes: int
    state: State
    is_found: bool = Field(description="Whether searches see it.")
    is_newer: bool = Field(description="Whether searches see another version of it until it is ready.")
    since: dt.datetime | None = Field(description="When it came into its state.")
    chunks: int = Field(description="Passages so far.")
    embedded: int = Field(description="How many of them have their vector.")
    reason: str | None = Field(description="Why it failed.")
    is_permanent: bool = Field(
        description="Whether it failed for a reason that trying again does not change."
    )

    @classmethod
    def of(cls, entry: Entry) -> Document:
        """A list's entry."""
        return cls.model_validate(entry, from_attributes=True)


class DocumentPage(BaseModel):
    """Documents, in the order that was asked for."""

    documents: list[Document]
    before: int | None = Field(
        description="What to pass as `before` for older ones; null on the last page, or in another order."
    )
    has_more: bool = Field(description="Whether there are more: pass `skip`.")


class Heading(BaseModel):
    """A heading of a text."""

    start: int = Field(description="Where it begins, in characters of the whole text.")
    level: int = Field(description="1 is the highest.")
    title: str


class DocumentDetail(Document):
    """A document with all that is known of it."""

    reached: dict[State, dt.datetime] = Field(
        description="When it came into each state, in the order of time."
    )
    characters: int | None
    pages: int | None
    encoding: str | None
    embedder: str
    headings: list[Heading]

    @classmethod
    def of_detail(cls, detail: Detail) -> DocumentDetail:
        """A document's detail."""
        return cls(
            **Document.of(detail.entry).model_dump(),
            reached=detail.reached,
            characters=detail.characters,
            pages=detail.pages,
            encoding=detail.encoding,
            embedder=detail.embedder,
            headings=[Heading.model_validate(one, from_attributes=True) for one in detail.headings],
        )


class Upload(BaseModel):
    """What became of an upload."""

    outcome: Intake
    document: Document


class Retried(BaseModel):
    """The documents that are tried again."""

    ids: list[int]


class Messages(BaseModel):
    """The library's outbox, counted."""

    waiting: int = Field(description="For a worker, for their time, or to be handed to another broker.")
    owed: int = Field(description="Begun, or sent, and sent again until they are done.")
    dead: int = Field(description="Given up when their document failed; gone when it is retried or deleted.")


class Status(BaseModel):
    """The state of everything."""

    documents: dict[State, int]
    retryable: int = Field(description="Documents that failed for a reason that may pass.")
    messages: Messages | None = Field(description="Null until they have been counted.")
    workers: list[str] | None = Field(description="Who answers; null where the broker does not.")
    is_worked_on: bool = Field(
        description="Whether a worker moved a document on just now, also one that has not answered yet."
    )
    is_keyword_only: bool = Field(description="Whether searches go by words alone, for want of an embedder.")
    can_ask: bool = Field(description="Whether a language model is set up to answer.")


class Limits(BaseModel):
    """What an upload may be."""

    max_bytes: int
    extensions: list[str] = Field(
        description="What is taken from a folder; a file of its own may be any text."
    )


class Update(BaseModel):
    """What has changed."""

    is_whole: bool = Field(
        description="Whether this is all there is, to be shown instead of what was before."
    )
    documents: list[Document] = Field(description="Those that are new or changed, the newest first.")
    removed: list[int]
    status: Status


class Block(BaseModel):
    """A part of a text that is code or a table, in characters of the whole text."""

    start: int
    end: int
    kind: Kind

    @classmethod
    def of(cls, block: FoundBlock) -> Block:
        """A block that was found."""
        return cls.model_validate(block, from_attributes=True)


class Place(BaseModel):
    """Where a passage stands."""

    document_id: int
    name: str
    heading: str
    pages: tuple[int, int] | None = Field(description="First and last page, from 1.")
    start: int
    end: int
    citation: str


def marks_in(quote: str, place: int, query: str) -> list[tuple[int, int]]:
    """Where the words of a query stand in a quote with its place in a text, in characters of that text."""
    return [(place + start, place + end) for start, end in marked_spans(quote, query)]


class Passage(Place):
    """A passage, and where it stands: `quote` is exactly `text[start:end]` of its document."""

    quote: str
    score: float
    also: list[Place] = Field(description="The other places where the same words stand.")
    is_near: bool = Field(description="Whether it has no word of the query, and other passages have one.")
    blocks: list[Block] = Field(default=[], description="The code and the tables in it.")
    marks: list[tuple[int, int]] = Field(
        default=[],
        description="Where the words of the query stand in it, in characters of the whole text.",
    )

    @classmethod
    def of(cls, passage: FoundPassage, query: str) -> Passage:
        """A passage that was found."""
        found = cls.model_validate(passage, from_attributes=True)
        found.marks = marks_in(passage.quote, passage.start, query)
        return found


class Results(BaseModel):
    """What a search finds."""

    passages: list[Passage]
    note: str | None
    has_more: bool = Field(description="Whether there are more: pass `skip`.")

    @classmethod
    def of(cls, found: Found, query: str, *, skip: int, limit: int) -> Results:
        """A piece of what was found."""
        piece = [Passage.of(passage, query) for passage in found.passages[skip : skip + limit]]
        has_more = len(found.passages) > skip + limit
        return cls(passages=piece, note=found.note, has_more=has_more)


class Excerpt(BaseModel):
    """A passage in its text."""

    name: str
    before: str
    quote: str
    after: str
    start: int = Field(description="Where `before` begins, in characters of the whole text.")
    end: int = Field(description="Where `after` ends.")
    length: int = Field(description="Of the whole text.")
    is_start: bool = Field(description="Whether nothing stands before it that is not here.")
    is_end: bool
    blocks: list[Block] = Field(description="The code and the tables between `start` and `end`.")
    marks: list[tuple[int, int]] = Field(
        default=[],
        description="Where the words of `q` stand in `quote`, in characters of the whole text.",
    )


class Hits(BaseModel):
    """Where words stand in a text, in its order."""

    hits: list[tuple[int, int]] = Field(
        description="Where each begins and ends, in characters of the whole text."
    )
    has_more: bool = Field(description="Whether there are more than these.")


class Question(BaseModel):
    """What to answer from the documents."""

    question: str = Field(min_length=1, max_length=2000)


class AnswerPart(BaseModel):
    """A piece of an answer."""

    text: str
    citation: int | None = Field(description="The number of the passage that it cites, from 1.")
    is_unverified: bool = Field(description="A quotation that stands in none of the passages.")

    @classmethod
    def of(cls, part: Part) -> AnswerPart:
        """A checked piece."""
        return cls.model_validate(part, from_attributes=True)


class Quoted(BaseModel):
    """What an answer quotes, as it stands in a passage."""

    passage: int = Field(description="The number of the passage, from 1.")
    text: str


class Answer(BaseModel):
    """An answer, checked against the passages that it was made of."""

    parts: list[AnswerPart]
    passages: list[Passage]
    quoted: list[Quoted]
    notes: list[str]

    @classmethod
    def of(cls, answered: Answered, question: str) -> Answer:
        """A checked answer."""
        parts = () if answered.checked is None else answered.checked.parts
        quoted = () if answered.checked is None else answered.checked.quoted
        return cls(
            parts=[AnswerPart.of(part) for part in parts],
            quoted=[Quoted(passage=one.passage, text=one.text) for one in quoted],
            passages=[Passage.of(passage, question) for passage in answered.passages],
            notes=answered.notes,
        )


class Login(BaseModel):
    """The token that the server was started with."""

    token: str = Field(max_length=1000)
