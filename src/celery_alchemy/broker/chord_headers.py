"""What the message of each part of a chord says of it: which run it is, how many parts it has.

Beneath the backend, which puts it into the signature of the chord's body: every part's message
carries that, so that a chord is sent without a statement of its own.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from celery.app.task import Context
from celery.result import GroupResult
from celery.utils import uuid

from ..messages.celery_types import Result
from ..outbox.chord_records import RUN_SEPARATOR
from ..outbox.result_records import key_of

__all__ = ["Sending", "arranged", "describe", "key_in", "size_in"]

#: As Celery's backends with counters have it: ``BaseKeyValueStoreBackend.on_chord_part_return``.
_SIZE = "chord_size"
_SHAPE = "celery_alchemy_shape"

_RUN = "celery_alchemy_run"

#: Where a request counts the chords that its task has sent.
_SENT = "celery_alchemy_chords_sent"

#: Bytes of an id's digest. Each part's message names all parts of a chord with groups in it.
_DIGEST_BYTES = 9

#: The parts of a chord: digests of their ids, and lists of such for its groups.
Shape: TypeAlias = "list[str | Shape]"


@dataclass(frozen=True, slots=True)
class Sending:
    """A chord whose parts are being sent.

    Attributes:
        key: That of its notes.
        size: How many parts it has, as their messages say; None if they do not.
    """

    key: str
    size: int | None


def describe(
    body: MutableMapping[str, object],
    chord_id: str,
    results: Iterable[Result | GroupResult] | None,
    sender: Context | None,
) -> Sending:
    """Write into the signature of a chord's body what the messages of the parts say.

    Args:
        body: The signature.
        chord_id: The id of the header.
        results: Those of the header; None where they are not known yet.
        sender: The request of the task that sends the chord; None outside of tasks.
    """
    body[_RUN] = _run_of(chord_id, sender)
    size = None
    if results is not None:
        shape = _shape_of(list(results))
        body.pop(_SHAPE, None)
        if any(isinstance(part, list) for part in shape):
            body[_SHAPE] = shape
        size = _leaves(shape)
        body[_SIZE] = size
    return Sending(key_in(body, chord_id), size)


def _run_of(chord_id: str, sender: Context | None) -> str:
    """Return which run of a chord is sent.

    A chord that was frozen has the same ids each time that it is sent, and each time is a run of
    its own. Only a task that is delivered again sends the same run again.
    """
    if sender is None or not sender.id:
        return _digest(uuid())
    sent: dict[str, int] = vars(sender).setdefault(_SENT, {})
    sent[chord_id] = sent.get(chord_id, 0) + 1
    return _digest(f"{sender.id} {sender.retries} {sent[chord_id]}")


def key_in(body: Mapping[str, object], chord_id: object) -> str:
    """Return the key of a chord's notes, as the message of any part says it."""
    run = body.get(_RUN)
    return key_of(chord_id if run is None else f"{chord_id}{RUN_SEPARATOR}{run}")


def size_in(body: Mapping[str, object]) -> int | None:
    """Return the size that a message says, None if it says none."""
    size = body.get(_SIZE)
    return size if isinstance(size, int) else None


def arranged(body: Mapping[str, object], ended: Sequence[tuple[str, object]]) -> list[object]:
    """Return the values of parts as the chord's body gets them.

    Args:
        body: The signature of the body, as the message of any part has it.
        ended: The keys of the parts and their values, in the order of the header.
    """
    shape = body.get(_SHAPE)
    if not isinstance(shape, list):
        return [value for _, value in ended]
    values: dict[str, list[object]] = {}
    for key, value in ended:
        values.setdefault(_digest(key), []).append(value)
    placed = _placed(shape, values)
    # Parts that came to the chord while it ran.
    return placed + [value for rest in values.values() for value in rest]


def _placed(shape: Shape, values: Mapping[str, list[object]]) -> list[object]:
    return [
        _placed(part, values) if isinstance(part, list) else values[part].pop(0) for part in shape
    ]


def _shape_of(results: Iterable[Result | GroupResult]) -> Shape:
    return [
        _shape_of(result.results or ())
        if isinstance(result, GroupResult)
        else _digest(key_of(result.id))
        for result in results
    ]


def _leaves(shape: Shape) -> int:
    return sum(_leaves(part) if isinstance(part, list) else 1 for part in shape)


def _digest(key: str) -> str:
    digest = hashlib.sha256(key.encode()).digest()
    return b64encode(digest[:_DIGEST_BYTES]).decode("ascii")
