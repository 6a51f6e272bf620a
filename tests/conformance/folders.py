"""The file-system broker with messages that no reader sees half written."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from time import monotonic_ns
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """kombu's own opens a message's file, then locks it, then writes it: a reader in between takes an empty message."""

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        folder = Path(self.data_folder_out)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
        with os.fdopen(handle, "w") as file:
            file.write(dumps(payload))
        # Readers sort by name, so names are made of the time, in digits of one length.
        os.replace(temporary, folder / f"{monotonic_ns():020}_{uuid.uuid4()}.{queue}.msg")  # noqa: PTH105


class Transport(filesystem.Transport):
    """The transport with that channel."""

    Channel = Channel


def install() -> None:
    """Have `filesystem://` mean this transport in this process."""
    TRANSPORT_ALIASES["filesystem"] = f"{__name__}:{Transport.__name__}"
