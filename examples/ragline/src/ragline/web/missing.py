"""What is answered at an address where nothing is: a page to a browser, JSON to all others."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

_PAGE = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>Not found · ragline</title>
  <link rel="icon" href="/icon.svg" type="image/svg+xml">
  <link rel="stylesheet" href="/style.css">
</head>
<body>
  <header class="top"><h1><img src="/icon.svg" alt="" width="28" height="28">ragline</h1></header>
  <main>
    <section class="missing" aria-labelledby="missing-title">
      <h2 id="missing-title">There is nothing at this address</h2>
      <p>It may be mistyped, or what was there is gone.</p>
      <p class="buttons"><a class="button" href="/">Go to the start</a></p>
    </section>
  </main>
</body>
</html>
"""


async def refused(request: Request, error: Exception) -> Response:
    """The answer to a request that the web framework itself refused, by an `HTTPException`."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code != 404:
        return await http_exception_handler(request, error)
    if _is_browser(request):
        response: Response = HTMLResponse(_PAGE, 404, error.headers)
    else:
        response = await http_exception_handler(request, error)
    response.headers["Vary"] = "Accept"
    return response


def _is_browser(request: Request) -> bool:
    """Whether a page is asked for by its name: programs take anything, and only browsers ask for that."""
    kinds = request.headers.get("accept", "").lower().split(",")
    return any(kind.partition(";")[0].strip() == "text/html" for kind in kinds)
