"""A result backend in a folder whose readers never see half a result."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from celery.backends.filesystem import FilesystemBackend


class AtomicFilesystemBackend(FilesystemBackend):
    """Celery's own backend truncates the file, then writes it: a poller in between reads an empty result."""

    def set(self, key: bytes, value: str | bytes) -> None:  # type: ignore[override]
        """Write the result beside its place and move it there in one step."""
        target = os.fsdecode(self._filename(key))  # type: ignore[attr-defined]
        content = value.encode() if isinstance(value, str) else value
        handle, temporary = tempfile.mkstemp(dir=Path(target).parent, prefix=".writing-")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, target)  # noqa: PTH105 (Path.replace would do the same; the names are strings here)
