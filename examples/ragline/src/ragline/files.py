"""Files to take in: found below the paths that a person names, and read within a limit."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ragline.errors import TooLargeError, UnreadableError
from ragline.formats import EXTENSIONS
from ragline.intake import Offer
from ragline.places import file_uri, name_of

MADE_FOLDERS = frozenset({"node_modules", "__pycache__"})
"""Folders of installed packages and of compiled code."""
MADE_FOLDER_MARKS = ("CACHEDIR.TAG", "pyvenv.cfg")
"""Files that say the same of their folder: https://bford.info/cachedir/, https://peps.python.org/pep-0405/"""
_BLOCK_BYTES = 1 << 20


@dataclass(slots=True)
class LeftOut:
    """What is in folders and not taken in, though it is not hidden.

    Attributes:
        other_kinds: files of no known format.
        special: pipes, sockets and devices: to read one may take for ever.
        empty: files with nothing but white space, such as many an `__init__.py`.
    """

    other_kinds: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)


def find_files(paths: Iterable[Path], left_out: LeftOut | None = None) -> Iterator[Path]:
    """The files to ingest, in order: those named, whatever they are, and those of known formats in folders.

    Inside a folder what is hidden is left out, and what programs have made: installed packages and
    caches. Links to folders are not followed.

    Args:
        paths: files and folders.
        left_out: is given what else is in folders.
    """
    left_out = left_out or LeftOut()
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not _is_left_out(Path(folder, name)))
            for file in (Path(folder, name) for name in sorted(files) if not name.startswith(".")):
                if file.suffix.lower() not in EXTENSIONS:
                    left_out.other_kinds.append(file)
                elif _is_special(file):
                    left_out.special.append(file)
                else:
                    yield file


def _is_left_out(folder: Path) -> bool:
    """Whether a folder is hidden, or made by a program: nobody wrote what is in there for readers."""
    return (
        folder.name.startswith(".")
        or folder.name in MADE_FOLDERS
        or any((folder / mark).is_file() for mark in MADE_FOLDER_MARKS)
    )


def _is_special(file: Path) -> bool:
    """Whether it is neither a file nor a folder; what cannot be looked at is told when it is read."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def read_file(path: Path, *, max_bytes: int) -> Offer:
    """Read a file into an offer; one that cannot be read, or is too large, is an offer with a problem.

    So is a pipe, a socket or a device: what it gives next time would replace what it gave.

    Raises:
        FileNotFoundError: it is not there any more.
    """
    uri = file_uri(path)
    name = name_of(uri)
    if _is_special(path):
        return Offer(uri, name, None, 0, None, UnreadableError("It is no ordinary file."))
    try:
        data, digest, size_bytes = _read(path, max_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        unreadable = UnreadableError(f"It cannot be read: {error.strerror or error}.")
        return Offer(uri, name, None, 0, None, unreadable)
    problem = TooLargeError.over(max_bytes) if data is None else None
    return Offer(uri, name, digest, size_bytes, data, problem)


def _read(path: Path, max_bytes: int) -> tuple[bytes | None, str, int]:
    """The bytes of a file unless there are more than so many, the digest of all, and how many there are."""
    with path.open("rb") as stream:
        expected = min(os.fstat(stream.fileno()).st_size, max_bytes)
        data = stream.read(expected + 1)
        if len(data) > expected:
            # It grows, or the system does not know how long it is, as below /proc.
            data += stream.read(max_bytes + 1 - len(data))
        digest, size_bytes = hashlib.sha256(data), len(data)
        if size_bytes <= max_bytes:
            return data, digest.hexdigest(), size_bytes
        del data
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            size_bytes += len(block)
    return None, digest.hexdigest(), size_bytes
