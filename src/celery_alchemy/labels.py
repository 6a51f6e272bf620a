"""What the database is told of the running task: a name beside its transactions, and comments behind its statements.

Above the request, which knows what runs; ``alchemy.py`` puts it around a source of sessions when it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, cast, get_args
from urllib.parse import quote

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from .errors import ConfigurationError
from .ledger import NO_OPTIONS, SessionOptions
from .request import UnitOfWork, at_hand
from .sessions import NOTHING, Asks, SessionSource

__all__ = ["CommentKey", "LabelledSource", "Labels", "comment_keys_from"]

CommentKey = Literal["task", "id"]


def comment_keys_from(value: object) -> tuple[CommentKey, ...]:
    """Check a ``statement_comments`` option.

    Raises:
        ConfigurationError: It is a bare string, no iterable, or holds a name that is no key.
    """
    keys = get_args(CommentKey)
    wanted = None if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if wanted is None or not all(key in keys for key in wanted):
        raise ConfigurationError(
            f"statement_comments={value!r} is not a tuple of keys.",
            'Write statement_comments=("task",), ("task", "id"), or () for none.',
        )
    return tuple(key for key in keys if key in wanted)


class Labels:
    """Adds to the options of a session what the database is told of the running task.

    Args:
        comment_with: What stands in the comments.
        application_name: Whether the transactions show the task's name and id.
    """

    def __init__(self, comment_with: tuple[CommentKey, ...], *, application_name: bool) -> None:
        self._comment_with = comment_with
        self._application_name = application_name

    def of(self, options: SessionOptions) -> SessionOptions:
        """Return the options with the labels of the running task; as they are where none runs."""
        held = at_hand.get()
        while held is not None and not isinstance(held, UnitOfWork):
            held = held.outer
        if held is None:
            return options
        # A direct call has no id.
        values = {"task": held.task.name, "id": held.task.request.id or ""}
        comment = _comment({key: values[key] for key in self._comment_with if values[key]})
        name = f"{values['task']}[{values['id']}]" if self._application_name else None
        return replace(options, application_name=name, comment=comment)


def _comment(values: dict[CommentKey, str]) -> str | None:
    """Return values as an SQL comment that they cannot end.

    Source: https://google.github.io/sqlcommenter/spec/ - keys in their order, values URL-encoded, which leaves no quote, asterisk
    or slash in them.
    """
    pairs = [f"{key}='{quote(values[key], safe='')}'" for key in sorted(values)]
    return f"/*{','.join(pairs)}*/" if pairs else None


class LabelledSource:
    """A source of sessions whose statements carry labels."""

    #: Each session is asked for, so that it can be labelled when it is opened.
    deferred_class: type[Session] | None = None

    def __init__(self, source: Any, labels: Labels) -> None:
        self._source = source
        self._labels = labels

    def of_class(self, class_: type[Session], asker: str) -> LabelledSource:
        """Return a source of labelled sessions of a class."""
        return LabelledSource(self._source.of_class(class_, asker), self._labels)

    def session(self, asks: Asks = NOTHING) -> Any:
        """Return a session of the source."""
        return self._source.session(_LabelledAsks(asks, self._labels))

    def opened(self, options: SessionOptions = NO_OPTIONS) -> Session:
        """Return an opened session of the source."""
        return cast("SessionSource", self._source).opened(self._labels.of(options))

    def engine(self) -> Engine | None:
        """Return the engine of the source."""
        return cast("SessionSource", self._source).engine()


class _LabelledAsks:
    def __init__(self, asks: Asks, labels: Labels) -> None:
        self._asks = asks
        self._labels = labels

    def session_options(self) -> SessionOptions:
        return self._labels.of(self._asks.session_options())
