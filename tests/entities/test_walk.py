"""Looking for entities in the arguments of a call costs less than writing the arguments as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from celery_alchemy import task as task_module
from celery_alchemy.signatures.entities import encoded
from tests.collecting import without_collector
from tests.entities.conftest import MakeLibrary

VECTORS = [[float(number) / 7 for number in range(1536)] for _ in range(50)]


def ratio(arguments: Any) -> float:
    """Return the shortest of several walks in parts of the shortest writing as JSON, both in seconds of this thread's own work.

    The two take turns, because the processor's speed changes with what else runs.
    """
    walks, dumps = [], []
    with without_collector():
        for _ in range(20):
            walks.append(_own_seconds(lambda: encoded(arguments, lambda class_: True)))
            dumps.append(_own_seconds(lambda: json.dumps(arguments)))
    return min(walks) / min(dumps)


def _own_seconds(act: Callable[[], Any]) -> float:
    began = time.thread_time()
    act()
    return time.thread_time() - began


def test_embeddings_are_walked_in_a_fraction_of_what_json_takes() -> None:
    """A twentieth was measured; the arguments come back as they are."""
    arguments = (VECTORS, {"rows": VECTORS})

    assert encoded(arguments, lambda class_: True) is arguments
    assert ratio(arguments) < 1 / 4


def test_rows_of_a_few_values_are_walked_together() -> None:
    """Ten thousand rows take as many steps of Python as ten: half the time of JSON was measured for short lists, a fifth for dicts.

    Steps are counted: the time is that of the memory which the lists are put into, twice as much in a process that has none left.
    """

    def steps(count: int) -> int:
        rows = [[number, "x", [number, number]] for number in range(count)]
        arguments = (rows, {"rows": [{"id": number, "name": "x"} for number in range(count)]})
        modules: list[str] = []
        sys.setprofile(lambda frame, event, argument: modules.append(frame.f_globals["__name__"]))
        try:
            walked = encoded(arguments, lambda class_: True)
        finally:
            sys.setprofile(None)
        assert walked is arguments
        # A garbage collection may come in between, and others may be told of it.
        return sum(module.startswith("celery_alchemy.") for module in modules)

    assert steps(10) > 5
    assert steps(10_000) == steps(10)


def test_arguments_that_hold_themselves_are_refused() -> None:
    """As JSON refuses them: the walk comes to an end."""
    circle: list[Any] = []
    circle += [circle, circle]

    with without_collector(), pytest.raises(RecursionError):
        encoded(circle, lambda class_: True)


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("outbox", [False, True])
def test_arguments_of_a_send_on_commit_are_walked_once(
    make_library: MakeLibrary, outbox: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a plain delay()."""
    library = make_library(outbox=outbox)
    library.alchemy.create_tables()
    walked: list[Any] = []

    def count(arguments: Any, allowed: Callable[[type], bool]) -> Any:
        walked.append(arguments)
        return encoded(arguments, allowed)

    @library.task()
    def take(vectors: list[list[float]]) -> None: ...

    monkeypatch.setattr(task_module, "encoded", count)
    with library.alchemy.begin():
        take.delay_on_commit(VECTORS)

    assert len(walked) == 1
