"""Chords, where the database is Celery's result backend: their parts are counted in the database.

Between the records of chords and the backend, ``results.py``, which is one of these. A part is
noted in the transaction that writes its result; the last one sends the chord's body there.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from celery import states
from celery.app.task import Context
from celery.canvas import Signature
from celery.exceptions import ChordError
from celery.result import GroupResult
from kombu.utils.encoding import ensure_bytes
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from ..databases import is_known
from ..databases.chord_rows import READS_COMMITTED
from ..messages.celery_types import App, Fields, Result, signed
from ..messages.recording import is_recording, recording
from ..outbox.chord_records import (
    LAST,
    Chord,
    Ended,
    Part,
    add,
    end,
    note,
    parts_of,
    set_size,
    state_of,
)
from ..outbox.place import Place
from ..outbox.result_records import ResultKeeper, key_of
from ..requests.own_result import committed_result
from ..requests.plain_sends import session_that_holds
from ..requests.registry import Home, home_of
from ..requests.sending import hold
from .chord_failures import FailingBackend
from .chord_headers import Sending, arranged, describe, key_in, size_in
from .one_lock import session_with_the_lock

__all__ = ["ChordBackend", "ResultDatabase", "keep_noted"]

logger: logging.Logger = logging.getLogger(__name__)

#: Where a request says that its result is the last one of it, and how far its chord has got.
_ENDS = "celery_alchemy_ends"
_NOTED = "celery_alchemy_noted"


@dataclass(frozen=True, slots=True)
class ResultDatabase:
    """The database that keeps results.

    Attributes:
        engine: Returns this process's engine.
        place: Where in it the tables are.
    """

    engine: Callable[[], Engine]
    place: Place


class ChordBackend(FailingBackend, ResultKeeper):
    """A result backend that counts the parts of chords."""

    if TYPE_CHECKING:
        # What Celery's stubs leave out.
        app: App
        expires: float | None

        def _ensure_not_eager(self) -> None: ...

        def _get_result_meta(
            self, result: object, state: str, traceback: str | None, request: Context | None
        ) -> Fields: ...

        def __reduce__(
            self, args: tuple[object, ...] = ..., kwargs: Fields | None = ...
        ) -> tuple[object, ...]: ...

    def __init__(self, app: App, **kwargs: Any) -> None:
        super().__init__(app, **kwargs)
        #: Of chords that are being sent, by the ids of their headers.
        self._sending: dict[str, Sending] = {}

    @property
    @abstractmethod
    def _is_of_app(self) -> bool:
        """The database is that of the app's Alchemy."""

    @property
    @abstractmethod
    def database(self) -> ResultDatabase:
        """Where results are kept."""

    def _encoded(self, value: object) -> bytes:
        return ensure_bytes(self.encode(value))

    @contextmanager
    def _counting(self) -> Iterator[Session]:
        """Give a session whose transaction, which ends with the block, sees the parts of others.

        On SQLite it is that of a task in mid-transaction: beside it nobody can write.
        """
        database = self.database
        locked = session_with_the_lock(database)
        if locked is not None:
            yield locked
            return
        engine = database.engine()
        if engine.dialect.name != "sqlite" and is_known(engine.dialect.name):
            engine = engine.execution_options(isolation_level=READS_COMMITTED)
        with Session(engine) as session, session.begin():
            yield session

    # --- sending a chord ----------------------------------------------------------------------

    def apply_chord(
        self,
        header_result_args: tuple[str, Iterable[Result | GroupResult]],
        body: Signature,
        **kwargs: object,
    ) -> None:
        """Have the messages of a chord's parts say how many they are.

        The parts of a generator are made while they are sent; in a transaction they are sent
        together, at its end.
        """
        chord_id, results = header_result_args
        is_open = type(results) is not list and not is_recording()
        known = None if is_open else results
        self._sending[chord_id] = describe(body, chord_id, known, self._request())

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Write the size of a chord whose messages do not say it."""
        # Celery tells it of each group in a chord, and counts those as chords.
        sending = self._sending.pop(group_id, None)
        if sending is not None and sending.size != chord_size:
            self._ensure_retryable(self._set_size, sending.key, chord_size)

    def _set_size(self, key: str, size: int) -> None:
        with self._counting() as session:
            set_size(self.database.place.within(session), key, size, self._chord_expires)

    def add_to_chord(self, chord_id: str, result: object) -> None:
        """Have a chord wait for one more part."""
        request = self._request()
        is_own = request is not None and request.group == chord_id
        key = _key(request) if request is not None and is_own else key_of(chord_id)
        self._ensure_retryable(self._add, key)

    def _add(self, key: str) -> None:
        # The part's message may wait for the task's commit, and go with its rollback.
        held = session_that_holds(self.app) if self._is_of_app else None
        with self._counting() if held is None else nullcontext(held) as session:
            add(self.database.place.within(session), key, self._chord_expires)

    def _request(self) -> Context | None:
        """Return the request of the task that runs here; None if none does."""
        task = self.app.current_worker_task
        return None if task is None else task.request

    @property
    def _chord_expires(self) -> float | None:
        """Seconds for which a chord's notes are kept, after the last part; None for ever."""
        given: float | None = self.app.conf.get("result_chord_expires")
        expires = self.expires if given is None else self.prepare_expires(given, float)
        return float(expires) if expires else None

    # --- the end of a part --------------------------------------------------------------------

    def mark_as_done(
        self,
        task_id: str,
        result: object,
        request: Context | None = None,
        store_result: bool = True,
        state: str = states.SUCCESS,
    ) -> None:
        """Write that a task has succeeded, and note it if it is a part of a chord."""
        with _ending(request):
            super().mark_as_done(task_id, result, request, store_result, state)

    def mark_as_failure(self, task_id: str, exc: Exception, *args: Any, **kwargs: Any) -> None:
        """Write that a task has failed, and note it if it is a part of a chord."""
        with _ending(kwargs.get("request", args[1] if len(args) > 1 else None)):
            super().mark_as_failure(task_id, exc, *args, **kwargs)

    def mark_as_revoked(self, task_id: str, reason: str = "", *args: Any, **kwargs: Any) -> None:
        """Write that a task was revoked, and note it if it is a part of a chord."""
        with _ending(kwargs.get("request", args[0] if args else None)):
            super().mark_as_revoked(task_id, reason, *args, **kwargs)

    def part_to_write(self, request: Context | None, value: object, state: str) -> Part | None:
        """Return what is to be noted with a result that is written now; None for nothing."""
        if not request or state not in states.READY_STATES or not vars(request).get(_ENDS):
            return None
        return self._part(request, value, state) if _noted(request) is None else None

    def part_of(self, request: Context, value: object, status: str = states.SUCCESS) -> Part | None:
        """Return what is to be noted of a task that has ended.

        None for one that is no part of a chord.
        """
        return self._part(request, self.encode_result(value, status), status)

    def _part(self, request: Context, encoded: object, status: str) -> Part | None:
        if not (request.chord and request.group and request.id):
            return None
        index = getattr(request, "group_index", None)
        return Part(
            _key(request),
            LAST if index is None else int(index),
            key_of(request.id),
            status,
            self._encoded(encoded),
            size_in(_body_in(request)),
            self._chord_expires,
        )

    def note_within(self, session: Session, request: Context, part: Part) -> Chord:
        """Note a part in a session's transaction; after the last one, send the chord's body there.

        Where the body cannot be sent there, it is sent by ``on_chord_part_return()``.
        """
        there = self.database.place.within(session)
        chord = note(there, part)
        home = home_of(self.app) if self._is_of_app else None
        if not chord.is_complete or chord.has_ended or home is None or not _keeps(home):
            return chord
        ended = parts_of(there, part.chord)
        try:
            self._send_within(session, home, request, ended)
        except Exception as exc:  # noqa: BLE001 - a part has not failed because its chord has.
            logger.debug(
                "The body of chord %r is not sent with its last part: %r", request.group, exc
            )
            return chord
        end(there, part.chord)
        return replace(chord, has_ended=True)

    def _send_within(
        self, session: Session, home: Home, request: Context, ended: Sequence[Ended]
    ) -> None:
        values = self._values(request, ended)
        body = self._body(request)
        with recording(self.app) as messages, _without_trail(self.app):
            body.delay(values)
        hold(self.app, home, session, messages, chosen_id=True)

    def on_chord_part_return(
        self, request: Context, state: str, result: object, **kwargs: object
    ) -> Any:
        """Note a part that no transaction has noted, and end its chord if nothing else has."""
        chord = _noted(request)
        if chord is None:
            part = self.part_of(request, result, state)
            if part is None:
                return None
            chord = self._ensure_retryable(self._note, request, part)
        if chord.is_complete and not chord.has_ended:
            return self._end(request, _key(request))
        return None

    def _note(self, request: Context, part: Part) -> Chord:
        with self._counting() as session:
            return self.note_within(session, request, part)

    # --- the end of a chord -------------------------------------------------------------------

    def _end(self, request: Context, chord: str) -> Exception | None:
        """End a chord outside of a transaction: one that has failed, or whose body goes elsewhere.

        Written down only after it is done: the part is delivered again if this process is lost.
        """
        body = self._body(request)
        found = None
        ended = self._ensure_retryable(self._parts, chord)
        if ended is None:
            return None
        try:
            body.delay(self._values(request, ended))
        except ChordError as exc:
            logger.exception("Chord %r has failed", request.group)
            found = self.chord_error_from_stack(body, exc)
        except Exception as exc:
            logger.exception("The body of chord %r cannot be sent", request.group)
            error = ChordError(f"Callback error: {exc!r}")
            error.__cause__ = exc
            found = self.chord_error_from_stack(body, error)
        self._ensure_retryable(self._write_end, chord)
        return found

    def _parts(self, chord: str) -> Sequence[Ended] | None:
        """Return the parts of a chord that is to be ended; None if it has been since."""
        with self._counting() as session:
            there = self.database.place.within(session)
            now = state_of(there, chord, self._chord_expires)
            return None if now.has_ended else parts_of(there, chord)

    def _write_end(self, chord: str) -> None:
        with self._counting() as session:
            end(self.database.place.within(session), chord)

    def _body(self, request: Context) -> Signature:
        """Return the body's signature, sent by this app whichever is the current one."""
        body = signed(_body_in(request), app=self.app)
        tasks = body["kwargs"]["tasks"] if body.get("subtask_type") == "chain" else ()
        for task in tasks:
            # Those that are still mappings are told when the chain is sent; the first one is none.
            if isinstance(task, Signature):
                signed(task, app=self.app)
        return body

    def _values(self, request: Context, ended: Sequence[Ended]) -> list[object]:
        """Return what the body gets.

        Raises:
            ChordError: A part has failed.
        """
        values: list[tuple[str, object]] = []
        for part in ended:
            value: object = None if part.value is None else self.decode(part.value)
            if part.status in states.EXCEPTION_STATES:
                value = self.exception_to_python(value)
            if part.status in states.PROPAGATE_STATES:
                error = ChordError(f"Dependency {part.task} raised {value!r}")
                error.__cause__ = value if isinstance(value, BaseException) else None
                raise error
            values.append((part.task, value))
        return arranged(_body_in(request), values)


@contextmanager
def _ending(request: Context | None) -> Iterator[None]:
    """Have what is written of a request count as its end."""
    if request is None or not request.chord:
        yield
        return
    setattr(request, _ENDS, True)
    try:
        yield
    finally:
        setattr(request, _ENDS, False)


def _body_in(request: Context) -> Fields:
    """Return the signature of the body of a request's chord; the stubs take it for a text."""
    body: Fields = request.get("chord")
    return body


def _key(request: Context) -> str:
    """Return the key of the notes of the chord that a request is a part of."""
    return key_in(_body_in(request), request.group)


def _noted(request: object) -> Chord | None:
    """Return how far a chord had got when a part of it was noted, and committed."""
    own = committed_result(request)
    if own is not None and own.chord is not None:
        return own.chord
    noted: Chord | None = getattr(request, _NOTED, None)
    return noted


def keep_noted(request: object, chord: Chord) -> None:
    """Have a request say that its part of a chord is noted, and committed."""
    setattr(request, _NOTED, chord)


def _keeps(home: Home) -> bool:
    """Tell whether messages are rows of the transaction that sends them."""
    return home.outbox is not None and home.keeps_messages


@contextmanager
def _without_trail(app: App) -> Iterator[None]:
    """Have what is sent in the block not count as sent by the task.

    The task's result is written already.
    """
    task = app.current_worker_task
    children: list[str] | None = None if task is None else task.request.children
    before = len(children or ())
    try:
        yield
    finally:
        if task is not None and task.request.children:
            del task.request.children[before:]
