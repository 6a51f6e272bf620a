"""Errors derive from one base, cross processes, and hold no password."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
import types
import typing
from typing import Any, Union

import pytest

from celery_alchemy import Alchemy, CeleryAlchemyError, ConfigurationError, errors
from celery_alchemy.testing import EndlessRunError, LeakError, PointNotReachedError

MODULES = [importlib.import_module(found.name) for found in pkgutil.iter_modules(errors.__path__, f"{errors.__name__}.")]
CLASSES: list[type[Exception]] = [
    value
    for module in MODULES
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module.__name__
]


def example(class_: type[Exception]) -> Exception:
    """Make an exception, with values of the types that its class annotates."""
    if class_.__init__ is Exception.__init__:
        return class_("something")
    hints = typing.get_type_hints(class_.__init__)
    names = list(inspect.signature(class_.__init__).parameters)[1:]
    return class_(*(_value(name, hints.get(name, str)) for name in names))


def _value(name: str, hint: Any) -> Any:
    kind = typing.get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return _value(name, typing.get_args(hint)[0])
    values = {int: 3, float: 2.5, bool: True, tuple: (f"{name} one", f"{name} two"), bytes: b"x"}
    return values.get(kind, f"the {name}")


def test_every_class_is_public() -> None:
    """An error that users can meet can be imported and caught by name."""
    assert sorted(class_.__name__ for class_ in CLASSES) == sorted(errors.__all__)
    assert len(CLASSES) >= 12


#: Errors for pytest, which are AssertionErrors too.
KIT: list[type[Exception]] = [EndlessRunError, LeakError, PointNotReachedError]


@pytest.mark.parametrize("class_", [*CLASSES, *KIT])
def test_error_survives_pickling_and_copying(class_: type[Exception]) -> None:
    """Class, text and every field arrive on the other side."""
    error = example(class_)

    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is class_
        assert str(twin) == str(error)
        assert twin.args == error.args
        assert vars(twin) == vars(error)


@pytest.mark.parametrize("class_", [*CLASSES, *KIT])
def test_error_has_one_base_and_a_text_with_its_values(class_: type[Exception]) -> None:
    """Users catch CeleryAlchemyError, a warning is a UserWarning; what it was made with is in its text."""
    error = example(class_)
    text = str(error)

    assert isinstance(error, CeleryAlchemyError | UserWarning)
    assert all(str(value) in text for value in error.args if isinstance(value, str))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+nodriver://anne:pa55word@host/shop",
        "nodialect://anne:pa55word@host/shop",
        "anne:pa55word@host",
        "postgresql://anne:pa55word@host:port/shop",
        "oracle+oracledb://anne:pa55word@host/shop",
    ],
)
def test_no_password_in_the_text_of_a_wrong_url(url: str) -> None:
    """Neither in the message nor in the chain of causes that a log prints with it."""
    with pytest.raises(ConfigurationError) as raised:
        Alchemy(bind=url)

    cause: BaseException | None = raised.value
    while cause is not None:
        assert "pa55word" not in f"{cause} {cause!r} {cause.args}"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
