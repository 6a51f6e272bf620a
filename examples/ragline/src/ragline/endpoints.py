"""Calls of an OpenAI-compatible endpoint over HTTP: one JSON question, one JSON answer or a clear error.

Below the embedder and the chat that use it; it knows neither documents nor sessions.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ragline.errors import EndpointBusyError, EndpointError

if TYPE_CHECKING:  # imported late: it takes longer than most commands
    import httpx

CONNECT_SECONDS = 10.0
MAX_ANSWER_BYTES = 64_000_000
"""64 vectors of 4096 numbers, written out, have 6 MB: what is larger is no answer."""
MAX_RETRY_AFTER_SECONDS = 3600.0
_BUSY = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
"""Statuses that pass (Source: RFC 9110, 15.5-15.6; what the clients of OpenAI and Anthropic try again)."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server and the model to ask of it.

    Attributes:
        url: its base, such as `https://api.openai.com/v1`.
        model: the model's name there.
        key: sent as a bearer token; None for servers that want none.
        dimensions: the length of vectors to ask for; None for the model's own.
        timeout_seconds: how long one whole answer may take.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    dimensions: int | None = None
    timeout_seconds: float = 60.0

    @property
    def identity(self) -> str:
        """Server and model in at most 58 characters: another of either is another identity."""
        digest = hashlib.sha256(f"{self.url.rstrip('/')}\n{self.model}".encode()).hexdigest()
        return f"{self.model[:40]}@{digest[:12]}"

    @property
    def host(self) -> str:
        """The server as errors name it: a URL may hold a password."""
        import httpx

        url = httpx.URL(self.url)
        return url.host if url.port is None else f"{url.host}:{url.port}"


def open_client(endpoint: Endpoint) -> httpx.Client:
    """A client that keeps its connections; one process uses it, made after the fork."""
    import httpx

    headers = {} if endpoint.key is None else {"Authorization": f"Bearer {endpoint.key}"}
    timeout = httpx.Timeout(endpoint.timeout_seconds, connect=CONNECT_SECONDS)
    return httpx.Client(base_url=endpoint.url, headers=headers, timeout=timeout)


def ask(client: httpx.Client, endpoint: Endpoint, path: str, question: dict[str, Any]) -> Any:
    """Post a question and return the answer's JSON.

    Args:
        client: from `open_client`.
        endpoint: whom it asks.
        path: below the endpoint's URL, such as `embeddings`.
        question: the body, without the model.

    Raises:
        EndpointBusyError: no answer now, perhaps one later: 429, 5xx, no connection, out of time.
        EndpointError: the server refuses, or what it says is not JSON.
    """
    import httpx

    deadline = time.monotonic() + endpoint.timeout_seconds
    try:
        with client.stream("POST", path, json={"model": endpoint.model, **question}) as response:
            body = _read(response, endpoint, deadline)
    except httpx.TimeoutException as error:
        raise _out_of_time(endpoint) from error
    except httpx.TransportError as error:
        raise EndpointBusyError(f"{endpoint.host} cannot be reached: {error}.") from error
    if response.status_code in _BUSY:
        after = retry_after_seconds(response.headers.get("Retry-After"))
        raise EndpointBusyError(_refusal(endpoint, response.status_code, body), after)
    if response.status_code != 200:
        raise EndpointError(_refusal(endpoint, response.status_code, body))
    try:
        return json.loads(body)
    except ValueError as error:
        raise EndpointError(f"{endpoint.host} answered something that is not JSON.") from error


def retry_after_seconds(value: str | None, now: dt.datetime | None = None) -> float | None:
    """What a Retry-After header asks for, seconds or a date, at most an hour; None where it says nothing.

    Source: RFC 9110, 10.2.3.
    """
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        now = now or dt.datetime.now(dt.timezone.utc)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=dt.timezone.utc)
        seconds = (moment - now).total_seconds()
    if seconds != seconds:  # not a number
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def _read(response: httpx.Response, endpoint: Endpoint, deadline: float) -> bytes:
    # httpx limits the wait for each piece: a server that drips bytes would hold the task for ever.
    body = bytearray()
    for block in response.iter_bytes():
        body += block
        if len(body) > MAX_ANSWER_BYTES:
            raise EndpointError(f"{endpoint.host} answered more than {MAX_ANSWER_BYTES / 1e6:.0f} MB.")
        if time.monotonic() > deadline:
            raise _out_of_time(endpoint)
    return bytes(body)


def _out_of_time(endpoint: Endpoint) -> EndpointBusyError:
    return EndpointBusyError(f"{endpoint.host} did not answer within {endpoint.timeout_seconds:g} seconds.")


def _refusal(endpoint: Endpoint, status: int, body: bytes) -> str:
    if status in (401, 403):
        # What servers say here may repeat the key.
        return f"{endpoint.host} does not accept the key (status {status})."
    if 300 <= status < 400:
        return f"{endpoint.host} points elsewhere (status {status}): give the URL that it points to."
    said = " ".join(_message(body).split())[:200]
    return f"{endpoint.host} answered with status {status}{f': {said}' if said else ''}."


def _message(body: bytes) -> str:
    """The server's own words: `{"error": {"message": ...}}` as OpenAI has it, or a string in its place."""
    try:
        answer = json.loads(body)
    except ValueError:
        return ""
    error = answer.get("error") if isinstance(answer, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return said if isinstance(said, str) else ""
