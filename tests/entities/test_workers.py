"""Entities in real workers: in every canvas, through the outbox, with every serializer that is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from celery_alchemy.requests.registry import home_of
from tests.conftest import StartWorker
from tests.entities.app import library_of
from tests.entities.library import Base, Copy, Novel, Work
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.workers import Pool

#: Each pool and each database; all pairs would take longer and say no more.
PAIRS = [("prefork", "sqlite"), ("prefork", "postgresql"), ("threads", "mariadb"), ("threads", "postgresql")]
SERIALIZERS = ["json", "pickle", *(name for name in ("yaml", "msgpack") if find_spec(name))]


def result_of(result: Any) -> Any:
    return result.get(timeout=60, interval=0.02)


@pytest.mark.parametrize(("pool", "database"), PAIRS, indirect=["database"])
@pytest.mark.brokers("redis")
def test_entities_arrive_in_real_workers(start_worker: StartWorker, broker: Broker, database: Database, pool: Pool) -> None:
    """Alone, in chains, groups and chords, with each serializer, from the outbox, and from one task to the next."""
    app = broker.app("library")
    tasks = library_of(app, database.url)
    alchemy: Any = home_of(app)
    Base.metadata.create_all(database.engine)
    alchemy.create_tables()
    with Session(database.engine, expire_on_commit=False) as session, session.begin():
        emma, novel, copy = Work(title="Emma"), Novel(title="Ulysses"), Copy(shelf="A", number=3)
        session.add_all([emma, novel, copy])
    start_worker("tests.entities.app", pool=pool, concurrency=2)

    for serializer in SERIALIZERS:
        sent = tasks.titles.apply_async(([novel, emma],), {"nobody": None}, serializer=serializer)
        assert result_of(sent) == ["Ulysses", "Emma"], serializer
    assert result_of(tasks.shout.delay(emma)) == "EMMA"
    assert result_of(chain(tasks.shout.s(novel), tasks.append.s(emma, suffix="!"), tasks.append.s(emma, suffix="?")).delay()) == (
        "ULYSSES EMMA! EMMA!?"
    )
    assert result_of(group(tasks.shout.s(emma), tasks.shout.s(novel)).delay()) == ["EMMA!?", "ULYSSES"]
    assert result_of(chord([tasks.shout.s(novel), tasks.shout.s(emma)], tasks.gather.s(copy)).delay()) == "A3: EMMA!? ULYSSES"
    with alchemy.begin() as session:
        session.add_all([poem := Work(title="Poem"), letter := Work(title="Letter")])
        session.flush()
        several = enqueue(session, chord([tasks.shout.si(poem), tasks.shout.si(emma)], tasks.gather.s(copy)))
        twice = [enqueue(session, tasks.lengthen.s(letter)) for _ in range(2)]
    assert result_of(several) == "A3: EMMA!? POEM"
    assert result_of(twice[0]) == "Letter+"
    handed_on = app.AsyncResult(result_of(tasks.hand_on.delay(novel)))
    assert result_of(handed_on) == "ULYSSES+"

    assert {title for (title,) in database.rows("SELECT title FROM work")} == {"EMMA!?", "ULYSSES+", "POEM", "Letter+"}
    app.close()
    alchemy.engine.dispose()
