"""Annotations that cannot be resolved at run time, as of a name imported for type checkers only.

Beneath ``injection.py``: nobody knows what these names are, but their text says whether a session
may be meant, and a reference that arrives for one says that an entity was.
"""

from __future__ import annotations

import ast
import inspect as python_inspect
from collections.abc import Iterator, Mapping
from typing import Annotated, ForwardRef, Literal, get_args, get_origin

from .entities import EntityParameter, named_after

__all__ = ["IMPORT_IT", "classes_in", "text_of", "unresolved_parameters"]

#: What to do about one.
IMPORT_IT = (
    "Import the class outside of `if TYPE_CHECKING:` (with ruff, list it in runtime-evaluated"
    " names); with `from __future__ import annotations` it cannot be a function's local name."
)


def text_of(annotation: object) -> str | None:
    """Return the text of an annotation that has stayed one; None for one that is resolved."""
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else None


def classes_in(text: str) -> Iterator[str]:
    """Give the names, without their modules, of the classes that a value may be an instance of.

    Args:
        text: An annotation. What is written in brackets counts for Optional, Union and Annotated
            only: a ``sessionmaker[Session]`` is no session.
    """
    try:
        yield from _classes_of(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        return


def _classes_of(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from classes_in(node.value)
    elif isinstance(node, ast.BinOp):
        yield from _classes_of(node.left)
        yield from _classes_of(node.right)
    elif isinstance(node, ast.Subscript):
        outer = next(_classes_of(node.value), "")
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer not in ("Optional", "Union", "Annotated"):
            yield outer
            return
        for member in inner[:1] if outer == "Annotated" else inner:
            yield from _classes_of(member)


def unresolved_parameters(
    signature: python_inspect.Signature, hints: Mapping[str, object]
) -> tuple[EntityParameter, ...]:
    """Find the parameters of which nobody can tell whether they are annotated with mapped classes.

    Args:
        signature: The signature that callers see.
        hints: The annotations, resolved where they can be.
    """
    found = []
    for index, parameter in enumerate(signature.parameters.values()):
        text = _unresolved_in(hints.get(parameter.name, parameter.annotation))
        if text is not None:
            unknown = EntityParameter("", None, object, unresolved=text)
            found.append(named_after(unknown, parameter, index, signature))
    return tuple(found)


def _unresolved_in(annotation: object) -> str | None:
    """Return the text of what cannot be resolved in an annotation; None if all of it can."""
    text = text_of(annotation)
    if text is not None:
        return text
    # What else is in brackets there is no type.
    origin, inner = get_origin(annotation), get_args(annotation)
    types = inner[:1] if origin is Annotated else () if origin is Literal else inner
    return next(filter(None, map(_unresolved_in, types)), None)
