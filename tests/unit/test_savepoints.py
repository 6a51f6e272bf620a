"""What was written since a SAVEPOINT is no write of the transaction when the SAVEPOINT was rolled back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from celery_alchemy import UncommittedChangesError, released
from tests.unit.shop import Shop, add_books

INSERT = text("INSERT INTO book (title) VALUES ('Emma')")


def insert_twice(session: Session) -> None:
    for _ in range(2):
        session.execute(INSERT)


WRITES: dict[str, Callable[[Session], object]] = {
    "objects": lambda session: add_books(session, ["Emma"]),
    "text": lambda session: session.execute(INSERT),
    "refused": insert_twice,
    "driver": lambda session: session.connection().connection.cursor().execute(str(INSERT)),
}


@pytest.mark.parametrize("kind", WRITES)
def test_what_a_savepoint_has_rolled_back_is_no_write(shop: Shop, kind: str) -> None:
    """Nor are those of SAVEPOINTs in it, whichever way these ended."""

    @shop.task()
    def work(session: Session) -> None:
        session.execute(text("SELECT 1"))
        with suppress(IntegrityError), session.begin_nested() as outer:
            for inner_is_kept in (True, False):
                inner = session.begin_nested()
                add_books(session, [f"Sanditon {inner_is_kept}"])
                session.flush()
                inner.commit() if inner_is_kept else inner.rollback()
            WRITES[kind](session)
            session.flush()
            outer.rollback()
        with released(session):
            assert not session.in_transaction()

    assert shop.trace(work).state == "SUCCESS"
    assert shop.titles() == []


@pytest.mark.parametrize("kind", ["objects", "text", "driver"])
@pytest.mark.parametrize("when", ["before", "after", "released", "around"])
def test_what_no_savepoint_has_rolled_back_is_a_write(shop: Shop, kind: str, when: str) -> None:
    """A rollback takes back the SAVEPOINT's own writes alone; MariaDB cannot be asked for those of the driver."""
    if kind == "driver" and shop.database.name == "mariadb":
        pytest.skip("what no text shows is not seen there")

    @shop.task()
    def work(session: Session) -> None:
        session.execute(text("SELECT 1"))
        if when == "before":
            WRITES[kind](session)
        around = session.begin_nested() if when == "around" else None
        if around is not None:
            WRITES[kind](session)
        savepoint = session.begin_nested()
        add_books(session, ["Sanditon"])
        session.flush()
        savepoint.rollback()
        if around is not None:
            around.commit()
        if when == "after":
            WRITES[kind](session)
        if when == "released":
            with session.begin_nested():
                WRITES[kind](session)
        with released(session):
            pass

    assert isinstance(shop.trace(work).value, UncommittedChangesError)
    assert shop.titles() == []


@pytest.mark.parametrize("statement", ["SELECT lo_create(0)", "CREATE SCHEMA attic", "DROP TABLE book"])
@pytest.mark.parametrize("is_before", [True, False])
def test_what_changes_the_catalog_alone_is_a_write_after_a_rolled_back_savepoint(shop: Shop, statement: str, is_before: bool) -> None:
    """By a function or the driver's cursor it leaves no lock of a table that the database would tell of."""
    if shop.database.name != "postgresql":
        pytest.skip("the other databases have no such transaction, or count it")

    @shop.task()
    def work(session: Session) -> None:
        driver = session.connection().connection.cursor()
        if is_before and "book" not in statement:
            driver.execute(statement)
        savepoint = session.begin_nested()
        add_books(session, ["Sanditon"])
        session.flush()
        savepoint.rollback()
        if not is_before or "book" in statement:
            driver.execute(statement)
        with released(session):
            pass

    assert isinstance(shop.trace(work).value, UncommittedChangesError)
