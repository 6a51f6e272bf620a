"""A TCP proxy in front of a database that can lose a COMMIT on its way, or the answer to it on the way back."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from types import TracebackType
from typing import Any, Literal

from sqlalchemy import URL, Connection, make_url

#: What becomes of the next COMMIT: it reaches the server and its answer does not come back, or it never arrives.
Loss = Literal["answer", "commit"]

# Both protocols send the statement as it is: PostgreSQL in a Query or Parse message, MySQL in COM_QUERY.
_COMMIT = b"COMMIT"


class CommitProxy:
    """Listens on a local port and passes everything on, but for what `lose_next` says.

    Args:
        url: The database's URL.

    Attributes:
        url: The same database by way of the proxy.
        lost: How many COMMITs were lost so far.
    """

    def __init__(self, url: str) -> None:
        server = make_url(url)
        self._server = (server.host or "127.0.0.1", server.port or _default_port(server))
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = server.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        self.lost = 0
        self._loss: Loss | None = None
        self._loser: int | None = None
        self._is_away = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> CommitProxy:  # noqa: PYI034 (Self is not in Python 3.10's typing)
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        # Closing a listener does not wake the thread that waits in accept(); shutting it down does.
        _close(self._listener)
        for end in self._sockets:
            _close(end)
        for thread in self._threads:
            thread.join(5)

    def lose_next(self, loss: Loss, *, of: Connection | None = None) -> None:
        """Cut the connection of the next COMMIT, after the server has carried it out or before it has seen it.

        Args:
            loss: What is lost.
            of: The connection whose COMMIT it is; None for whichever comes next.
        """
        self._loser = None if of is None else _port_of(of)
        self._loss = loss

    def go_away(self) -> None:
        """Cut all connections, and refuse new ones."""
        self._is_away = True
        for end in self._sockets:
            _close(end)

    def come_back(self) -> None:
        """Take connections again."""
        self._is_away = False

    def _start(self, run: object, *args: object) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_away:
                _close(client)
                continue
            server = socket.create_connection(self._server)
            self._sockets += [client, server]
            answered = threading.Event()
            swallowing = threading.Event()
            self._start(self._requests, client, server, swallowing, answered)
            self._start(self._answers, client, server, swallowing, answered)

    def _requests(self, client: socket.socket, server: socket.socket, swallowing: threading.Event, answered: threading.Event) -> None:
        with contextlib.suppress(OSError):
            port = client.getpeername()[1]
            while data := client.recv(65536):
                if self._loss is not None and _COMMIT in data and self._loser in (None, port):
                    loss, self._loss = self._loss, None
                    if loss == "answer":
                        swallowing.set()
                        server.sendall(data)
                        answered.wait(10)
                    self.lost += 1
                    break
                server.sendall(data)
        _close(client)
        _close(server)

    def _answers(self, client: socket.socket, server: socket.socket, swallowing: threading.Event, answered: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if swallowing.is_set():
                    answered.set()
                    return
                client.sendall(data)
        _close(client)


def _port_of(connection: Connection) -> int:
    """Return the local port of a connection."""
    driver: Any = connection.connection.driver_connection
    number = driver.fileno() if hasattr(driver, "fileno") else driver._sock.fileno()
    with socket.socket(fileno=os.dup(number)) as twin:
        port: int = twin.getsockname()[1]
    return port


def _default_port(url: URL) -> int:
    return {"postgresql": 5432, "mysql": 3306}[url.get_backend_name()]


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
