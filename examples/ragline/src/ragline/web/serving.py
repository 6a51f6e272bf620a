"""`ragline serve`: the web application on an address, with a worker beside it if asked for."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from contextlib import ExitStack
from ipaddress import ip_address
from types import FrameType
from urllib.parse import quote

import uvicorn
from rich.console import Console
from rich.markup import escape

from ragline import ingestion
from ragline.app import alchemy, create_tables, settings
from ragline.errors import ConfigurationError
from ragline.recipes import recipe_for
from ragline.web.application import create_web
from ragline.web.deadlines import TimedProtocol
from ragline.web.live import Live
from ragline.workers import temporary_worker

GRACE_SECONDS = 5
"""How long requests that are under way may take to end when the server stops."""


class Server(uvicorn.Server):
    """A server that lets watching pages go when it is told to stop; it would wait for them else."""

    def __init__(self, config: uvicorn.Config, live: Live) -> None:
        super().__init__(config)
        self._live = live

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        self._live.close()
        super().handle_exit(sig, frame)


def serve(console: Console, *, host: str, port: int, worker: bool, processes: int) -> None:
    """Serve until interrupted.

    Args:
        console: where the address is printed.
        host: a name or address of this machine; any but a loopback one makes a token necessary.
        port: 0 for any that is free.
        worker: start a worker for as long as it serves.
        processes: how many documents that worker works on at once.
    """
    create_tables(alchemy)
    token = settings.token
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    web = create_web(recipe=recipe_for(ingestion.choose_embedder(console)), token=token)
    # No log of requests: the address of the first one may hold the token.
    config = uvicorn.Config(
        web,
        http=TimedProtocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    listening = bound(host, port)
    # uvicorn hands a signal on when it has stopped: to this, so that the worker is stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    address = f"http://{_shown(host)}:{listening.getsockname()[1]}/"
    link = address if token is None else f"{address}?token={quote(token)}"
    with ExitStack() as stack:
        if worker:
            stack.enter_context(temporary_worker(home=settings.home, processes=processes))
        console.print(f"ragline is at [bold]{escape(link)}[/bold] (Ctrl-C stops it)", soft_wrap=True)
        Server(config, web.state.live).run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigurationError: the address does not exist, is not this machine's, or is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.getaddrinfo(host, port, family)
        return socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        raise ConfigurationError(f"--host {host}: there is no such address.") from error
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ConfigurationError(
            f"{host} port {port} cannot be served: {why}. Choose another --port or --host."
        ) from error


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host
