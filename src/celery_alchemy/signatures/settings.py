"""What the options of an Alchemy may be: checked once, when it is made.

Underneath ``alchemy.py``, which declares the options and documents them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from celery import Celery
from sqlalchemy import URL, Engine
from sqlalchemy.orm import scoped_session, sessionmaker

from ..errors import ConfigurationError
from ..messages.celery_types import App

__all__ = [
    "PublishInTransaction",
    "engine_or_none",
    "flag",
    "known_publishing",
    "names",
    "positive",
    "positive_or_none",
    "refuse_bind_as_app",
    "refuse_unfit_app",
    "schema_or_none",
    "whole",
]

PublishInTransaction = Literal["warn", "raise", "defer", "allow"]


def refuse_bind_as_app(app: object) -> None:
    """Refuse what is a bind in the place of the app.

    Raises:
        ConfigurationError: It is one.
    """
    if isinstance(app, (str, URL, Engine, sessionmaker, scoped_session)):
        raise ConfigurationError(
            f"The first argument of Alchemy is a {type(app).__name__!r}, not the Celery app.",
            "Write Alchemy(app, url), or Alchemy(bind=url) and init_app(app) later.",
        )


def known_publishing(given: str) -> str:
    """Return the option ``publish_in_transaction``.

    Raises:
        ConfigurationError: It is none of the known words.
    """
    known = get_args(PublishInTransaction)
    if given not in known:
        raise ConfigurationError(
            f"publish_in_transaction={given!r} is unknown.",
            f"Use one of {', '.join(map(repr, known))}.",
        )
    return given


def positive(name: str, value: float) -> float:
    """Return an option that is a positive number.

    Raises:
        ConfigurationError: It is none.
    """
    given: object = value
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given > 0:
        raise ConfigurationError(
            f"{name}={value!r} is not a positive number.", "Give a number greater than 0."
        )
    return value


def whole(name: str, value: float) -> int:
    """Return an option that is a whole positive number.

    Raises:
        ConfigurationError: It is none.
    """
    if not float(positive(name, value)).is_integer():
        raise ConfigurationError(
            f"{name}={value!r} is not a whole number.", "Give a whole number greater than 0."
        )
    return int(value)


def flag(name: str, value: bool) -> bool:
    """Return an option that is switched on or off.

    Raises:
        ConfigurationError: It is neither True nor False; a text such as ``"no"`` would be on.
    """
    given: object = value
    if not isinstance(given, bool):
        raise ConfigurationError(f"{name}={value!r} is no switch.", "Give True or False.")
    return value


def names(option: str, value: Iterable[str]) -> tuple[str, ...]:
    """Return an option that is several names.

    Raises:
        ConfigurationError: It is a bare string, no iterable, or holds something else than names.
    """
    given: object = value
    is_several = isinstance(given, Iterable) and not isinstance(given, str)
    members = tuple(value) if is_several else ()
    if not is_several or not all(isinstance(member, str) for member in members):
        raise ConfigurationError(
            f"{option}={value!r} is not a tuple of names.", f'Write {option}=("billing.*",).'
        )
    return members


def schema_or_none(schema: str | None) -> str | None:
    """Return the option ``schema``.

    Raises:
        ConfigurationError: It is no name.
    """
    given: object = schema
    if given is not None and not (isinstance(given, str) and given.strip()):
        raise ConfigurationError(
            f"schema={schema!r} is no name of a schema.",
            "Give its name, or leave it out for the one that the database gives a new connection.",
        )
    return schema


def positive_or_none(name: str, value: float | None) -> float | None:
    """Return an option that is a positive number, or None.

    Raises:
        ConfigurationError: It is neither.
    """
    return None if value is None else positive(name, value)


def refuse_unfit_app(app: object, served: App | None) -> None:
    """Refuse an app that an Alchemy cannot serve.

    Args:
        app: What was given for it.
        served: The app that the Alchemy serves already; None for none.

    Raises:
        ConfigurationError: It is no app, or another one.
    """
    if not isinstance(app, Celery):
        raise ConfigurationError(
            f"An Alchemy was given {type(app).__name__!r} for its app, which is no Celery app.",
            "Write Alchemy(celery_app, url), or alchemy.init_app(celery_app).",
        )
    if served is not None and served is not app:
        raise ConfigurationError(
            f"This Alchemy serves the app {served.main!r} already.",
            "Make another Alchemy for another app.",
        )


def engine_or_none(engine: object) -> Engine | None:
    """Return the option ``engine``.

    Raises:
        ConfigurationError: It is no sync Engine.
    """
    if engine is None or isinstance(engine, Engine):
        return engine
    raise ConfigurationError(
        f"engine is a {type(engine).__name__!r}.",
        "Give the sync Engine of the database that holds the library's table.",
    )
