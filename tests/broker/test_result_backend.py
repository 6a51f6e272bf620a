"""The database as Celery's result backend: what is read, forgotten and pruned, and which database it is."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from celery import Celery, uuid
from celery.exceptions import TimeoutError as CeleryTimeoutError
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, ConfigurationError, MissingTableError
from celery_alchemy.broker.results import AlchemyBackend
from celery_alchemy.operations.dead_tasks import prune_all
from celery_alchemy.outbox import result_records
from celery_alchemy.outbox.result_records import prune_results
from tests.broker.broker_stand import BrokerStand, write
from tests.services.databases import Database


def test_forgotten_result_is_pending(stand: BrokerStand) -> None:
    """Its row is gone."""
    result = stand.result_of(stand.task(write), "a")

    result.forget()

    assert stand.rows() == []
    assert stand.app.AsyncResult(result.id).state == "PENDING"


def test_expired_result_is_pending_and_pruned(
    stand: BrokerStand,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also before anybody has deleted it; what has not expired stays."""
    monkeypatch.setattr(result_records, "RESULT_ROWS", 2)
    task, engine, place = stand.task(write), stand.alchemy.engine, stand.alchemy.place
    expired = [stand.result_of(task, str(number)) for number in range(5)]
    database.execute("UPDATE celery_results SET expires_at = '2020-01-01 00:00:00.000000'")
    kept = stand.result_of(task, "kept")

    assert {stand.app.AsyncResult(result.id).state for result in expired} == {"PENDING"}
    assert prune_results(place, engine) == 2
    stand.app.backend.cleanup()
    assert prune_all(engine, 86400.0, place) == 0
    assert stand.rows("id") == [(kept.id,)]


def test_results_that_never_expire_are_kept(database: Database) -> None:
    """With `result_expires = 0`."""
    stand = BrokerStand(database, settings={"result_expires": 0})

    stand.result_of(stand.task(write), "a")

    assert stand.rows("expires_at") == [(None,)]


def test_saved_group_is_restored_and_deleted(stand: BrokerStand) -> None:
    """With its members' results."""
    task = stand.task(write)
    members = [stand.result_of(task, str(number)) for number in range(3)]
    group = stand.app.GroupResult(uuid(), members)

    group.save()
    restored: Any = stand.app.GroupResult.restore(group.id)

    assert restored.get(timeout=5) == ["wrote 0", "wrote 1", "wrote 2"]
    restored.delete()
    assert stand.app.GroupResult.restore(group.id) is None


def test_results_of_a_large_group_are_read_at_once(stand: BrokerStand) -> None:
    """More than one statement has room for, and each only once."""
    backend: Any = stand.app.backend
    ids = [uuid() for _ in range(450)]
    with stand.alchemy.engine.begin() as connection:
        for number, task_id in enumerate(ids):
            record = backend.record_of_success(number, None)
            result_records.keep(stand.alchemy.place.on(connection), task_id, record)

    found = dict(backend.get_many(ids, timeout=5))

    assert [found[task_id]["result"] for task_id in ids] == list(range(450))


def test_waiting_ends_at_its_time_out(stand: BrokerStand) -> None:
    """And asks the caller's callable meanwhile."""
    asked: list[None] = []

    with pytest.raises(CeleryTimeoutError, match="timed out"):
        stand.app.AsyncResult(uuid()).get(timeout=0.1, on_interval=lambda: asked.append(None))

    assert asked


@pytest.mark.databases("sqlite")
def test_reading_does_not_wait_for_a_task_that_writes(stand: BrokerStand) -> None:
    """Its transaction has SQLite's only lock."""
    result = stand.result_of(stand.task(write), "a")

    with stand.alchemy.begin() as session:
        write(session, "b")
        assert stand.app.AsyncResult(result.id).get(timeout=2) == "wrote a"


def test_long_and_strange_ids_have_results(stand: BrokerStand) -> None:
    """No column could hold them as they are."""
    task = stand.task(write)

    for task_id in ("x" * 1000, "x" * 999, "a\0b", "Grüße 🎉"):
        assert stand.result_of(task, task_id[-3:].replace("\0", ""), id=task_id).state == "SUCCESS"
    assert len(stand.rows()) == 4


@pytest.mark.parametrize("serializer", ["pickle", "yaml", "msgpack"])
@pytest.mark.databases("postgresql", "sqlite")
def test_result_serializer_is_kept(database: Database, serializer: str) -> None:
    """Bytes too."""
    accepted = ["pickle", "yaml", "msgpack"]
    stand = BrokerStand(database, settings={"result_serializer": serializer, "result_accept_content": accepted})

    def make(session: Session) -> dict[str, Any]:
        return {"name": write(session, "a"), "parts": [1, 2]}

    result = stand.result_of(stand.task(make))

    assert result.get() == {"name": "wrote a", "parts": [1, 2]}


@pytest.mark.databases("sqlite")
def test_two_apps_do_not_disturb_each_other(database: Database, tmp_path: Any) -> None:
    """Each has its own database for its results."""
    one, other = BrokerStand(database), Celery("other", set_as_current=False)
    Alchemy(other, f"sqlite:///{tmp_path}/other.db", broker=True).create_tables()

    result = one.result_of(one.task(write), "a")

    assert result.get() == "wrote a"
    assert other.AsyncResult(result.id).state == "PENDING"


@pytest.mark.databases("sqlite")
def test_backend_by_url_reads_the_same_table(stand: BrokerStand, database: Database) -> None:
    """An app that has only the URL knows no sessions."""
    reader = Celery("reader", set_as_current=False, backend=f"alchemy+{database.url}")
    result = stand.result_of(stand.task(write), "a")

    assert reader.AsyncResult(result.id).get(timeout=5) == "wrote a"


def test_task_of_a_backend_by_url_is_written_by_the_tracer(database: Database) -> None:
    """It may be another database than that of the task's session."""
    stand = BrokerStand(database, settings={"result_backend": f"alchemy+{database.url}"})

    result = stand.result_of(stand.task(write), "a")

    assert result.get() == "wrote a"


def test_configured_backend_is_kept(tmp_path: Any) -> None:
    """`broker=True` makes the database the backend only where there is none."""
    given = Celery("given", set_as_current=False, backend="cache+memory://")
    none = Celery("none", set_as_current=False)

    for app in (given, none):
        Alchemy(app, f"sqlite:///{tmp_path}/shop.db", broker=True)

    assert given.conf.result_backend == "cache+memory://"
    assert isinstance(none.backend, AlchemyBackend)
    assert none.backend.as_uri() == "alchemy://"


def test_backend_without_database_says_what_to_do() -> None:
    """`alchemy://` means the Alchemy of the app."""
    app = Celery("none", set_as_current=False, backend="alchemy://")

    with pytest.raises(ConfigurationError, match="names no database"):
        app.AsyncResult(uuid()).state  # noqa: B018 - reading it asks the backend.


@pytest.mark.databases("postgresql", "sqlite", "mariadb")
def test_missing_table_is_named(stand: BrokerStand, database: Database) -> None:
    """To whoever reads, and to a task that writes."""
    database.execute("DROP TABLE celery_results")

    with pytest.raises(MissingTableError, match="create-tables"):
        stand.app.AsyncResult(uuid()).state  # noqa: B018 - reading it asks the backend.
    with pytest.raises(MissingTableError, match="create-tables"):
        stand.app.backend.store_result(uuid(), 1, "SUCCESS")


def test_password_is_not_shown() -> None:
    """In the banner of a worker, say."""
    app = Celery("a", set_as_current=False, backend="alchemy+postgresql+psycopg://u:secret@h/d")

    assert "secret" not in app.backend.as_uri()
    assert app.backend.as_uri(include_password=True) == "alchemy+postgresql+psycopg://u:secret@h/d"


def test_backend_survives_pickling() -> None:
    """With its URL, for the current app."""
    app = Celery("a", backend="alchemy+sqlite:///shop.db", result_expires=60)

    copy = pickle.loads(pickle.dumps(app.backend))

    assert (type(copy), copy.url) == (AlchemyBackend, "sqlite:///shop.db")
