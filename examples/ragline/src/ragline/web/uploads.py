"""An upload read from the network: bounded while it arrives, its name made harmless, its content judged."""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile
from urllib.parse import quote

from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect

from ragline.errors import EmptyError, TooLargeError
from ragline.formats import detect_format
from ragline.intake import Offer

logger = logging.getLogger(__name__)

IN_MEMORY_BYTES = 1_000_000
AT_ONCE_BYTES = 1_000_000
"""What is given to a thread at once: the network's pieces of 64 kB are not worth a change of threads."""
MAX_PART_CHARACTERS = 255
MAX_NAME_CHARACTERS = 1000


@dataclass(slots=True)
class Received:
    """The bytes of an upload, in a file of the system's own choosing that goes with it."""

    path: str
    file: SpooledTemporaryFile[bytes]
    size_bytes: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def write(self, blocks: Sequence[bytes]) -> None:
        """Keep some more of it; blocks, so call it in a thread."""
        for block in blocks:
            self.digest.update(block)
            self.file.write(block)

    def offer(self) -> Offer:
        """Judge it by its bytes; blocks, so call it in a thread.

        Raises:
            DocumentError: it is empty, or nothing that a parser here reads.
        """
        self.file.seek(0)
        data = self.file.read()
        if not data.strip():
            raise EmptyError("The file is empty.")
        detect_format(data, self.path)
        name = self.path.rpartition("/")[2]
        uri = f"upload:///{quote(self.path)}"
        return Offer(uri, name, self.digest.hexdigest(), self.size_bytes, data)


@asynccontextmanager
async def received(
    stream: AsyncIterator[bytes], name: str, *, declared_bytes: int | None, max_bytes: int
) -> AsyncIterator[Received]:
    """Read an upload, for the length of a block; the event loop waits for no disk.

    Args:
        stream: the body, in pieces.
        name: what the browser calls the file, with its folders.
        declared_bytes: the length that the request announces, which may be a lie.
        max_bytes: the largest that is taken.

    Raises:
        TooLargeError: it is too large; no more than the limit was read.
        ClientDisconnect: the client went away; this is logged.
    """
    too_large = TooLargeError.over(max_bytes)
    if declared_bytes is not None and declared_bytes > max_bytes:
        raise too_large
    with SpooledTemporaryFile(max_size=IN_MEMORY_BYTES) as file:
        upload = Received(harmless_path(name), file)
        blocks: list[bytes] = []
        try:
            async for block in stream:
                upload.size_bytes += len(block)
                if upload.size_bytes > max_bytes:
                    raise too_large
                blocks.append(block)
                if sum(map(len, blocks)) >= AT_ONCE_BYTES:
                    await run_sync(upload.write, blocks)
                    blocks = []
        except ClientDisconnect:
            logger.warning("The upload of %s was broken off after %d bytes.", upload.path, upload.size_bytes)
            raise
        await run_sync(upload.write, blocks)
        yield upload


def harmless_path(name: str) -> str:
    """A name as it may be shown and compared: relative, without `..`, controls or marks that turn text.

    It is never used as a path of this machine's; the bytes go to the database.
    """
    parts = []
    for part in unicodedata.normalize("NFC", name).replace("\\", "/").split("/"):
        # Categories C*: controls, invisible formats such as U+202E (right-to-left override), surrogates.
        visible = "".join(sign for sign in part if unicodedata.category(sign)[0] != "C").strip()
        if visible not in ("", ".", ".."):
            parts.append(_shortened(visible))
    path = "/".join(parts) or "unnamed"
    return path if len(path) <= MAX_NAME_CHARACTERS else parts[-1]


def _shortened(part: str) -> str:
    """At most 255 characters with the extension kept: the format is told by it."""
    if len(part) <= MAX_PART_CHARACTERS:
        return part
    stem, dot, extension = part.rpartition(".")
    if not dot or len(extension) > 16:
        return part[:MAX_PART_CHARACTERS]
    return f"{stem[: MAX_PART_CHARACTERS - len(extension) - 1]}.{extension}"
