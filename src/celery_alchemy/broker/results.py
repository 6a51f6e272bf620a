"""The database as Celery's result backend: ``alchemy://`` and ``alchemy+<SQLAlchemy URL>``.

Above the records of results. A task with a session has written its success in its own transaction
when Celery's tracer comes here with it; everything else is written here, in one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import states
from celery.app.task import Context
from celery.result import GroupResult, result_from_tuple
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from ..databases.transient import is_transient
from ..errors import ConfigurationError
from ..messages.celery_types import App, Fields
from ..outbox.chord_records import forget_runs, prune_chords
from ..outbox.outbox import shown
from ..outbox.place import OutboxTable
from ..outbox.result_records import (
    Record,
    ResultKeeper,
    forget,
    keep,
    key_of,
    prune_results,
    read,
)
from ..requests.own_result import committed_result
from ..requests.registry import Home, home_of
from . import SCHEME
from .chords import ResultDatabase, keep_noted
from .homes import HOME_OPTION, BrokerHome, home_for
from .one_lock import session_with_the_lock
from .result_waiting import WaitingBackend
from .waking import RESULTS, Bell, bell_of, somebody_waits

__all__ = ["AlchemyBackend"]

#: What Celery's meta of a task has in columns of their own.
_COLUMNS = frozenset({"status", "result", "traceback", "date_done"})

_GROUP = "group:"


class AlchemyBackend(WaitingBackend):
    """Keeps results in the table ``celery_results``.

    Args:
        app: The app; with ``alchemy://`` its Alchemy names the database.
        url: ``alchemy://``, or a SQLAlchemy URL; None as the former.
        **kwargs: As for Celery's ``Backend``.
    """

    if TYPE_CHECKING:
        # What Celery's stubs leave out.
        url: str | None
        serializer: str

    _bell: Bell | None = None

    supports_native_join = True
    supports_result_compression = True

    def __init__(self, app: App, url: str | None = None, **kwargs: Any) -> None:
        super().__init__(app, url=url, **kwargs)
        ResultKeeper.is_in_use = True
        conf = self.app.conf
        # As Celery's own database backend: an outage of a moment fails no call of a client's. The
        # ends of tasks are insisted on.
        if not conf.value_set_for("result_backend_always_retry"):
            self.always_retry = True
        if not conf.value_set_for("result_backend_max_retries"):
            self.max_retries = 3

    # --- which database -----------------------------------------------------------------------

    @property
    def _is_of_app(self) -> bool:
        return (self.url or "").removeprefix(f"{SCHEME}://").strip("/") == ""

    def _alchemy(self) -> Home:
        """Return the Alchemy of the app.

        Raises:
            ConfigurationError: It has none.
        """
        found = home_of(self.app)
        if found is None:
            raise ConfigurationError(
                f"The result backend {SCHEME}:// of the app {self.app.main!r} names no database,"
                " and the app has no Alchemy that does.",
                f"Make Alchemy(app, url), or use {SCHEME}+<SQLAlchemy URL>.",
            )
        return found

    @property
    def database(self) -> ResultDatabase:
        """Where results are kept."""
        if self._is_of_app:
            alchemy = self._alchemy()
            return ResultDatabase(lambda: alchemy.engine, alchemy.place)
        home = home_for(str(self.url), {})
        return ResultDatabase(home.engine, home.place)

    def tell(self) -> None:
        """Tell whoever waits that a result is committed, where the database can."""
        if somebody_waits:
            home = self._broker_home()
            if home is not None:
                self._bell = bell_of(home, RESULTS)
                self._bell.ring()

    def _broker_home(self) -> BrokerHome | None:
        """Return the broker in whose database the results are.

        Its workers hear that somebody waits.
        """
        if not self._is_of_app:
            return home_for(str(self.url), {})
        options: Fields = self.app.conf.broker_transport_options or {}
        return home_for("", options) if HOME_OPTION in options else None

    def is_database_of(self, home: object) -> bool:
        """Tell whether an Alchemy is the one that names the database."""
        return self._is_of_app and self._alchemy() is home

    def as_uri(self, include_password: bool = False) -> str:
        """Return the URL as it may be shown."""
        if self._is_of_app:
            return f"{SCHEME}://"
        shown_url = make_url(str(self.url)).render_as_string(hide_password=not include_password)
        return f"{SCHEME}+{shown_url}"

    def __reduce__(
        self, args: tuple[object, ...] = (), kwargs: Fields | None = None
    ) -> tuple[object, ...]:
        given = {"url": self.url, "serializer": self.serializer, "expires": self.expires}
        return super().__reduce__(args, {**given, **(kwargs or {})})

    # --- writing ------------------------------------------------------------------------------

    def store_result(
        self,
        task_id: str,
        result: object,
        state: str,
        traceback: str | None = None,
        request: Context | None = None,
        **kwargs: object,
    ) -> object:
        """Write a state, unless the task's own transaction has written it."""
        own = committed_result(request)
        if own is not None and state == states.SUCCESS and own.is_all_of(task_id, result):
            return result
        return super().store_result(task_id, result, state, traceback, request, **kwargs)

    def _store_result(
        self,
        task_id: str,
        result: object,
        state: str,
        traceback: str | None = None,
        request: Context | None = None,
        **kwargs: object,
    ) -> object:
        write = partial(self._write, task_id, result, state, traceback, request)
        return self.insisted(write, f"The result of {task_id}")

    def _write(
        self,
        task_id: str,
        result: object,
        state: str,
        traceback: str | None,
        request: Context | None,
    ) -> object:
        part = self.part_to_write(request, result, state)
        if part is not None and request is not None:
            with self._counting() as session:
                self._keep(
                    self.database.place.within(session), task_id, result, state, traceback, request
                )
                chord = self.note_within(session, request, part)
            keep_noted(request, chord)
            self.tell()
            return result
        database = self.database
        session_of_task = session_with_the_lock(database)
        if session_of_task is not None:
            there = database.place.within(session_of_task)
            self._keep(there, task_id, result, state, traceback, request)
            return result
        with database.place.begin(database.engine()) as there:
            self._keep(there, task_id, result, state, traceback, request)
        if state in states.READY_STATES:
            self.tell()
        return result

    def _keep(
        self,
        there: OutboxTable,
        task_id: str,
        result: object,
        state: str,
        traceback: str | None,
        request: Context | None,
    ) -> None:
        own, key = committed_result(request), key_of(task_id)
        if own is not None and state == states.SUCCESS and own.request.id == task_id:
            # What the task's own transaction wrote lacks the children that were sent since.
            forget(there, [key])
        keep(there, key, self._record(result, state, traceback, request))

    def record_of_success(self, value: object, request: Context) -> Record:
        """Return what is to be kept of a task that has returned a value."""
        encoded = self.encode_result(value, states.SUCCESS)
        return self._record(encoded, states.SUCCESS, None, request)

    def _record(
        self, result: object, state: str, traceback: str | None, request: Context | None
    ) -> Record:
        meta = self._get_result_meta(result, state, traceback, request)
        others = meta.keys() - _COLUMNS
        details = {name: meta[name] for name in sorted(others) if meta[name] not in (None, [])}
        return Record(
            state,
            self._encoded(result),
            None if traceback is None else str(traceback).replace("\0", "\\0"),
            self._encoded(details) if details else None,
            shown(getattr(request, "task", None)),
            is_done=state in states.READY_STATES,
            expires_in_seconds=self._kept_seconds(),
        )

    def _kept_seconds(self) -> float | None:
        return float(self.expires) if self.expires else None

    def _forget(self, task_id: str) -> None:
        self._delete(key_of(task_id))

    def _delete(self, key: str) -> None:
        with self._writing() as there:
            forget(there, [key])

    @contextmanager
    def _writing(self) -> Iterator[OutboxTable]:
        """Begin a transaction; on SQLite that of the task at hand is one, if it has the lock."""
        database = self.database
        session = session_with_the_lock(database)
        if session is not None:
            yield database.place.within(session)
            return
        with database.place.begin(database.engine()) as there:
            yield there

    def cleanup(self) -> None:
        """Delete what has expired, in batches; workers do so by themselves."""
        database = self.database
        while prune_results(database.place, database.engine()):
            pass
        while prune_chords(database.place, database.engine()):
            pass

    def exception_safe_to_retry(self, exc: Exception) -> bool:
        """Tell whether a failed statement may pass."""
        return isinstance(exc, DBAPIError) and is_transient(exc)

    # --- reading ------------------------------------------------------------------------------

    def _get_task_meta_for(self, task_id: str) -> Fields:
        return self.metas([task_id])[task_id]

    def metas(self, task_ids: Iterable[str]) -> dict[str, Fields]:
        """Return what is kept of tasks, by their ids."""
        database = self.database
        keys = {task_id: key_of(task_id) for task_id in task_ids}
        found = read(database.place, database.engine(), keys.values())
        return {task_id: self._meta(task_id, found.get(key)) for task_id, key in keys.items()}

    def _meta(self, task_id: str, record: Record | None) -> Fields:
        if record is None:
            return {"task_id": task_id, "status": states.PENDING, "result": None}
        details = {} if record.details is None else self.decode(record.details)
        meta: Fields = {
            "task_id": task_id,
            "status": record.status,
            "result": None if record.result is None else self.decode(record.result),
            "traceback": record.traceback,
            "children": [],
            "date_done": record.done_at,
            **details,
        }
        return self.meta_from_decoded(meta)

    # --- groups -------------------------------------------------------------------------------

    def _save_group(self, group_id: str, result: GroupResult) -> GroupResult:
        encoded = self._encoded(self.prepare_value(result))
        record = Record(_GROUP, encoded, expires_in_seconds=self._kept_seconds())
        database, key = self.database, key_of(_GROUP + group_id)
        session = session_with_the_lock(database)
        if session is not None:
            keep(database.place.within(session), key, record)
            return result
        with database.place.begin(database.engine()) as there:
            keep(there, key, record)
        return result

    def _restore_group(self, group_id: str) -> Fields | None:
        database, key = self.database, key_of(_GROUP + group_id)
        record = read(database.place, database.engine(), [key]).get(key)
        if record is None or record.result is None:
            return None
        value = self.decode(record.result)
        # With pickle it is the GroupResult itself.
        result = (
            result_from_tuple(tuple(value), self.app) if isinstance(value, (list, tuple)) else value
        )
        return {"task_id": group_id, "result": result, "date_done": record.done_at}

    def _delete_group(self, group_id: str) -> None:
        self._delete(key_of(_GROUP + group_id))
        with self._writing() as there:
            forget_runs(there, key_of(group_id))
