"""The tests of a Flask-SQLAlchemy application: its tasks join the transaction that its suite rolls back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, Task
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Integer, String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import Alchemy
from celery_alchemy.testing import joined
from tests.services.databases import Database
from tests.stand import task_of

pytestmark = pytest.mark.databases("sqlite", "postgresql", "mariadb")


class Base(DeclarativeBase):
    """The tables of the application."""


db = SQLAlchemy(model_class=Base)


class Order(Base):
    """What a customer wants."""

    __tablename__ = "flask_order"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    item: Mapped[str] = mapped_column(String(50))


class Suite:
    """The application of one test.

    Attributes:
        alchemy: Of its Celery app.
        database: The same database as from outside: what is committed for good.
    """

    def __init__(self, web: Flask, database: Database) -> None:
        self.database = database

        class FlaskTask(Task):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                with web.app_context():
                    return self.run(*args, **kwargs)

        self.app = Celery("flask", task_cls=FlaskTask, broker="memory://", set_as_current=False)
        self.alchemy = Alchemy(self.app, db.session, outbox=True)

        @task_of(self.app)
        def sell(item: str) -> list[str]:
            db.session.add(Order(item=item))
            db.session.commit()  # As its tasks have done until today.
            return list(db.session.scalars(select(Order.item).order_by(Order.id)))

        @task_of(self.app)
        def look(session: Session) -> list[str]:
            return list(session.scalars(select(Order.item).order_by(Order.id)))

        self.sell, self.look = sell, look

    def committed(self) -> int:
        """How many orders there are for good."""
        return int(self.database.scalar("SELECT count(*) FROM flask_order"))


@pytest.fixture
def suite(database: Database) -> Iterator[Suite]:
    """The application, in an application context, as suites of Flask applications have one."""
    web = Flask("suite")
    web.config["SQLALCHEMY_DATABASE_URI"] = database.url
    db.init_app(web)
    with web.app_context():
        db.create_all()
        suite = Suite(web, database)
        suite.alchemy.create_tables()
        yield suite
        db.session.remove()
        db.engine.dispose()
    suite.app.close()


def test_all_that_say_db_session_join_the_tests_transaction(suite: Suite) -> None:
    """The test, its views and its tasks; each task has a session of its own."""
    with joined(suite.alchemy):
        db.session.add(Order(item="tea"))  # neither flushed nor committed

        assert suite.sell("milk") == ["tea", "milk"]
        assert suite.sell.apply(["salt"], throw=True).get() == ["tea", "milk", "salt"]
        assert suite.look() == ["tea", "milk", "salt"]
        assert len(db.session.scalars(select(Order)).all()) == 3
        db.session.remove()

    assert suite.committed() == 0


def test_suite_with_a_fixture_of_its_own_goes_on_with_it(suite: Suite) -> None:
    """A session in a transaction that is rolled back, in the place of that of the test's context."""
    with db.engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")
        mine = Session(connection, join_transaction_mode="create_savepoint")
        db.session.registry.set(mine)
        db.session.add(Order(item="tea"))

        assert suite.look(session=db.session) == ["tea"]
        with joined(suite.alchemy, db.session):
            assert suite.sell("milk") == ["tea", "milk"]
        assert db.session() is mine
        assert len(db.session.scalars(select(Order)).all()) == 2
        db.session.remove()
        connection.rollback()

    assert suite.committed() == 0
