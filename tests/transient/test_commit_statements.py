"""Statements that commit the open transaction are known by their text, and no others are."""

from __future__ import annotations

import pytest

from celery_alchemy.databases.commit_statements import CommitsBy, committing

EVERYWHERE = [
    "commit",
    " COMMIT AND CHAIN",
    "/* done */ Commit work",
    "INSERT INTO book (title) VALUES ('a;b'); commit",
    "-- first\nCOMMIT",
]
ELSEWHERE = ["END", "end transaction", "PREPARE TRANSACTION 'x'"]
MYSQL_CHANGING = [
    "TRUNCATE TABLE staging",
    "truncate staging",
    "CREATE TABLE a (id INT)",
    "create or replace table a (id int)",
    "CREATE UNIQUE INDEX ix ON a (id)",
    "CREATE PROCEDURE p() BEGIN SELECT 1; END",
    "ALTER TABLE a COMMENT 'x'",
    "DROP TABLE IF EXISTS a",
    "RENAME TABLE a TO b",
    "GRANT SELECT ON *.* TO u",
    "REVOKE ALL ON a FROM u",
    "SET PASSWORD = 'x'",
    "SET autocommit=1",
    "SET SESSION autocommit = ON",
    "set @@session.autocommit = 1",
    "INSTALL PLUGIN p SONAME 'x'",
    "SET STATEMENT max_statement_time=60 FOR TRUNCATE staging",
    "/*!50003 DROP TABLE a */",
    "UPDATE a SET id = 1; DROP TABLE b",
]
MYSQL_IMPLYING = [
    "BEGIN",
    "begin work",
    "START TRANSACTION READ ONLY",
    "LOCK TABLES a WRITE",
    "unlock tables",
    "ANALYZE TABLE a",
    "ANALYZE NO_WRITE_TO_BINLOG TABLE a",
    "OPTIMIZE TABLE a",
    "REPAIR TABLE a",
    "CHECK TABLE a",
    "CACHE INDEX a IN hot",
    "LOAD INDEX INTO CACHE a",
    "FLUSH TABLES",
    "RESET QUERY CACHE",
    "STOP SLAVE",
    "START REPLICA",
    "CHANGE MASTER TO MASTER_HOST='x'",
]
MYSQL_NOTHING = [
    "CREATE TEMPORARY TABLE t (id INT)",
    "CREATE OR REPLACE TEMPORARY TABLE t (id INT)",
    "DROP TEMPORARY TABLE t",
    "DROP PREPARE s",
    "BEGIN NOT ATOMIC SELECT 1",
    "SET autocommit=0",
    "SET @x = 1",
    "SET TRANSACTION READ ONLY",
    "ANALYZE SELECT 1",
    "SELECT 'a; truncate b'",
    "INSERT INTO log VALUES ('it\\'s; commit')",
    "CALL p()",
    "RESET PERSIST max_connections",
]
NOWHERE = [
    "SELECT 1",
    "SELECT 'commit'",
    'SELECT "x; commit" FROM a',
    "UPDATE commit SET id = 1",
    "SAVEPOINT a",
    "RELEASE SAVEPOINT a",
    "ROLLBACK",
    "INSERT INTO ends VALUES (1); SELECT 1",
    "-- commit\nSELECT 1",
]
ELSEWHERE_NOTHING = [
    "TRUNCATE TABLE staging",
    "CREATE TABLE a (id INT)",
    "LOCK TABLE a",
    "BEGIN",
    "CREATE TRIGGER t AFTER INSERT ON a BEGIN UPDATE b SET id = 1; END",
    "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM 1; END; $$",
    "CREATE OR REPLACE PROCEDURE p() LANGUAGE SQL BEGIN ATOMIC DELETE FROM a; END",
    "DO $x$ BEGIN PERFORM 1; END $x$",
]
EXPECTED = [
    *((one, "mysql", CommitsBy.ITSELF) for one in EVERYWHERE),
    *((one, "mysql", CommitsBy.CHANGING) for one in MYSQL_CHANGING),
    *((one, "mysql", CommitsBy.IMPLICATION) for one in MYSQL_IMPLYING),
    *((one, "mysql", CommitsBy.NOTHING) for one in (*MYSQL_NOTHING, *NOWHERE)),
    *((one, "postgresql", CommitsBy.ITSELF) for one in (*EVERYWHERE, *ELSEWHERE)),
    *((one, "sqlite", CommitsBy.NOTHING) for one in (*NOWHERE, *ELSEWHERE_NOTHING)),
]


@pytest.mark.parametrize(("statement", "dialect", "expected"), EXPECTED)
def test_text_of_a_statement_says_whether_it_commits(statement: str, dialect: str, expected: CommitsBy) -> None:
    """MySQL and MariaDB commit for many a statement, the others for COMMIT alone."""
    assert committing(statement, dialect) is expected
    assert committing(statement + " " * 2001, dialect) is expected
