"""The embedded broker: kombu's file-system transport, made safe for workers whose processes are killed."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

from kombu.exceptions import ChannelError
from kombu.transport import filesystem
from kombu.utils.encoding import str_to_bytes
from kombu.utils.json import dumps

POLLING_SECONDS = 0.05


class Channel(filesystem.Channel):
    """A file-system channel whose messages are renamed into the queue's folder once they are written.

    kombu opens a message's file in that folder and then writes it; a worker that polls in between takes an
    empty file, cannot decode it and stops.
    """

    # kombu's own classes disagree on the name of the second parameter.
    def _put(self, queue: str, payload: dict[str, Any], **kwargs: Any) -> None:  # type: ignore[override]
        folder = Path(self.data_folder_out)
        # The name that kombu gives: files are taken in the order of their names.
        name = f"{round(time.monotonic() * 1000)}_{uuid.uuid4()}"
        scratch = folder / f"{name}.partial"
        try:
            scratch.write_bytes(str_to_bytes(dumps(payload)))
            os.replace(scratch, folder / f"{name}.{queue}.msg")
        except OSError as error:
            raise ChannelError(f"The message cannot be written to {folder}: {error}") from error


class Transport(filesystem.Transport):
    """A file-system transport that polls from the worker's event loop.

    With an event loop Celery gives each process of the prefork pool a pipe of its own. Without one they share
    a queue behind a lock, and a process that is killed while it waits there takes the lock with it: no other
    gets a task again.
    """

    Channel = Channel
    implements = filesystem.Transport.implements.extend(asynchronous=True)

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Look for messages as often as the polling interval says; called by the worker when it connects."""

        def take_messages() -> None:
            try:
                while True:
                    self.drain_events(connection, timeout=0)
            except TimeoutError:
                return  # no more messages, or as many unacknowledged ones as the worker may hold

        loop.call_repeatedly(self.polling_interval or POLLING_SECONDS, take_messages)


def transport_options(home: Path) -> dict[str, Any]:
    """Celery's `broker_transport_options` for a broker in the folder `home`, which is made if need be."""
    messages, control = home / "broker" / "messages", home / "broker" / "control"
    for folder in (messages, control):
        folder.mkdir(parents=True, exist_ok=True)
    return {
        "data_folder_in": str(messages),
        "data_folder_out": str(messages),
        "control_folder": str(control),
        "polling_interval": POLLING_SECONDS,
    }
