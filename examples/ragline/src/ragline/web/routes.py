"""The routes of the API: each a few lines that call a use case with a session of `alchemy`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Path, Query, Request, Response, status
from fastapi.sse import EventSourceResponse
from sqlalchemy.orm import Session

from ragline import asking, controls, reading, retrieval
from ragline.app import alchemy, settings
from ragline.formats import EXTENSIONS
from ragline.intake import Offer, Recipe
from ragline.progress import entries
from ragline.searching import Mode
from ragline.states import State
from ragline.transactions import in_transaction
from ragline.web import models
from ragline.web.live import Live
from ragline.web.uploads import MAX_NAME_CHARACTERS, read_upload

MAX_ID = 2**31 - 1
UPLOADS_AT_ONCE = 4
"""Each holds its document's bytes in memory while its transaction lasts."""

DocumentId = Annotated[int, Path(ge=1, le=MAX_ID)]
NOT_THERE: dict[int | str, dict[str, Any]] = {404: {"model": models.Problem}}
NOT_NOW = NOT_THERE | {409: {"model": models.Problem}}

api = APIRouter(prefix="/api")


def live_of(request: Request) -> Live:
    """What pages of this application watch."""
    live: Live = request.app.state.live
    return live


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
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> models.DocumentPage:
    """List documents, the newest first."""
    with alchemy.session() as session:
        found = entries(session, limit=limit + 1, below_id=before, states=state or tuple(State))
    page = [models.Document.of(entry) for entry in found[:limit]]
    return models.DocumentPage(documents=page, before=page[-1].id if len(found) > limit else None)


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
    offer = await read_upload(
        request.stream(),
        name,
        declared_bytes=int(declared) if declared.isdecimal() else None,
        max_bytes=settings.max_bytes,
    )
    return await run_sync(_add, offer, recipe, limiter=limiter)


def _add(offer: Offer, recipe: Recipe) -> models.Upload:
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
) -> models.Excerpt:
    """A range of a document's text, with what stands around it."""
    with alchemy.session() as session:
        found = reading.excerpt(session, document_id, start, min(end, start + 20_000))
    return models.Excerpt.model_validate(found, from_attributes=True)


# --- questions -------------------------------------------------------------------------------------------


@api.get("/search", tags=["questions"])
def search(
    q: Annotated[str, Query(min_length=1, max_length=2000, description="A question, or words.")],
    limit: Annotated[int, Query(ge=1, le=50)] = 10,
    mode: Mode = Mode.HYBRID,
) -> models.Results:
    """Find passages, each with its document, page, character range and exact quote."""
    return models.Results.of(retrieval.find(q, limit=limit, mode=mode), retrieval.telling_words(q))


@api.post("/ask", tags=["questions"], responses={code: {"model": models.Problem} for code in (501, 502, 503)})
def ask(body: models.Question) -> models.Answer:
    """Answer a question from the documents; citations and quotations in the answer are checked."""
    return models.Answer.of(asking.answer(body.question))


# --- the state of things ---------------------------------------------------------------------------------


@api.get("/status", tags=["status"])
async def get_status(live: Annotated[Live, Depends(live_of)]) -> models.Status:
    """Documents by state, messages owed and dead, workers that answer."""
    return await live.survey()


@api.get("/events", tags=["status"], response_class=EventSourceResponse)
async def watch(live: Annotated[Live, Depends(live_of)]) -> AsyncIterator[models.Update]:
    """Server-sent events: all there is, then what changes. Who connects again begins with all there is."""
    async for update in live.watch():
        yield update


@api.get("/limits", tags=["status"])
def get_limits() -> models.Limits:
    """What an upload may be."""
    return models.Limits(max_bytes=settings.max_bytes, extensions=sorted(EXTENSIONS))
