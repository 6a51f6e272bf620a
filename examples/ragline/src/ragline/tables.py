"""The tables of ragline: sources, documents, their bytes, text, chunks and vectors."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy import Enum as EnumType
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ragline.states import State


def utc_now() -> dt.datetime:
    """The time, in UTC and aware of it."""
    return dt.datetime.now(dt.timezone.utc)


class UtcDateTime(TypeDecorator[dt.datetime]):
    """A point in time: aware in Python, UTC in the database, also where the database knows no time zones."""

    impl = DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        """To UTC."""
        return None if value is None else value.astimezone(dt.timezone.utc)

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        """To an aware value."""
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=dt.timezone.utc)


# MySQL and MariaDB cut TEXT and BLOB at 64 KB.
LongText = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
LongBytes = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
# A path can be longer than MySQL can index: the hash beside it carries the uniqueness.
LongName = String(4096)

_StateColumn = EnumType(
    State, native_enum=False, length=16, values_callable=lambda states: [s.value for s in states]
)


# Every character there is, compared as Python compares it, whatever a server's defaults are.
_OPTIONS: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
}
# SQLite would give the id of a deleted row again, and what was kept by that id would stand for another.
_OPTIONS_WITH_NEW_IDS: dict[str, Any] = {**_OPTIONS, "sqlite_autoincrement": True}


class Base(DeclarativeBase):
    """The declarative base of all ragline tables."""

    type_annotation_map = {dt.datetime: UtcDateTime}  # noqa: RUF012 - SQLAlchemy's own way to declare it
    __table_args__: Any = _OPTIONS


class Original(Base):
    """The bytes of a document as they were added, once for equal bytes."""

    __tablename__ = "original"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    data: Mapped[bytes] = mapped_column(LongBytes)


class Document(Base):
    """Some bytes, processed by one recipe: the same bytes twice are one document.

    The recipe (parser, splitter, embedder) is part of its identity: with a new model the same bytes become
    another document, which takes the old one's place when it is ready.
    """

    __tablename__ = "document"
    __table_args__ = (
        UniqueConstraint("digest", "parser", "splitter", "embedder"),
        _OPTIONS_WITH_NEW_IDS,
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of the bytes in hexadecimal; None where they could not be read."""
    name: Mapped[str] = mapped_column(String(512))
    size_bytes: Mapped[int]
    parser: Mapped[str] = mapped_column(String(64))
    splitter: Mapped[str] = mapped_column(String(64))
    embedder: Mapped[str] = mapped_column(String(64))

    state: Mapped[State] = mapped_column(_StateColumn, index=True)
    reason: Mapped[str | None] = mapped_column(Text)
    """Why it failed, for the person who added it."""
    is_permanent: Mapped[bool] = mapped_column(default=False)
    """Whether it failed for a reason that trying again does not change."""

    queued_at: Mapped[dt.datetime | None]
    parsing_at: Mapped[dt.datetime | None]
    splitting_at: Mapped[dt.datetime | None]
    embedding_at: Mapped[dt.datetime | None]
    ready_at: Mapped[dt.datetime | None]
    failed_at: Mapped[dt.datetime | None]
    paused_at: Mapped[dt.datetime | None]
    cancelled_at: Mapped[dt.datetime | None]


class Source(Base):
    """A place that documents come from, such as a path, and which document stands for it in searches."""

    __tablename__ = "source"

    id: Mapped[int] = mapped_column(primary_key=True)
    uri_digest: Mapped[str] = mapped_column(String(64), unique=True)
    uri: Mapped[str] = mapped_column(LongName)
    name: Mapped[str] = mapped_column(String(512), index=True)
    """The file's own name: places of the same one are told apart by their folders."""
    generation: Mapped[int] = mapped_column(default=0)
    """How often a document of this source has become the one that searches see."""
    serving_id: Mapped[int | None] = mapped_column(ForeignKey("document.id"), index=True)
    """The document that searches see."""
    pending_id: Mapped[int | None] = mapped_column(ForeignKey("document.id"), index=True)
    """The document that takes its place when it is ready, or the one that failed to."""


class DocumentText(Base):
    """What the parser made of a document; offsets of chunks refer to `text`."""

    __tablename__ = "document_text"

    document_id: Mapped[int] = mapped_column(ForeignKey("document.id", ondelete="CASCADE"), primary_key=True)
    text: Mapped[str] = mapped_column(LongText)
    headings: Mapped[list[tuple[int, int, str]]] = mapped_column(JSON)
    page_starts: Mapped[list[int]] = mapped_column(JSON)
    encoding: Mapped[str | None] = mapped_column(String(32))
    table_parts: Mapped[list[tuple[int, int]]] = mapped_column(JSON)
    blocks: Mapped[list[tuple[int, int, str]]] = mapped_column(JSON)


class Chunk(Base):
    """A passage of a document: `content` is exactly `text[start:end]` of it."""

    __tablename__ = "chunk"
    __table_args__ = (UniqueConstraint("document_id", "position"), _OPTIONS_WITH_NEW_IDS)

    id: Mapped[int] = mapped_column(primary_key=True)
    document_id: Mapped[int] = mapped_column(ForeignKey("document.id", ondelete="CASCADE"))
    position: Mapped[int]
    batch: Mapped[int]
    start: Mapped[int]
    end: Mapped[int]
    tokens: Mapped[int]
    first_page: Mapped[int | None]
    last_page: Mapped[int | None]
    heading: Mapped[str] = mapped_column(LongText)
    content: Mapped[str] = mapped_column(LongText)
    digest: Mapped[int] = mapped_column(BigInteger)
    """The same for the same words: searches show a text once, however many documents have it."""


class Vector(Base):
    """The embedding of a chunk: little-endian float32, of length one."""

    # `vector` is the name of a type in pgvector.
    __tablename__ = "embedding"

    chunk_id: Mapped[int] = mapped_column(ForeignKey("chunk.id", ondelete="CASCADE"), primary_key=True)
    embedder: Mapped[str] = mapped_column(String(64))
    data: Mapped[bytes] = mapped_column(LongBytes)


class IndexState(Base):
    """The one row that says how far the index has come: who changes what searches see, changes it too.

    Its lock puts such changes in the order of their commits: a reader that knows a version knows all
    that came before it.
    """

    __tablename__ = "index_state"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int] = mapped_column(BigInteger)
    chunks: Mapped[int] = mapped_column(BigInteger)
    """How many chunks searches see."""
    words: Mapped[int] = mapped_column(BigInteger)
    """How many different words each of those has, summed, where the database needs it for ranking."""


class Shown(Base):
    """Since which version of the index searches see a document, or do not see it any more."""

    # Without a foreign key: that a document is gone is what its row says.
    __tablename__ = "shown"

    document_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int] = mapped_column(BigInteger, index=True)
    is_shown: Mapped[bool]
