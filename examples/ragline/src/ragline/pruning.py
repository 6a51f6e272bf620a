"""Documents whose files are gone: found below the folders that a person names, and forgotten. Use cases."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from sqlalchemy import select
from sqlalchemy.orm import Session

from ragline.intake import forget_source, uri_digest
from ragline.places import file_uri, places_below, shown_path
from ragline.tables import Source


@dataclass(frozen=True, slots=True)
class Gone:
    """A place of the index without its file."""

    source_id: int
    path: str


def find_gone(session: Session, paths: Iterable[Path]) -> list[Gone]:
    """The places at or below some paths whose files are not there, in the order of their paths.

    What cannot be looked at, in a folder without permission for instance, counts as there.
    """
    gone: dict[int, Gone] = {}
    for path in paths:
        uri = file_uri(path)
        itself = session.scalar(select(Source.id).where(Source.uri_digest == uri_digest(uri)))
        there = places_below(session, uri) | ({} if itself is None else {itself: uri})
        for source_id, found in there.items():
            if not _is_there(found):
                gone[source_id] = Gone(source_id, shown_path(found))
    return sorted(gone.values(), key=lambda one: one.path)


def forget(session: Session, gone: Sequence[Gone]) -> None:
    """Forget these places, and the documents that no other place shows, with all that was made of them."""
    for one in sorted(gone, key=lambda one: one.source_id):
        forget_source(session, one.source_id)


def _is_there(uri: str) -> bool:
    try:
        os.lstat(_bytes_of(uri))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _bytes_of(uri: str) -> bytes:
    """The path of a file's URI as the system has it: a name may be in no encoding."""
    return unquote_to_bytes(urlsplit(uri).path)
