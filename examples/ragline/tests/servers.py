"""A real HTTP server in a thread that the tests of endpoints script, answer by answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the server says once."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    raw: bytes | None = None
    drips: bool = False


@dataclass
class Question:
    """What the server was asked once."""

    path: str
    headers: dict[str, str]
    body: Any


Script = Callable[[Question], Answer]


class ScriptedServer(ThreadingHTTPServer):
    """Answers every POST as its script says, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.questions: list[Question] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        """The base URL, as the settings have it."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        question = Question(self.path, dict(self.headers), json.loads(self.rfile.read(length)))
        self.server.questions.append(question)
        answer = self.server.script(question)
        self.server.closing.wait(answer.delay_seconds)
        body = answer.raw if answer.raw is not None else json.dumps(answer.body).encode()
        try:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for at in range(len(body)) if answer.drips else ():
                self.wfile.write(body[at : at + 1])
                self.wfile.flush()
                if self.server.closing.wait(0.05):
                    return
            if not answer.drips:
                self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True  # the caller gave up, as some tests want it to

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing on the terminal."""


@contextmanager
def serving(script: Script) -> Iterator[ScriptedServer]:
    """The server for the length of a block."""
    server = ScriptedServer(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def in_turn(*answers: Answer) -> Script:
    """A script that gives these answers one after the other, and the last of them from then on."""
    remaining = list(answers)

    def script(_: Question) -> Answer:
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    return script


def letter_vectors(question: Question) -> Answer:
    """Embeddings of 26 dimensions, how often each letter occurs, listed in reverse as a server may."""
    entries = [
        {"index": at, "embedding": [text.lower().count(chr(97 + letter)) + 0.001 for letter in range(26)]}
        for at, text in enumerate(question.body["input"])
    ]
    return Answer({"data": entries[::-1]})


def eventually(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Wait for a condition; fails when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.02)
