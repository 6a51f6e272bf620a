"""What must be declared before a message is published, as data.

Queues and exchanges may be known to the sender only.

Beneath ``recording.py``, which asks for it, and ``batches.py``, which makes kombu's entities of it
again, perhaps in another process.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from kombu import Exchange, Queue
from kombu.abstract import Object
from kombu.entity import binding

from .celery_types import App, Fields

if TYPE_CHECKING:
    from celery.app.amqp import Queues

__all__ = ["Declaration", "declared", "entity_of", "name_of"]

#: Kind and attributes of a kombu entity, as JSON holds them.
Declaration = Fields

_KIND = "entity"

#: What kombu's comparison of two queues leaves out.
_more_of = attrgetter(
    "bindings",
    "no_declare",
    "expires",
    "message_ttl",
    "max_length",
    "max_length_bytes",
    "max_priority",
)

#: The queues of each app, those that any process of the app would declare by their names, and which
#: of the first are such: comparing takes 5 us for each message.
_of_apps: WeakKeyDictionary[App, tuple[Queues, Queues, dict[str, Queue]]] = WeakKeyDictionary()


def declared(app: App, entities: Iterable[Exchange | Queue]) -> tuple[list[str], list[Declaration]]:
    """Return what a message needs declared: names of queues, and all others in full.

    A name is enough for a queue that the app's settings describe, or that Celery makes of a name
    alone: the process that publishes has the same settings. For any other the broker would refuse a
    declaration with other arguments.

    Args:
        app: The Celery app.
        entities: What Celery asks a producer to declare: queues and exchanges.
    """
    names: list[str] = []
    in_full: list[Declaration] = []
    for entity in entities:
        if isinstance(entity, Queue):
            if _is_told_by_name(app, entity):
                names.append(entity.name)
            else:
                in_full.append(_queue_as_data(entity))
        elif isinstance(entity, Exchange):
            in_full.append({_KIND: "exchange", **_as_data(entity)})
    return names, in_full


def _is_told_by_name(app: App, queue: Queue) -> bool:
    amqp = app.amqp
    kept = _of_apps.get(app)
    if kept is None or kept[0] is not amqp.queues:
        kept = _of_apps[app] = amqp.queues, amqp.Queues(app.conf.task_queues), {}
    _, fresh, told = kept
    if told.get(queue.name) is queue:
        return True
    try:
        other = fresh[queue.name]
    except KeyError:
        return False
    is_told = other is queue or bool(other == queue and _more_of(other) == _more_of(queue))
    if is_told:
        told[queue.name] = queue
    return is_told


def _queue_as_data(queue: Queue) -> Declaration:
    bindings = [_as_data(one) for one in queue.bindings or ()]
    return {_KIND: "queue", **_as_data(queue), "bindings": bindings}


def _as_data(entity: Object) -> Fields:
    # Whatever is not set is left out: another version of kombu may not know it.
    return {
        name: value for name, value in entity.as_dict(recurse=True).items() if value is not None
    }


def name_of(declaration: Declaration) -> str | None:
    """Return the name of the queue that a declaration is of; None if it is of an exchange."""
    return str(declaration["name"]) if declaration[_KIND] == "queue" else None


def entity_of(declaration: Fields) -> Exchange | Queue:
    """Make a kombu entity of what ``declared()`` returned. Nothing in it is executed or imported.

    Raises:
        ValueError: It is nothing of the kind.
    """
    try:
        attributes = dict(declaration)
        kind, name = attributes.pop(_KIND), attributes["name"]
        if not isinstance(name, str) or kind not in ("queue", "exchange"):
            raise ValueError(f"{kind!r} {name!r} is neither a queue nor an exchange")
        if kind == "exchange":
            return Exchange(**attributes)
        attributes["bindings"] = [
            binding(**_with_exchange(one)) for one in attributes.get("bindings", ())
        ]
        return Queue(**_with_exchange(attributes))
    except Exception as exc:
        raise ValueError(f"not a declaration: {exc}") from exc


def _with_exchange(attributes: Fields) -> Fields:
    exchange = attributes.get("exchange")
    return {**attributes, "exchange": Exchange(**exchange) if exchange is not None else None}
