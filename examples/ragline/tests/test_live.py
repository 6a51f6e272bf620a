"""What pages see live of workers and messages: it follows the documents at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")

import httpx

from pipelines import KEYWORDS, add, empty_index, until_embedding
from ragline.app import alchemy
from ragline.states import State
from ragline.web import live
from ragline.web.application import create_web
from ragline.web.models import Status, Update


@pytest.fixture(autouse=True)
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An empty index; one entry for each time that workers are asked, of which none answers."""
    empty_index()
    asked: list[None] = []
    monkeypatch.setattr(live, "WORKING_SECONDS", 0.01)
    monkeypatch.setattr(live, "AFTER_CHANGE_SECONDS", 0.01)
    monkeypatch.setattr(live, "SURVEY_SECONDS", 60.0)
    monkeypatch.setattr(live, "_count_messages", lambda: None)
    monkeypatch.setattr(live, "_ask_workers", lambda: asked.append(None) or [])
    return asked


def upload() -> int:
    """A document that waits."""
    with alchemy.session() as session:
        return add(session, "one", recipe=KEYWORDS).document_id


def work(document_id: int) -> None:
    """Do what a worker would."""
    with alchemy.session() as session:
        until_embedding(session, document_id)


async def seen(watched: live.Live) -> Status:
    """The status after another look, and after a survey if that begins one."""
    await asyncio.sleep(0.03)
    await watched.current()
    watched.status()
    if watched._survey is not None:
        await watched._survey
    return watched.status()


def test_a_change_of_documents_is_followed_by_a_survey(surveys: list[None]) -> None:
    """Workers are asked and messages counted when documents come or move on, and else not before their time."""

    async def watch() -> None:
        watched = live.Live()
        await seen(watched)
        assert len(surveys) == 1
        await seen(watched)
        assert len(surveys) == 1
        await asyncio.to_thread(upload)
        await seen(watched)
        assert len(surveys) == 2
        await seen(watched)
        assert len(surveys) == 2

    asyncio.run(watch())


def test_a_document_that_moves_on_is_worked_on_whoever_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was started just now, or has much to do, answers late; one that is gone is believed gone."""

    async def watch() -> None:
        watched = live.Live()
        await seen(watched)
        document_id = await asyncio.to_thread(upload)
        assert not (await seen(watched)).is_worked_on
        await asyncio.to_thread(work, document_id)
        status = await seen(watched)
        assert (status.is_worked_on, status.workers) == (True, [])
        monkeypatch.setattr(live, "SURVEY_SECONDS", 0.02)
        assert not (await seen(watched)).is_worked_on

    asyncio.run(watch())


def test_what_is_done_here_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that has nothing to wait for looks rarely, but not after an upload to its own server."""
    monkeypatch.setattr(live, "IDLE_SECONDS", 60.0)

    async def watch() -> None:
        web = create_web(recipe=KEYWORDS)
        pages = web.state.live.watch()
        await anext(pages)
        following = asyncio.create_task(until_told(pages))
        await asyncio.sleep(0.1)
        transport = httpx.ASGITransport(app=web)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            await client.post("/api/documents", params={"name": "a.md"}, content="one")
        update = await asyncio.wait_for(following, timeout=10)
        assert update.status.documents[State.QUEUED] == 1

    asyncio.run(watch())


async def until_told(pages: AsyncGenerator[Update, None]) -> Update:
    """The next update that tells of a document."""
    while not (update := await anext(pages)).documents:
        pass
    return update
