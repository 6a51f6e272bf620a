"""The types of the columns of the library's own tables, which must hold the same on every database.

Underneath the tables. MySQL's own defaults would lose microseconds, compare texts without case, and
cut what is long.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, DateTime, Integer, LargeBinary, String, Text
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

__all__ = ["BLOB", "ID", "ID_MAX_LENGTH", "NUMBER", "QUEUE", "QUEUE_MAX_LENGTH", "TEXT", "TIME"]

ID_MAX_LENGTH = 255

#: AMQP allows 255 bytes. A key of InnoDB holds 3072 bytes, and a character of utf8mb4 takes four.
#: Source: https://dev.mysql.com/doc/refman/8.0/en/innodb-limits.html
QUEUE_MAX_LENGTH = 500


#: Whatever the database has: many have latin1 still, which refuses most letters.
_EXACT = {"charset": "utf8mb4", "collation": "utf8mb4_bin"}


def _exact(length: int) -> TypeEngine[str]:
    exact = mysql.VARCHAR(length, **_EXACT)
    return String(length).with_variant(exact, "mysql", "mariadb")


ID = _exact(ID_MAX_LENGTH)
QUEUE = _exact(QUEUE_MAX_LENGTH)
TIME = DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
BLOB = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
TEXT = Text().with_variant(mysql.LONGTEXT(**_EXACT), "mysql", "mariadb")
#: A number that the database counts up; SQLite only does so for INTEGER.
NUMBER = BigInteger().with_variant(Integer(), "sqlite")
