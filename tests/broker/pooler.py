"""A proxy in front of PostgreSQL that answers as a pooler does: with a number of its own, and telling nothing."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

from sqlalchemy import make_url

from tests.delivery.proxy import CommitProxy

#: Messages of the server. Source: https://www.postgresql.org/docs/current/protocol-message-formats.html
_BACKEND_KEY_DATA, _NOTIFICATION = b"K", b"A"

#: No process has it.
NUMBER = 2**31 - 7


class Pooler(CommitProxy):
    """A pooler of PostgreSQL.

    Args:
        url: The database's URL.
        tells: In session mode what is told reaches who listens, in transaction mode it does not.
    """

    def __init__(self, url: str, *, tells: bool) -> None:
        super().__init__(url)
        readable = make_url(self.url).update_query_dict({"sslmode": "disable", "gssencmode": "disable"})
        self.url = readable.render_as_string(hide_password=False)
        self._tells = tells
        #: What clients have sent.
        self.asked = b""

    def __enter__(self) -> Pooler:  # noqa: PYI034 (Self is not in Python 3.10's typing)
        super().__enter__()
        return self

    def _requests(self, client: socket.socket, server: socket.socket, *events: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                self.asked += data
                server.sendall(data)
        client.close()
        server.close()

    def _answers(self, client: socket.socket, server: socket.socket, *events: threading.Event) -> None:
        with contextlib.suppress(OSError):
            for kind, content in _messages(server):
                if kind == _NOTIFICATION and not self._tells:
                    continue
                said = struct.pack("!i", NUMBER) + content[4:] if kind == _BACKEND_KEY_DATA else content
                client.sendall(kind + struct.pack("!i", len(said) + 4) + said)
        client.close()


def _messages(server: socket.socket) -> Iterator[tuple[bytes, Any]]:
    with server.makefile("rb") as stream:
        while head := stream.read(5):
            kind, length = struct.unpack("!ci", head)
            yield kind, stream.read(length - 4)
