"""Which statements commit the open transaction: COMMIT as text, and those that imply one.

Beside ``statements.py``; ``sessions/commits_past_session.py`` asks for each statement that was
written as text, or defines tables, where a commit of the body's own matters.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache

__all__ = ["CommitsBy", "committing"]

_FLAGS = re.IGNORECASE | re.DOTALL


class CommitsBy(Enum):
    """How a statement commits the open transaction.

    Attributes:
        NOTHING: It does not.
        ITSELF: It is a COMMIT. Where it fails, nothing is committed.
        IMPLICATION: The server commits before it carries the statement out, also where that fails.
        CHANGING: The same, and what the statement changes is committed at once as well.
    """

    NOTHING = 0
    ITSELF = 1
    IMPLICATION = 2
    CHANGING = 3


# Comments, and what stands between quotes or the dollar signs of PostgreSQL. A comment that
# begins with /*! or /*M! is none to MySQL and MariaDB.
_HIDDEN = re.compile(
    r"""/\*(?!M?!).*?\*/|--[^\n]*|'(?:[^'\\]|''|\\.)*'|"(?:[^"]|"")*"|`[^`]*`|\$(\w*)\$.*?\$\1\$""",
    _FLAGS,
)
_EXECUTED_COMMENT = re.compile(r"/\*M?!\d*|\*/")

# Semicolons in the body of a routine or a trigger end no statement of the transaction's, and an
# END there is no COMMIT.
_ROUTINE = re.compile(
    r"\s*create\b(?:(?!\b(?:as|begin|on)\b)[^;])*?\b(?:function|procedure|trigger|package|event)\b",
    _FLAGS,
)

# COMMIT PREPARED is refused inside of a transaction; PREPARE TRANSACTION ends it and keeps what
# it has done.
# Sources: https://www.postgresql.org/docs/current/sql-end.html,
# https://www.postgresql.org/docs/current/sql-prepare-transaction.html,
# https://www.sqlite.org/lang_transaction.html
_COMMIT = re.compile(r"\s*(?:commit|end|prepare\s+transaction)\b", _FLAGS)

# Sources: https://dev.mysql.com/doc/refman/8.0/en/implicit-commit.html,
# https://mariadb.com/kb/en/sql-statements-that-cause-an-implicit-commit/
# A temporary table is made and dropped without a commit. BEGIN NOT ATOMIC is a block of statements,
# DROP PREPARE gives a prepared statement back. SET autocommit=1 has every later write committed
# too.
_MYSQL_CHANGING = re.compile(
    r"""\s*(?:
        alter\b
        | create\b (?!\s+(?:or\s+replace\s+)?temporary\b)
        | drop\b (?!\s+(?:temporary|prepare)\b)
        | rename\b | truncate\b
        | grant\b | revoke\b | set\s+password\b
        | install\b | uninstall\b
        | set\b [^;]* \bautocommit\s*:?=\s*(?:1|on|true)\b
    )""",
    _FLAGS | re.VERBOSE,
)
_MYSQL_IMPLYING = re.compile(
    r"""\s*(?:
        begin\b (?!\s+not\b) | start\s+transaction\b
        | lock\s+tables?\b | unlock\s+tables?\b
        | (?:analyze|optimize|repair|check)\b
            (?:\s+(?:local|no_write_to_binlog))? \s+(?:table|view)s?\b
        | cache\s+index\b | load\s+index\b
        | flush\b | reset\b (?!\s+persist\b) | shutdown\b
        | (?:start|stop)\s+(?:replica|slave|group_replication)\b
        | change\s+(?:master|replication)\b
    )""",
    _FLAGS | re.VERBOSE,
)
# SET STATEMENT max_statement_time=60 FOR TRUNCATE ..., of MariaDB.
_SET_STATEMENT = re.compile(r"\s*set\s+statement\b[^;]*?\bfor\b", _FLAGS)

_MYSQL = ("mysql", "mariadb")

# Statements up to this length are judged once; a long one is hardly sent twice.
_KEPT_LENGTH = 2000


def committing(statement: str, dialect_name: str) -> CommitsBy:
    """Return how a statement commits the transaction that it is sent in.

    A procedure that commits, and what is prepared from a text on the server, cannot be seen.

    Args:
        statement: The text that the driver gets, written by the user or one that defines tables.
        dialect_name: SQLAlchemy's name of the database.
    """
    is_mysql = dialect_name in _MYSQL
    judge = _judged if len(statement) <= _KEPT_LENGTH else _judge
    return judge(statement, is_mysql)


def _judge(statement: str, is_mysql: bool) -> CommitsBy:
    text = _HIDDEN.sub(" ", statement)
    if is_mysql:
        text = _EXECUTED_COMMENT.sub(" ", text)
    parts = [text] if _ROUTINE.match(text) else text.split(";")
    found = [_judge_one(part, is_mysql) for part in parts]
    return max(found, key=lambda one: one.value)


def _judge_one(text: str, is_mysql: bool) -> CommitsBy:
    if not is_mysql:
        return CommitsBy.ITSELF if _COMMIT.match(text) else CommitsBy.NOTHING
    text = _SET_STATEMENT.sub(" ", text)
    if _MYSQL_CHANGING.match(text):
        return CommitsBy.CHANGING
    if _MYSQL_IMPLYING.match(text):
        return CommitsBy.IMPLICATION
    return CommitsBy.ITSELF if text.lstrip()[:6].lower() == "commit" else CommitsBy.NOTHING


_judged = lru_cache(maxsize=512)(_judge)
