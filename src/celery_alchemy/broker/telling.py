"""What the main process of a worker tells of itself: written by a thread, in its order.

Between the channel and the routes. On SQLite a task that writes holds the one lock for as long as
it runs; the main loop, which sends an event every two seconds, must not wait for it, nor may a
task that holds it and sends remote control wait for itself.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import partial

from ..messages.message import Message
from ..sessions.background import Background
from ..sessions.engine import worker_pool
from .homes import BrokerHome
from .one_lock import session_with_the_lock
from .waking import aside

__all__ = ["drain_told", "tell"]

#: Of kombu's ``Mailbox``: what stands behind, and before, the name of the app's control exchange.
_CONTROL, _REPLY = ".pidbox", "reply."

#: Seconds for which the end of a connection, or of a process, waits for what is being written.
DRAIN_SECONDS = 3.0

_telling = Background("telling", "An event or remote control", 1)


def tell(home: BrokerHome, message: Message, write: Callable[[], None]) -> None:
    """Write an event, a reply or remote control; in a thread where this one must not wait.

    Args:
        home: The broker's database.
        message: What is sent.
        write: Writes it.
    """
    if _is_told(home, message) and (
        _is_of_worker(message) or session_with_the_lock(home) is not None
    ):
        _telling.run(partial(_write, write))
    else:
        write()


def _write(write: Callable[[], None]) -> None:
    with aside():
        write()


def _is_told(home: BrokerHome, message: Message) -> bool:
    return message.exchange == home.event_exchange or message.exchange.endswith(_CONTROL)


def _is_of_worker(message: Message) -> bool:
    """Tell whether this is the process of a worker's main loop, and no command for others."""
    is_command = message.exchange.endswith(_CONTROL) and not message.exchange.startswith(_REPLY)
    return worker_pool() is not None and not is_command


def drain_told() -> None:
    """Wait a moment until what was told is written."""
    _telling.drain(DRAIN_SECONDS)


atexit.register(drain_told)
