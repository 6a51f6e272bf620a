"""The web application put together: routes, guard, errors as statuses, the page's files."""

from __future__ import annotations

from pathlib import Path

from anyio import CapacityLimiter
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ragline import __version__
from ragline.errors import (
    ConfigurationError,
    DocumentError,
    EndpointBusyError,
    EndpointError,
    NoSuchDocumentError,
    NotPossibleError,
    TooLargeError,
    UnsupportedError,
)
from ragline.intake import Recipe
from ragline.web import guard, missing, models
from ragline.web.deadlines import Deadlines
from ragline.web.live import Live
from ragline.web.routes import UPLOADS_AT_ONCE, api

STATIC = Path(__file__).parent / "static"
COOKIE_SECONDS = 30 * 24 * 3600

STATUSES: dict[type[Exception], int] = {
    NoSuchDocumentError: 404,
    NotPossibleError: 409,
    TooLargeError: 413,
    UnsupportedError: 415,
    DocumentError: 422,
    ConfigurationError: 501,
    EndpointError: 502,
    EndpointBusyError: 503,
    OperationalError: 503,
}
"""The status of each error of the use cases; its text goes to the person who asked."""


def create_web(*, recipe: Recipe, token: str | None = None) -> FastAPI:
    """The web application.

    Args:
        recipe: how documents that are added here are processed.
        token: what the API asks for; None to serve this machine alone, under its loopback names.
    """
    # FastAPI's own pages of documentation load their scripts from another site.
    web = FastAPI(
        title="ragline",
        version=__version__,
        description="Documents in, cited passages out.",
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
        responses={401: {"model": models.Problem}, 403: {"model": models.Problem}},
    )
    web.state.recipe = recipe
    web.state.live = Live()
    web.state.uploads = CapacityLimiter(UPLOADS_AT_ONCE)
    web.include_router(api)
    _add_logins(web, token)
    web.mount("/", StaticFiles(directory=STATIC, html=True))
    for error in STATUSES:
        web.add_exception_handler(error, _told)
    web.add_exception_handler(ClientDisconnect, _gone)
    web.add_exception_handler(HTTPException, missing.refused)
    web.add_middleware(guard.Guard, token=token)
    web.add_middleware(Deadlines)
    return web


def _add_logins(web: FastAPI, token: str | None) -> None:
    @web.post("/api/login", tags=["login"], status_code=204)
    def login(body: models.Login, request: Request) -> Response:
        """Exchange the token for a cookie, so that a browser keeps no token in a page."""
        if token is not None and not guard.is_token(body.token, token):
            return JSONResponse({"detail": "This is not the token."}, status_code=401)
        return _let_in(Response(status_code=204), request, token)

    @web.get("/", include_in_schema=False)
    async def home(request: Request) -> Response:
        """The page; with `?token=` once, for the link that `ragline serve` prints."""
        given = request.query_params.get("token")
        if given is None:
            return await StaticFiles(directory=STATIC).get_response("index.html", request.scope)
        # Away from the address that holds the token, before a page is shown that could be copied from.
        response = RedirectResponse("/", status_code=303)
        is_right = token is not None and guard.is_token(given, token)
        return _let_in(response, request, token) if is_right else response


def _let_in(response: Response, request: Request, token: str | None) -> Response:
    if token is not None:
        response.set_cookie(
            guard.COOKIE,
            guard.cookie_value(token),
            max_age=COOKIE_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
    return response


def _gone(_: Request, __: Exception) -> Response:
    """The answer that nobody waits for any more; without it the server would log an error of its own."""
    return Response(status_code=400)


def _told(_: Request, error: Exception) -> Response:
    status = next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
    headers = {}
    if isinstance(error, EndpointBusyError) and error.retry_after_seconds is not None:
        headers["Retry-After"] = f"{error.retry_after_seconds:.0f}"
    detail = str(error)
    if isinstance(error, OperationalError):
        detail = "The database does not answer. Try again in a moment."
    elif isinstance(error, NoSuchDocumentError):
        detail = "This document is not there any more."
    return JSONResponse({"detail": detail}, status, headers)
