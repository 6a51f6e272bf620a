"""An upload read from the network: bounded while it arrives, its name made harmless, its content judged."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import AsyncIterator
from tempfile import SpooledTemporaryFile
from urllib.parse import quote

from ragline.errors import EmptyError, TooLargeError
from ragline.formats import detect_format
from ragline.intake import Offer

IN_MEMORY_BYTES = 1_000_000
MAX_PART_CHARACTERS = 255
MAX_NAME_CHARACTERS = 1000


async def read_upload(
    stream: AsyncIterator[bytes], name: str, *, declared_bytes: int | None, max_bytes: int
) -> Offer:
    """Read an upload into an offer.

    Args:
        stream: the body, in pieces.
        name: what the browser calls the file, with its folders.
        declared_bytes: the length that the request announces, which may be a lie.
        max_bytes: the largest that is taken.

    Raises:
        DocumentError: it is too large, empty, or nothing that a parser here reads.
    """
    too_large = TooLargeError.over(max_bytes)
    if declared_bytes is not None and declared_bytes > max_bytes:
        raise too_large
    digest, size_bytes = hashlib.sha256(), 0
    # A file of the system's own choosing, without a name where the system can do that.
    with SpooledTemporaryFile(max_size=IN_MEMORY_BYTES) as file:
        async for block in stream:
            size_bytes += len(block)
            if size_bytes > max_bytes:
                raise too_large
            digest.update(block)
            file.write(block)
        file.seek(0)
        data = file.read()
    path = harmless_path(name)
    if not data.strip():
        raise EmptyError("The file is empty.")
    detect_format(data, path)
    return Offer(f"upload:///{quote(path)}", path.rpartition("/")[2], digest.hexdigest(), size_bytes, data)


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
