"""Places that documents come from: their URIs, paths as people know them, names that tell them apart.

Who takes in, lists, cites or deletes names a document by its place.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sqlalchemy import select
from sqlalchemy.orm import Session

from ragline.tables import Source

MAX_LABEL_CHARACTERS = 60
"""A longer label loses folders in its middle: it stands in tables and on phones."""
MAX_RIVALS = 5000
"""Places of one name that are compared, 15 ms: a folder of a web site may hold any number of `index.html`."""


def file_uri(path: Path) -> str:
    """The URI of a file or folder, the same by whatever way a path leads there.

    Links among its folders are followed and `..` is gone; its own name stays, also where it is a link.
    """
    if path.name in ("", ".."):
        return Path(os.path.realpath(path)).as_uri()
    return Path(os.path.realpath(path.parent), path.name).as_uri()


# Controls, what breaks lines, what turns the direction of text, and bytes in no encoding.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text on one line that tells a terminal nothing: signs stand for what a name may have but not show."""
    return _INVISIBLE.sub(lambda sign: chr(0x2400 + ord(sign[0])) if sign[0] < " " else "\ufffd", text)


def shown_path(uri: str) -> str:
    """The path of a file, or of an upload below no folder of this machine, as a person knows it."""
    parts = urlsplit(uri)
    path = visible(unquote(parts.path, errors="replace"))
    return path if parts.scheme == "file" else path.lstrip("/")


def name_of(uri: str) -> str:
    """The file's own name."""
    return file_name(shown_path(uri))


def file_name(label: str) -> str:
    """The file's own name in a label."""
    return label.rpartition("/")[2]


def labels_of(uris: Collection[str]) -> dict[str, str]:
    """A name for each place: that of the file, and as many of its folders as tell it from the others.

    Returns:
        The label of each URI. A long one has an ellipsis for the folders in its middle, unless another would
        then look the same.
    """
    same_name: dict[str, set[str]] = defaultdict(set)
    for uri in uris:
        same_name[name_of(uri)].add(uri)
    labels: dict[str, str] = {}
    for group in same_name.values():
        labels |= _told_apart(group)
    return labels


def labels(session: Session, uris: Iterable[str]) -> dict[str, str]:
    """The labels of some places of the index, told apart from all of its places."""
    wanted = set(uris)
    names = sorted({name_of(uri) for uri in wanted})
    known: set[str] = set()
    for at in range(0, len(names), 900):  # SQLite's old limit of parameters is 999
        same_name = select(Source.uri).where(Source.name.in_(names[at : at + 900]))
        known.update(session.scalars(same_name.order_by(Source.id).limit(MAX_RIVALS)))
    every = labels_of(known | wanted)
    return {uri: every[uri] for uri in wanted}


def places_below(session: Session, uri: str) -> dict[int, str]:
    """The places of the index below a folder: the URI of each source, by its id."""
    # `startswith` is LIKE, which knows no case of letters on SQLite: hence the second look.
    below = select(Source.id, Source.uri).where(Source.uri.startswith(f"{uri}/", autoescape=True))
    return {row.id: row.uri for row in session.execute(below) if row.uri.startswith(f"{uri}/")}


def _told_apart(uris: Iterable[str]) -> dict[str, str]:
    # From the file's name upwards: sorted so, each has its nearest relatives beside it.
    paths = sorted((shown_path(uri).split("/")[::-1], uri) for uri in uris)
    whole: dict[str, list[str]] = {}
    for at, (path, uri) in enumerate(paths):
        beside = (paths[near][0] for near in (at - 1, at + 1) if 0 <= near < len(paths))
        shared = max((_shared(path, other) for other in beside), default=0)
        whole[uri] = path[: shared + 1][::-1]
    short = {uri: _shortened(parts) for uri, parts in whole.items()}
    repeated = len(set(short.values())) < len(short)
    return {uri: "/".join(parts) for uri, parts in whole.items()} if repeated else short


def _shared(path: list[str], other: list[str]) -> int:
    return next(
        (at for at, pair in enumerate(zip(path, other, strict=False)) if pair[0] != pair[1]),
        min(len(path), len(other)),
    )


def _shortened(parts: list[str]) -> str:
    label = "/".join(parts)
    if len(label) <= MAX_LABEL_CHARACTERS or len(parts) < 3:
        return label
    # The folder that tells it apart is the first one.
    kept = next(
        (at for at in range(2, len(parts) - 1) if _length(parts, at) <= MAX_LABEL_CHARACTERS),
        len(parts) - 1,
    )
    return "/".join((parts[0], "…", *parts[kept:]))


def _length(parts: list[str], kept: int) -> int:
    return len("/".join((parts[0], "…", *parts[kept:])))
