"""Ids for the tasks that a message carries along: its callbacks, the rest of its chain, its chord.

Beneath ``recording.py``, which gives them when a message is made: a parent that is delivered twice
sends its callbacks under the same ids then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import overload

from celery.utils import uuid

from .celery_types import Fields

__all__ = ["body_with_fixed_ids", "with_fixed_ids"]


def body_with_fixed_ids(body: object) -> object:
    """Return a task's body in which every callback has an id; any other body as it is."""
    if not (isinstance(body, tuple) and len(body) == 3):
        return body
    args, kwargs, embedded = body
    embedded = dict(embedded)
    for name in ("callbacks", "errbacks", "chain"):
        if embedded.get(name):
            embedded[name] = [with_fixed_ids(signature) for signature in embedded[name]]
    if embedded.get("chord"):
        embedded["chord"] = with_fixed_ids(embedded["chord"])
    return args, kwargs, embedded


@overload
def with_fixed_ids(signature: Fields) -> Fields: ...


@overload
def with_fixed_ids(signature: object) -> object: ...


def with_fixed_ids(signature: object) -> object:
    """Return a copy of a serialised signature in which every task, at any depth, has an id."""
    if not isinstance(signature, Mapping) or "task" not in signature:
        return signature
    fixed = dict(signature)
    options = fixed["options"] = dict(fixed.get("options") or {})
    inner = fixed["kwargs"] = dict(fixed.get("kwargs") or {})
    if fixed.get("subtask_type") is None:
        options.setdefault("task_id", uuid())
    else:
        for name in ("tasks", "header"):
            if isinstance(inner.get(name), (list, tuple)):
                inner[name] = [with_fixed_ids(member) for member in inner[name]]
            elif isinstance(inner.get(name), Mapping):
                inner[name] = with_fixed_ids(inner[name])
        if inner.get("body"):
            inner["body"] = with_fixed_ids(inner["body"])
    for name in ("link", "link_error"):
        if options.get(name):
            linked = options[name] if isinstance(options[name], (list, tuple)) else [options[name]]
            options[name] = [with_fixed_ids(member) for member in linked]
    return fixed
