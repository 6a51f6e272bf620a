"""Texts for people, such as an error's, in a form that every database takes.

Beneath all that writes into the outbox's table: a text that the database refused would keep its row
from being settled, and with it all rows of its batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlalchemy.exc import StatementError

__all__ = ["MAX_LENGTH", "error_text", "note_step", "storable"]

logger: logging.Logger = logging.getLogger("celery_alchemy.error_texts")

#: Characters of an error that are kept.
MAX_LENGTH = 10_000


def storable(text: str, max_length: int = MAX_LENGTH) -> str:
    """Return a text as every database takes it.

    It is shortened, and what a database refuses is written as an escape.

    No text of PostgreSQL holds a NUL, and half of a surrogate pair has no UTF-8.

    Args:
        text: Any text.
        max_length: Characters that are kept.
    """
    text = text[:max_length].replace("\0", "\\0")
    return text.encode("utf-8", "backslashreplace").decode()[:max_length]


#: How the note begins that says in which step an error came up.
_IN_STEP = "Failed in step "


def note_step(exc: BaseException, name: str) -> None:
    """Write on an error in which step it came up, for tracebacks and for ``error_text()``."""
    if _step_of(exc) is not None:
        return
    note = f"{_IN_STEP}{name!r}"
    add_note: Callable[[str], None] | None = getattr(exc, "add_note", None)  # Python 3.11
    if add_note is not None:
        add_note(note)
    else:
        vars(exc)["__notes__"] = [*getattr(exc, "__notes__", ()), note]


def _step_of(exc: BaseException) -> str | None:
    notes = getattr(exc, "__notes__", ())
    return next((note.removeprefix(_IN_STEP) for note in notes if note.startswith(_IN_STEP)), None)


def error_text(exc: BaseException) -> str:
    """Name an error for people.

    The parameters of a statement, which SQLAlchemy's own text repeats, are left out.
    """
    cause = exc.orig if isinstance(exc, StatementError) and exc.orig is not None else exc
    try:
        said = str(cause)
    except Exception:
        logger.warning("A %s cannot be written as text", type(cause).__name__, exc_info=True)
        said = "(its text cannot be had)"
    step = _step_of(exc)
    where = "" if step is None else f" in step {step}"
    return storable(f"{type(exc).__name__}{where}: {said}")
