"""What the text of a statement shows: whether it changes rows or tables, and whether it locks rows.

Beneath ``sessions/ledger.py``, which asks for each statement that a session sends.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from sqlalchemy import TextualSelect
from sqlalchemy.engine.default import DefaultExecutionContext

__all__ = ["Shown", "is_query", "locked_tables", "shown_by", "shown_by_text"]

_FLAGS = re.IGNORECASE | re.DOTALL

# Comments, and what stands between quotes: nothing in there is a word of the statement.
_HIDDEN = re.compile(r"/\*.*?\*/|--[^\n]*|'(?:[^']|'')*'", _FLAGS)

# What text() and exec_driver_sql() may send without changing a row. Anything else counts as a
# write: a false "write" asks for a commit too many, a false "read" loses a row.
_READS = re.compile(
    r"\s*(?:select|show|set|explain|describe|values|table|with|pragma|savepoint|release|rollback"
    r"|begin|start)\b",
    _FLAGS,
)

# What makes a write of a text that begins like a read: a second statement behind it, a new table, a
# common table expression or an EXPLAIN ANALYZE that changes rows.
_SECOND = re.compile(r";\s*\S")
_CHANGES = re.compile(r"\b(?:insert|update|delete|merge|replace|into|create)\b", _FLAGS)
_CHANGING = re.compile(r"\s*(?:with|explain\b.*\banaly[sz]e)\b", _FLAGS)
_INTO = re.compile(r"\s*select\b.*\binto\b", _FLAGS)

# Sources: https://www.postgresql.org/docs/current/sql-select.html#SQL-FOR-UPDATE-SHARE,
# https://dev.mysql.com/doc/refman/8.0/en/innodb-locking-reads.html
_LOCKS = re.compile(
    r"\bfor\s+(?:no\s+key\s+)?update\b|\bfor\s+(?:key\s+)?share\b|\block\s+in\s+share\s+mode\b",
    _FLAGS,
)
_FROM = re.compile(r"\bfrom\s+(?:only\s+)?([\w.\"`]+)", _FLAGS)

# Statements up to this length are judged once; a long one is hardly sent twice.
_KEPT_LENGTH = 2000

_NO_SELECT = object()


class Shown(NamedTuple):
    """What a statement's text shows.

    Attributes:
        writes: It changes rows or tables, or may do so.
        locks: It locks the rows that it reads.
    """

    writes: bool
    locks: bool


_READS_ONLY = Shown(writes=False, locks=False)
_READS_AND_LOCKS = Shown(writes=False, locks=True)
_WRITES = Shown(writes=True, locks=False)


def shown_by(context: DefaultExecutionContext, statement: str) -> Shown:
    """Return what a statement shows that SQLAlchemy is about to send.

    Args:
        context: SQLAlchemy's ``ExecutionContext``.
        statement: The text that the driver gets.
    """
    compiled = context.compiled
    if compiled is None or context.is_text:
        return shown_by_text(statement)
    # SQLite has no FOR UPDATE, but the lock that BEGIN IMMEDIATE took: what counts is what was
    # asked for. That is searched for in the text too, because it may be in a subquery.
    asked = getattr(compiled.statement, "_for_update_arg", _NO_SELECT)
    if asked is None and statement.startswith("SELECT"):
        return _READS_AND_LOCKS if _has_lock(statement) else _READS_ONLY
    if context.isinsert or context.isupdate or context.isdelete or context.isddl:
        return _WRITES
    if isinstance(compiled.statement, TextualSelect):
        return shown_by_text(statement)
    # A SELECT from what an INSERT, UPDATE or DELETE in front of it returns.
    if any(getattr(cte.element, "is_dml", False) for cte in getattr(compiled, "ctes", None) or ()):
        return _WRITES
    locks = asked not in (None, _NO_SELECT) or _has_lock(statement)
    return _READS_AND_LOCKS if locks else _READS_ONLY


def shown_by_text(statement: str) -> Shown:
    """Return what a statement shows that the user wrote as text."""
    return _judged(statement) if len(statement) <= _KEPT_LENGTH else _judge(statement)


def _judge(statement: str) -> Shown:
    text = _HIDDEN.sub(" ", statement)
    locks = _LOCKS.search(text) is not None
    # The clause is none of the words that change rows.
    text = _LOCKS.sub(" ", text)
    writes = (
        _READS.match(text) is None
        or _SECOND.search(text) is not None
        or _INTO.match(text) is not None
        or (_CHANGING.match(text) is not None and _CHANGES.search(text) is not None)
    )
    return Shown(writes, locks)


_judged = lru_cache(maxsize=512)(_judge)


def _has_lock(statement: str) -> bool:
    """Tell whether SQLAlchemy has put a lock into a statement, in a subquery say."""
    if len(statement) <= _KEPT_LENGTH:
        return _locks(statement)
    return " FOR " in statement and _LOCKS.search(statement) is not None


# Each SELECT asks: 0.1 us, where the search takes 1 us.
_locks = lru_cache(maxsize=512)(lambda statement: _LOCKS.search(statement) is not None)


def is_query(statement: str) -> bool:
    """Tell whether a statement reads, by its first word."""
    return _READS.match(_HIDDEN.sub(" ", statement)) is not None


def locked_tables(statement: str) -> tuple[str, ...]:
    """Return the tables that a statement which locks rows names first.

    Empty where none is found.
    """
    found = _FROM.search(_HIDDEN.sub(" ", statement))
    return () if found is None else (found.group(1).replace('"', "").replace("`", ""),)
