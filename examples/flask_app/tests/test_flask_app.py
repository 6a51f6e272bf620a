"""The shop with Flask's test client, and tasks as a worker would run them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import select

from celery_alchemy import Alchemy
from celery_alchemy.testing import Sent
from flask_app.app import create_app
from flask_app.models import Order, db
from flask_app.tasks import charge, invoice


@pytest.fixture(scope="module")
def app() -> Iterator[Flask]:
    """The application, whose Celery app is the process's current one."""
    app = create_app()
    yield app
    with app.app_context():
        db.engine.dispose()
    Celery("nobody").set_default()


@pytest.fixture
def alchemy(app: Flask) -> Alchemy:
    """What the fixtures of celery-alchemy work on."""
    alchemy: Alchemy = app.extensions["alchemy"]
    return alchemy


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """Sends requests."""
    return app.test_client()


def _order(client: FlaskClient) -> int:
    response = client.post("/orders", query_string={"item": "tea"})
    assert response.status_code == 202
    return int(response.get_json()["id"])


# <tests>
@pytest.mark.usefixtures("no_leaks")
def test_order_is_taken_and_charged(client: FlaskClient, sent: Sent) -> None:
    """The view writes and sends in the transaction of Flask-SQLAlchemy's session."""
    order_id = _order(client)

    assert sent == [charge.s(order_id)]
    assert [run.state for run in sent.run()] == ["SUCCESS"]
    assert client.get(f"/orders/{order_id}").json == {"item": "tea", "state": "charged"}


# </tests>


def test_task_that_says_db_session_is_committed(client: FlaskClient, sent: Sent) -> None:
    """It has Flask's application context, and needs no session in its signature."""
    order_id = _order(client)

    assert invoice.apply((order_id,), throw=True).get() == "flask_app.app: tea"

    assert client.get(f"/orders/{order_id}").json == {"item": "tea", "state": "invoiced"}


def test_eager_task_leaves_the_views_session_alone(app: Flask, client: FlaskClient, sent: Sent) -> None:
    """It has a session and transaction of its own."""
    order_id = _order(client)

    with app.app_context():
        order = db.session.get_one(Order, order_id)
        db.session.rollback()
        db.session.add(pending := Order(item="not yet"))
        invoice.apply((order_id,), throw=True)

        assert pending in db.session.new
        assert order in db.session


def test_views_and_tasks_have_one_engine(app: Flask, alchemy: Alchemy) -> None:
    """One pool of connections, one set of engine options."""
    with app.app_context():
        assert alchemy.engine is db.engine


def test_request_that_dies_before_its_commit_sends_nothing(app: Flask, client: FlaskClient, sent: Sent, crash_at: Any) -> None:
    """Neither is there an order."""
    with app.app_context():
        before = len(db.session.scalars(select(Order)).all())

    with crash_at("COMMIT, before"):
        _order(client)

    with app.app_context():
        assert len(db.session.scalars(select(Order)).all()) == before
    assert sent == []
