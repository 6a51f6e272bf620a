"""What `enqueue` takes for a signature, and for a session."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
from celery import chain, group
from celery.canvas import Signature
from sqlalchemy.orm import scoped_session, sessionmaker

from celery_alchemy import ConfigurationError, SignatureError, enqueue
from tests.unit.shop import Shop

pytestmark = pytest.mark.databases("sqlite")


@pytest.fixture
def charge(shop: Shop) -> Any:
    """A task."""

    @shop.task(name="shop.charge")
    def charge(order_id: int) -> None: ...

    return charge


WRONG: dict[str, Any] = {
    "task": lambda charge: charge,
    "task itself": lambda charge: charge._get_current_object(),
    "None": lambda charge: None,
    "text": lambda charge: "shop.charge",
    "Mock": lambda charge: mock.Mock(),
    "MagicMock": lambda charge: mock.MagicMock(),
    "Mock of a signature": lambda charge: mock.Mock(spec=Signature),
    "Mock of a task": lambda charge: mock.create_autospec(charge._get_current_object(), name="charge"),
    "method": lambda charge: charge.s,
    "list": lambda charge: [charge.s(1)],
    "empty dict": lambda charge: {},
    "result": lambda charge: charge.AsyncResult("1"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_signature_is_refused(shop: Shop, charge: Any, kind: str) -> None:
    """With how a signature is made; it is a TypeError too, and nothing waits for the commit."""
    wrong = WRONG[kind](charge)
    before = shop.waiting()

    with shop.alchemy.session() as session:
        with pytest.raises(SignatureError, match=r"needs a signature.*\.s\(\.\.\.\)") as caught:
            enqueue(session, wrong)
        assert isinstance(caught.value, TypeError)
        session.commit()

    assert shop.waiting() == before


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("task", "the task 'shop.charge' itself. Write enqueue(session, charge.s(...))"),
        ("None", "was given None"),
        ("text", "the text 'shop.charge'. Write enqueue(session, charge.s(...))"),
        ("Mock", "was given a Mock"),
        ("result", "was given a AsyncResult"),
    ],
)
def test_error_says_what_was_given(shop: Shop, charge: Any, kind: str, text: str) -> None:
    """And shows the call to write instead."""
    with shop.alchemy.session() as session, pytest.raises(SignatureError) as caught:
        enqueue(session, WRONG[kind](charge))

    assert text in str(caught.value)


def test_exchanged_arguments_are_named(shop: Shop, charge: Any) -> None:
    """The session comes first."""
    with shop.alchemy.session() as session:
        wrong: Any = session
        with pytest.raises(SignatureError, match="the session is the first argument"):
            enqueue(charge.s(1), wrong)
        with pytest.raises(ConfigurationError, match="A session was expected"):
            enqueue(mock.Mock(), charge.s(1))


def test_every_kind_of_signature_is_sent(shop: Shop, charge: Any) -> None:
    """A task's, a canvas, and one that came through a serializer."""
    before = shop.waiting()

    with shop.alchemy.begin() as session:
        enqueue(session, charge.s(1))
        enqueue(session, group(charge.s(2), charge.s(3)))
        enqueue(session, chain(charge.si(4), charge.si(5)))
        enqueue(session, shop.app.signature(json.loads(json.dumps(charge.s(6)))))

    assert shop.waiting() == before + 5


def test_signature_that_became_a_mapping_is_sent_by_the_current_app(shop: Shop, charge: Any) -> None:
    """Celery gives it a proxy for its app."""
    shop.app.set_current()
    before = shop.waiting()

    with shop.alchemy.begin() as session:
        mapping: Any = dict(charge.s(1))
        enqueue(session, mapping)

    assert shop.waiting() == before + 1


def test_registry_stands_for_its_session(shop: Shop, charge: Any) -> None:
    """Inside of a task for the task's, outside for that of the web request."""
    registry = scoped_session(sessionmaker(shop.alchemy.engine))
    before = shop.waiting()

    enqueue(registry, charge.s(1))
    assert shop.waiting() == before
    registry.commit()
    registry.remove()

    assert shop.waiting() == before + 1
