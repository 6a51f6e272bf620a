"""What pages see live: the rows, looked at as long as a page watches, and told as differences.

All pages share each look: ten of them cost the database no more than one. Nothing runs when none is open.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import suppress

from anyio.to_thread import run_sync
from sqlalchemy.exc import SQLAlchemyError

from ragline.app import alchemy, app, settings
from ragline.reading import NOTHING, Look, look
from ragline.retrieval import search_embedder
from ragline.states import State
from ragline.steps import count_steps
from ragline.web.models import Document, Messages, Status, Update
from ragline.workers import running_workers

logger = logging.getLogger(__name__)

WATCHED_DOCUMENTS = 500
"""The newest; older ones are listed page by page."""
WORKING_SECONDS = 0.4
IDLE_SECONDS = 1.5
SURVEY_SECONDS = 5.0
"""How often workers are asked, which takes a second, and messages counted, which reads the whole outbox."""
AFTER_CHANGE_SECONDS = 1.0
"""How soon after a survey the next one may begin where documents have come or moved on since."""
_BY_WORKERS = (State.PARSING, State.SPLITTING, State.EMBEDDING, State.READY)
"""The states into which a worker alone brings a document."""


class Live:
    """The state of things as pages watch it; one for an application, in one event loop."""

    def __init__(self) -> None:
        self._look: Look = NOTHING
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()
        self._messages: Messages | None = None
        self._workers: list[str] | None = None
        self._is_keyword_only = False
        self._surveyed_at = float("-inf")
        self._has_changed = False
        self._worked_at = float("-inf")
        self._survey: asyncio.Task[None] | None = None
        self._is_closing = False
        self._stirred = asyncio.Event()
        self.watchers = 0

    def close(self) -> None:
        """Let every watching page go: the server is about to stop."""
        self._is_closing = True

    def stir(self) -> None:
        """Let pages that look rarely look now: something was done here."""
        self._stirred.set()
        self._stirred = asyncio.Event()

    async def watch(self) -> AsyncGenerator[Update, None]:
        """All that there is, then what changes, until the page goes or the database does.

        Guarantees:
            No transaction and no connection is held between two looks. A page that comes back begins with all
            there is, so it can have missed nothing.
        """
        self.watchers += 1
        try:
            seen: Look | None = None
            told: Status | None = None
            while not self._is_closing:
                stirred = self._stirred
                try:
                    now = await self.current()
                except SQLAlchemyError as error:
                    logger.warning("A page is let go, the database does not answer: %s", error)
                    return
                status = self.status()
                update = _difference(seen, now, status)
                if seen is None or update.documents or update.removed or status != told:
                    yield update
                seen, told = now, status
                await asyncio.sleep(WORKING_SECONDS)
                if not now.is_working:
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(stirred.wait(), IDLE_SECONDS - WORKING_SECONDS)
        finally:
            self.watchers -= 1

    async def current(self) -> Look:
        """The last look, or a new one if that is old."""
        async with self._looking:
            if time.monotonic() - self._looked_at >= WORKING_SECONDS:
                now = await run_sync(_look, self._look)
                self._compare(self._look, now)
                self._look, self._looked_at = now, time.monotonic()
            return self._look

    def _compare(self, before: Look, now: Look) -> None:
        """Take note of what has happened since the look before, unless that is too long ago to tell when."""
        if before is NOTHING or time.monotonic() - self._looked_at > SURVEY_SECONDS:
            return
        self._has_changed |= now.states != before.states
        if _is_worked_on(before, now):
            self._worked_at = time.monotonic()

    def status(self) -> Status:
        """The counts of the last look, and what the last survey found; begins another when that is old."""
        now = time.monotonic()
        pause = AFTER_CHANGE_SECONDS if self._has_changed else SURVEY_SECONDS
        if self._survey is None and now - self._surveyed_at >= pause:
            self._survey = asyncio.create_task(self._make_survey())
        return Status(
            documents=dict(self._look.states),
            retryable=self._look.retryable,
            messages=self._messages,
            workers=self._workers,
            is_worked_on=now - self._worked_at < SURVEY_SECONDS,
            is_keyword_only=self._is_keyword_only,
            can_ask=settings.chat is not None,
        )

    async def survey(self) -> Status:
        """The status, with workers asked and messages counted now."""
        await self.current()
        await self._make_survey()
        return self.status()

    async def _make_survey(self) -> None:
        self._has_changed = False
        try:
            # At once: a broker or an endpoint that is away answers late.
            self._messages, self._workers, self._is_keyword_only = await asyncio.gather(
                run_sync(_count_messages), run_sync(_ask_workers), run_sync(_is_keyword_only)
            )
        finally:
            self._surveyed_at, self._survey = time.monotonic(), None


def _look(before: Look) -> Look:
    with alchemy.session() as session:
        return look(session, before, limit=WATCHED_DOCUMENTS)


def _is_worked_on(before: Look, now: Look) -> bool:
    """Whether a worker did something between two looks: of documents that are not watched the counts tell."""
    if any(now.states[state] > before.states[state] for state in _BY_WORKERS):
        return True
    watched = ((before.documents.get(document_id), entry) for document_id, entry in now.documents.items())
    return any(
        (known.state, known.chunks, known.embedded) != (entry.state, entry.chunks, entry.embedded)
        for known, entry in watched
        if known is not None and entry.state in _BY_WORKERS
    )


def _difference(before: Look | None, now: Look, status: Status) -> Update:
    known = {} if before is None else before.documents
    # Older than all that is watched: it made room for newer ones, and may well be there.
    oldest = min(now.documents, default=0) if len(now.documents) == WATCHED_DOCUMENTS else 0
    gone = [
        document_id for document_id in known if document_id not in now.documents and document_id >= oldest
    ]
    changed = [entry for document_id, entry in now.documents.items() if known.get(document_id) != entry]
    return Update(
        is_whole=before is None,
        documents=[Document.of(entry) for entry in changed],
        removed=gone,
        status=status,
    )


def _count_messages() -> Messages | None:
    try:
        steps = count_steps()
    except SQLAlchemyError as error:
        logger.warning("The messages cannot be counted: %s", error)
        return None
    return Messages(waiting=steps.waiting, owed=steps.begun, dead=steps.dead)


def _ask_workers() -> list[str] | None:
    return running_workers(app)


def _is_keyword_only() -> bool:
    return search_embedder()[0] is None
