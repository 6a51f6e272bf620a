"""What people mean by an id, a path, a folder or a name: a document, or places to be deleted. Use cases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from ragline.errors import AmbiguousNameError, NoSuchDocumentError
from ragline.intake import uri_digest
from ragline.places import file_name, file_uri, labels, labels_of, places_below, shown_path
from ragline.tables import Chunk, Document, Source

MAX_ID_DIGITS = 18
"""A longer number is no id in any database."""
_AT_ONCE = 900


@dataclass(frozen=True, slots=True)
class Named:
    """A document that a person means.

    Attributes:
        label: that of the place that was named; of the first one where an id was given.
        others: how many other places show the document or wait for it.
    """

    document_id: int
    label: str
    others: int


@dataclass(frozen=True, slots=True)
class Target:
    """What a person wants to be deleted.

    Attributes:
        label: the place as lists show it, or the folder.
        document_ids: what is shown there.
        source_ids: the places to be forgotten; None where the document is to go from everywhere.
        others: how many other places show one of the documents or wait for it.
        is_folder: all places below a folder are meant.
    """

    label: str
    document_ids: tuple[int, ...]
    source_ids: tuple[int, ...] | None
    others: int
    is_folder: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    source_id: int
    uri: str
    label: str
    document_ids: tuple[int, ...]
    """The one that it shows, then the one that it waits for."""

    @property
    def newest_id(self) -> int:
        """What is done for a place is done for this one: the one that it shows is ready."""
        return self.document_ids[-1]


def find_document(session: Session, reference: str) -> Named:
    """The document that a person means: by id, by path or URI, or by name with some of its folders.

    Args:
        session: any session.
        reference: an id; a path, also a relative one; or a name as lists show it.

    Returns:
        Of a place whose next generation is under way, that one.

    Raises:
        NoSuchDocumentError: there is none.
        AmbiguousNameError: several documents are called so; a path to a file that is known is not ambiguous.
    """
    if (target := _by_id(session, reference)) is not None:
        return Named(target.document_ids[0], target.label, target.others)
    places = _places(session, reference)
    if len({place.newest_id for place in places}) > 1:
        raise _ambiguous(reference, places)
    place = places[0]
    others = _used(session, [place.newest_id]) - 1
    return Named(place.newest_id, place.label, others)


def find_target(session: Session, reference: str) -> Target:
    """What a person wants to be deleted: with an id a document, with a path or name one place, or a folder.

    Raises:
        NoSuchDocumentError: there is none.
        AmbiguousNameError: several places are called so.
    """
    target = _by_id(session, reference) or _by_folder(session, reference)
    if target is not None:
        return target
    places = _places(session, reference)
    if len(places) > 1:
        raise _ambiguous(reference, places)
    (place,) = places
    others = _used(session, place.document_ids) - 1
    return Target(place.label, place.document_ids, (place.source_id,), others)


def passages_lost(session: Session, targets: Iterable[Target]) -> int:
    """How many passages are gone when all of these are deleted: those that no other place keeps."""
    targets = list(targets)
    places = {key for one in targets for key in one.source_ids or ()}
    gone = {key for one in targets if one.source_ids is None for key in one.document_ids}
    used = {key for _, *keys in _sources(session, Source.id, places) for key in keys if key}
    elsewhere: set[int | None] = set()
    for column in (Source.serving_id, Source.pending_id):
        for source_id, *keys in _sources(session, column, used):
            if source_id not in places:
                elsewhere.update(keys)
    count = select(func.count(Chunk.id))
    portions = _portions(gone | (used - elsewhere))
    return sum(session.scalar(count.where(Chunk.document_id.in_(some))) or 0 for some in portions)


def _sources(
    session: Session, column: InstrumentedAttribute[Any], ids: Iterable[int]
) -> Iterator[tuple[int, int | None, int | None]]:
    """The places with one of these ids in a column: id, the document that is shown, the one waited for."""
    chosen = select(Source.id, Source.serving_id, Source.pending_id)
    for some in _portions(ids):
        for row in session.execute(chosen.where(column.in_(some))):
            yield row.id, row.serving_id, row.pending_id


def _portions(ids: Iterable[int]) -> Iterator[list[int]]:
    """Databases limit the parameters of a statement."""
    ordered = sorted(ids)
    return (ordered[start : start + _AT_ONCE] for start in range(0, len(ordered), _AT_ONCE))


def _by_id(session: Session, reference: str) -> Target | None:
    if not reference.isdecimal() or len(reference) > MAX_ID_DIGITS:
        return None
    document_id = int(reference)
    name = session.scalar(select(Document.name).where(Document.id == document_id))
    if name is None:
        return None
    places = _select(session, _uses([document_id]))
    label = _labelled(session, places[:1])[0].label if places else name
    return Target(label, (document_id,), None, max(len(places) - 1, 0))


def _by_folder(session: Session, reference: str) -> Target | None:
    path = Path(reference)
    for uri in (reference.rstrip("/"), file_uri(path), f"upload:///{quote(path.as_posix())}"):
        if places := places_below(session, uri):
            # The folder itself would be a file.
            known = select(Source.id).where(Source.uri_digest == uri_digest(uri))
            if session.scalar(known) is None:
                return Target(shown_path(uri), (), tuple(sorted(places)), 0, is_folder=True)
    return None


def _places(session: Session, reference: str) -> list[_Place]:
    """The places that a person may mean; at least one."""
    uris = (uri_digest(reference), uri_digest(file_uri(Path(reference))))
    if places := _select(session, Source.uri_digest.in_(uris)):
        return _labelled(session, places)
    # The last part is the file's name, those before are folders.
    path = "/".join(part for part in reference.split("/") if part not in ("", "."))
    places = _select(session, Source.name == file_name(path))
    names = labels_of([place.uri for place in places])
    called = [place for place in places if names[place.uri] == reference] or [
        place for place in places if f"/{shown_path(place.uri)}".endswith(f"/{path}")
    ]
    if not called:
        raise NoSuchDocumentError(reference)
    return _with_labels(called, names)


def _select(session: Session, condition: ColumnElement[bool]) -> list[_Place]:
    """Places without their labels, in the order they were added."""
    query = select(Source.id, Source.uri, Source.serving_id, Source.pending_id).where(condition)
    rows = session.execute(query.order_by(Source.id))
    found = [(row, tuple(filter(None, (row.serving_id, row.pending_id)))) for row in rows]
    return [_Place(row.id, row.uri, "", document_ids) for row, document_ids in found if document_ids]


def _labelled(session: Session, places: list[_Place]) -> list[_Place]:
    return _with_labels(places, labels(session, [place.uri for place in places]))


def _with_labels(places: list[_Place], names: dict[str, str]) -> list[_Place]:
    return [_Place(one.source_id, one.uri, names[one.uri], one.document_ids) for one in places]


def _uses(document_ids: Iterable[int]) -> ColumnElement[bool]:
    ids = tuple(document_ids)
    return or_(Source.serving_id.in_(ids), Source.pending_id.in_(ids))


def _used(session: Session, document_ids: Iterable[int]) -> int:
    """How many places show one of these documents or wait for it."""
    return session.scalar(select(func.count(Source.id)).where(_uses(document_ids))) or 0


def _ambiguous(reference: str, places: list[_Place]) -> AmbiguousNameError:
    told = sorted((place.newest_id, place.label) for place in places)
    return AmbiguousNameError(reference, told)
