"""The routes of the API: each a few lines that call a use case with a session of `alchemy`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any
from urllib.parse import quote

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Path, Query, Request, Response, status
from fastapi.sse import EventSourceResponse
from sqlalchemy.orm import Session

from ragline import asking, controls, reading, retrieval
from ragline.app import alchemy, settings
from ragline.formats import EXTENSIONS
from ragline.intake import Recipe
from ragline.progress import Order, entries
from ragline.question import SIGNS
from ragline.searching import Mode
from ragline.states import State
from ragline.transactions import in_transaction
from ragline.web import models
from ragline.web.live import Live
from ragline.web.uploads import MAX_NAME_CHARACTERS, Received, received

MAX_ID = 2**31 - 1
UPLOADS_AT_ONCE = 4
"""Each holds its document's bytes in memory while its transaction lasts."""

MAX_HITS = 1000
"""Nobody goes through more of them one by one."""

DocumentId = Annotated[int, Path(ge=1, le=MAX_ID)]
NOT_THERE: dict[int | str, dict[str, Any]] = {404: {"model": models.Problem}}
NOT_NOW = NOT_THERE | {409: {"model": models.Problem}}


def live_of(request: Request) -> Live:
    """What pages of this application watch."""
    live: Live = request.app.state.live
    return live


async def stirs(request: Request, live: Annotated[Live, Depends(live_of)]) -> AsyncIterator[None]:
    """Whatever was done, pages that watch see it at once."""
    yield
    if request.method != "GET":
        live.stir()


api = APIRouter(prefix="/api", dependencies=[Depends(stirs)])


async def updates_of(
    live: Annotated[Live, Depends(live_of)],
) -> AsyncIterator[AsyncIterator[models.Update]]:
    """What one page watches, closed with its connection: FastAPI leaves the generator where it stands."""
    async with aclosing(live.watch()) as updates:
        yield updates


def recipe_of(request: Request) -> Recipe:
    """How this application processes documents."""
    recipe: Recipe = request.app.state.recipe
    return recipe


def uploads_of(request: Request) -> CapacityLimiter:
    """How many uploads are entered at once."""
    limiter: CapacityLimiter = request.app.state.uploads
    return limiter


# --- documents -------------------------------------------------------------------------------------------


@api.get("/documents", tags=["documents"])
def list_documents(
    state: Annotated[list[State] | None, Query(description="Only in these states.")] = None,
    before: Annotated[int | None, Query(ge=1, le=MAX_ID, description="Only older than this one.")] = None,
    called: Annotated[str, Query(max_length=200, description="Only with its words in name or folder.")] = "",
    order: Order = Order.NEWEST,
    skip: Annotated[int, Query(ge=0, le=MAX_ID, description="Leave out so many.")] = 0,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> models.DocumentPage:
    """List documents, the newest first unless another order is asked for."""
    with alchemy.session() as session:
        found = entries(
            session,
            limit=limit + 1,
            below_id=before,
            states=state or tuple(State),
            called=called,
            order=order,
            skip=skip,
        )
    page = [models.Document.of(entry) for entry in found[:limit]]
    has_more = len(found) > limit
    is_by_age = order is Order.NEWEST and not skip
    older = page[-1].id if has_more and is_by_age else None
    return models.DocumentPage(documents=page, before=older, has_more=has_more)


@api.post(
    "/documents",
    tags=["documents"],
    status_code=status.HTTP_201_CREATED,
    responses={code: {"model": models.Problem} for code in (413, 415, 422)},
    openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": {}}}},
)
async def upload(
    request: Request,
    name: Annotated[str, Query(min_length=1, max_length=MAX_NAME_CHARACTERS)],
    recipe: Annotated[Recipe, Depends(recipe_of)],
    limiter: Annotated[CapacityLimiter, Depends(uploads_of)],
) -> models.Upload:
    """Add a document: its bytes as the body, its file name, folders included, as `name`.

    The same name with other bytes replaces what it had before, once the new document is ready.
    """
    declared = request.headers.get("content-length", "")
    async with received(
        request.stream(),
        name,
        declared_bytes=int(declared) if declared.isdecimal() else None,
        max_bytes=settings.max_bytes,
    ) as given:
        return await run_sync(_add, given, recipe, limiter=limiter)


def _add(given: Received, recipe: Recipe) -> models.Upload:
    offer = given.offer()

    def add(session: Session) -> models.Upload:
        outcome = controls.add(session, offer, recipe)
        document = models.Document.of(reading.one(session, outcome.document_id))
        return models.Upload(outcome=outcome.intake, document=document)

    # Many files are dropped at once: where two of them wait for each other's rows, one is added again.
    return in_transaction(add)


@api.post("/documents/retry-failed", tags=["documents"])
def retry_failed() -> models.Retried:
    """Try all documents again that failed for a reason that may pass."""
    with alchemy.begin() as session:
        return models.Retried(ids=controls.retry_failed(session))


@api.get("/documents/{document_id}", tags=["documents"], responses=NOT_THERE)
def get_document(document_id: DocumentId) -> models.DocumentDetail:
    """All that is known of a document."""
    with alchemy.session() as session:
        return models.DocumentDetail.of_detail(reading.detail(session, document_id))


@api.post("/documents/{document_id}/pause", tags=["documents"], responses=NOT_NOW)
def pause(document_id: DocumentId) -> models.Document:
    """Keep a document that is being worked on where it is."""
    with alchemy.begin() as session:
        controls.pause(session, document_id)
        return models.Document.of(reading.one(session, document_id))


@api.post("/documents/{document_id}/resume", tags=["documents"], responses=NOT_NOW)
def resume(document_id: DocumentId) -> models.Document:
    """Go on with a paused document."""
    with alchemy.begin() as session:
        controls.resume(session, document_id)
        return models.Document.of(reading.one(session, document_id))


@api.post("/documents/{document_id}/cancel", tags=["documents"], responses=NOT_NOW)
def cancel(document_id: DocumentId) -> models.Document:
    """Stop working on a document; searches keep the generation before it."""
    with alchemy.begin() as session:
        controls.cancel(session, document_id)
        return models.Document.of(reading.one(session, document_id))


@api.post("/documents/{document_id}/retry", tags=["documents"], responses=NOT_NOW)
def retry(document_id: DocumentId) -> models.Document:
    """Try a failed or cancelled document again."""
    with alchemy.begin() as session:
        controls.retry(session, document_id)
        return models.Document.of(reading.one(session, document_id))


@api.delete("/documents/{document_id}", tags=["documents"], status_code=204, responses=NOT_THERE)
def delete(document_id: DocumentId) -> Response:
    """Delete a document with all that was made of it."""
    with alchemy.begin() as session:
        controls.delete(session, document_id)
    return Response(status_code=status.HTTP_204_NO_CONTENT)


@api.get("/documents/{document_id}/excerpt", tags=["documents"], responses=NOT_THERE)
def get_excerpt(
    document_id: DocumentId,
    start: Annotated[int, Query(ge=0, le=MAX_ID)],
    end: Annotated[int, Query(ge=0, le=MAX_ID)],
    around: Annotated[
        int, Query(ge=0, le=5000, description="How much of the text before and after it.")
    ] = reading.AROUND_CHARACTERS,
    q: Annotated[str, Query(max_length=2000, description="A search whose words are told in the range.")] = "",
) -> models.Excerpt:
    """A range of a document's text, with what stands around it."""
    end = min(max(start, end), start + 20_000)
    with alchemy.session() as session:
        found = reading.excerpt(session, document_id, start, end, around=around)
    shown = models.Excerpt.model_validate(found, from_attributes=True)
    shown.marks = models.marks_in(found.quote, found.start + len(found.before), q)
    return shown


@api.get("/documents/{document_id}/hits", tags=["documents"], responses=NOT_THERE)
def get_hits(
    document_id: DocumentId,
    q: Annotated[str, Query(min_length=1, max_length=200, description="Words as they are written.")],
) -> models.Hits:
    """Where words stand in a document's text, in its order; capitals and white space do not matter."""
    with alchemy.session() as session:
        found = reading.hits(session, document_id, q, limit=MAX_HITS + 1)
    return models.Hits(hits=found[:MAX_HITS], has_more=len(found) > MAX_HITS)


@api.get(
    "/documents/{document_id}/original",
    tags=["documents"],
    response_class=Response,
    responses=NOT_THERE
    | {200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
def get_original(document_id: DocumentId) -> Response:
    """The bytes of a document as they were added, to be saved as a file."""
    with alchemy.session() as session:
        name, data = reading.original(session, document_id)
    # Saved, never shown: a page or a picture that somebody uploaded must not be one of this address.
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
    return Response(data, media_type="application/octet-stream", headers=headers)


# --- questions -------------------------------------------------------------------------------------------


@api.get("/search", tags=["questions"])
def search(
    q: Annotated[str, Query(min_length=1, max_length=2000, description=SIGNS)],
    limit: Annotated[int, Query(ge=1, le=50)] = 10,
    skip: Annotated[int, Query(ge=0, le=1000, description="Leave out so many.")] = 0,
    mode: Mode = Mode.HYBRID,
) -> models.Results:
    """Find passages, each with its document, page, character range and exact quote."""
    found = retrieval.find(q, limit=skip + limit + 1, mode=mode)
    results = models.Results.of(found, q, skip=skip, limit=limit)
    _add_blocks(results.passages)
    return results


@api.post("/ask", tags=["questions"], responses={code: {"model": models.Problem} for code in (501, 502, 503)})
def ask(body: models.Question) -> models.Answer:
    """Answer a question from the documents; citations and quotations in the answer are checked."""
    answer = models.Answer.of(asking.answer(body.question), body.question)
    _add_blocks(answer.passages)
    return answer


def _add_blocks(passages: list[models.Passage]) -> None:
    with alchemy.session() as session:
        for passage in passages:
            found = reading.blocks_of(session, passage.document_id, passage.start, passage.end)
            passage.blocks = [models.Block.of(block) for block in found]


# --- the state of things ---------------------------------------------------------------------------------


@api.get("/status", tags=["status"])
async def get_status(live: Annotated[Live, Depends(live_of)]) -> models.Status:
    """Documents by state, messages owed and dead, workers that answer."""
    return await live.survey()


@api.get("/events", tags=["status"], response_class=EventSourceResponse)
async def watch(
    updates: Annotated[AsyncIterator[models.Update], Depends(updates_of)],
) -> AsyncIterator[models.Update]:
    """Server-sent events: all there is, then what changes. Who connects again begins with all there is."""
    async for update in updates:
        yield update


@api.get("/limits", tags=["status"])
def get_limits() -> models.Limits:
    """What an upload may be."""
    return models.Limits(max_bytes=settings.max_bytes, extensions=sorted(EXTENSIONS))
