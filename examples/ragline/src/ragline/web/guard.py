"""Who may ask what: token, host and origin of each request, and the headers of each response."""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "ragline"
LOOPBACK_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))
_SAFE = frozenset(("GET", "HEAD", "OPTIONS"))
UPLOADS_PATH = "/api/documents"
MAX_BODY_BYTES = 64_000
"""Of a body that is read whole into memory; an upload is read in pieces, and has a limit of its own."""
# Without a token so that a page can ask for one.
_OPEN_PATHS = frozenset(("/api/login",))

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Scripts and styles are files of the page's own; no text becomes markup, whatever a script does with it."""

_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Refuses what a stranger, or a stranger's page in a visitor's browser, could ask; pure ASGI.

    - With a token, the API wants it in `Authorization: Bearer` or in the cookie that a login set.
    - Without one, which is for this machine alone, the request must be for a loopback name: the Host header
      tells a site whose name was pointed at 127.0.0.1 (DNS rebinding).
    - What changes anything must come from a page of this server, or from no page at all.
    - A body that is no upload is small.

    Source: OWASP Cross-Site Request Forgery Prevention Cheat Sheet (Fetch Metadata, verifying origin).
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store" if _is_api(scope) else "no-cache")
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if self._token is None and _host_name(headers.get("host", "")) not in LOOPBACK_HOSTS:
            return _refused(403, "This address is served to this machine alone, as localhost.")
        if scope["method"] not in _SAFE and not _is_own_page(headers):
            return _refused(403, "The request comes from another site.")
        if scope["path"] != UPLOADS_PATH and _body_bytes(headers) > MAX_BODY_BYTES:
            return _refused(413, "The request is too large.")
        if self._token is None or not _is_api(scope) or scope["path"] in _OPEN_PATHS:
            return None
        if is_authorized(headers, self._token):
            return None
        return _refused(401, "A token is needed.", {"WWW-Authenticate": "Bearer"})


def is_authorized(headers: Headers, token: str) -> bool:
    """Whether a request carries the token or the cookie that stands for it; in constant time."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    by_header = scheme.lower() == "bearer" and is_token(given.strip(), token)
    # Lenient, as browsers are: a cookie that another server on this host left must not hide ours.
    held = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
    return hmac.compare_digest(held.encode(), cookie_value(token).encode()) or by_header


def is_token(given: str, token: str) -> bool:
    """Whether this is the token, in constant time."""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def cookie_value(token: str) -> str:
    """What a browser keeps: it stands for the token here, and tells nobody what that is."""
    return hmac.new(token.encode(), b"ragline cookie", hashlib.sha256).hexdigest()


def _is_api(scope: Scope) -> bool:
    return str(scope["path"]).startswith("/api/")


def _body_bytes(headers: Headers) -> float:
    """How long the body is, as announced, which the server holds it to; one in chunks may have any length."""
    if "transfer-encoding" in headers:
        return float("inf")
    declared = headers.get("content-length", "0")
    return int(declared) if declared.isdecimal() else float("inf")


def _is_own_page(headers: Headers) -> bool:
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None and site not in ("same-origin", "none"):
        return False
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()


def _host_name(host: str) -> str:
    return host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()


def _refused(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)
