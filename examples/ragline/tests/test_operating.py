"""The server as clients that are slow, hostile or gone leave it: over real connections."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")

import uvicorn

from pipelines import KEYWORDS, empty_index
from ragline.web import deadlines, uploads
from ragline.web.application import create_web
from ragline.web.deadlines import TimedProtocol
from ragline.web.serving import Server, bound
from servers import eventually


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    """The application on an address, in a thread."""
    empty_index()
    web = create_web(recipe=KEYWORDS)
    config = uvicorn.Config(web, log_config=None, http=TimedProtocol)
    listening = bound("127.0.0.1", 0)
    server = Server(config, web.state.live)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join(timeout=20)
    assert not thread.is_alive()


def upload_headers(length: int) -> bytes:
    """The beginning of an upload."""
    line = "POST /api/documents?name=whale.md HTTP/1.1"
    headers = ("Host: 127.0.0.1", "Connection: close", f"Content-Length: {length}", "", "")
    return "\r\n".join((line, *headers)).encode()


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    connection.settimeout(30)
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_headers_that_do_not_end_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of the first request, nor of a later one on the connection, nor one that never begins."""
    monkeypatch.setattr(deadlines, "HEADER_SECONDS", 0.5)
    asked = b"GET /api/limits HTTP/1.1\r\nHost: 127.0.0.1\r\n"

    with served() as address:
        for sent, answers in ((b"", 0), (asked, 0), (asked + b"\r\n" + asked, 1)):
            with closing(socket.create_connection(address)) as connection:
                connection.sendall(sent)
                assert everything(connection).count(b"200 OK") == answers


def test_a_body_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client is told, the connection is closed and one line is logged; nothing of it is kept."""
    monkeypatch.setattr(deadlines, "BODY_SECONDS", 0.5)

    with served() as address, closing(socket.create_connection(address)) as connection:
        connection.sendall(upload_headers(1000) + b"whale")
        answer = everything(connection)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"too slowly" in answer
    assert logged(caplog) == [
        "A request to /api/documents is too slow: 5 bytes came.",
        "The upload of whale.md was broken off after 5 bytes.",
    ]


def test_an_upload_that_goes_on_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece that comes gives it more time."""
    monkeypatch.setattr(deadlines, "BODY_SECONDS", 2)
    monkeypatch.setattr(deadlines, "BYTES_A_SECOND", 1)
    pause = threading.Event()

    with served() as address, closing(socket.create_connection(address)) as connection:
        connection.sendall(upload_headers(400) + b"w" * 100)
        for _ in range(3):
            pause.wait(0.8)
            connection.sendall(b"w" * 100)

        assert everything(connection).startswith(b"HTTP/1.1 201 ")


def test_an_upload_that_is_broken_off_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever runs the server reads what happened, and no traceback."""
    with served() as address:
        with closing(socket.create_connection(address)) as connection:
            connection.sendall(upload_headers(1000) + b"whale")
        eventually(lambda: bool(logged(caplog)))

    (line,) = logged(caplog)
    assert re.fullmatch(r"The upload of whale\.md was broken off after [05] bytes\.", line)
    assert not any(record.exc_info for record in caplog.records)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a person who runs the server would see."""
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record.getMessage() for record in records if record.name.startswith(("ragline", "uvicorn"))]


def test_uploads_are_read_and_judged_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, hashes and formats are work of threads: other requests are answered meanwhile."""
    threads: set[threading.Thread] = set()

    def noted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            threads.add(threading.current_thread())
            return function(*arguments)

        return call

    monkeypatch.setattr(uploads.Received, "write", noted(uploads.Received.write))
    monkeypatch.setattr(uploads, "detect_format", noted(uploads.detect_format))

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"whale " * 10_000

    async def read() -> int:
        async with uploads.received(pieces(), "a.md", declared_bytes=None, max_bytes=10**7) as given:
            return (await asyncio.to_thread(given.offer)).size_bytes

    assert asyncio.run(read()) == 2_400_000
    assert threads
    assert threading.current_thread() not in threads
