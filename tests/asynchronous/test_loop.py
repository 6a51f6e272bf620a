"""The event loop of a process goes on whatever breaks into the waiting for one of its coroutines, and wherever it does."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celery_alchemy.requests.event_loop import ProcessLoop
from tests.unit.forking import in_child


@pytest.fixture
def loop() -> Iterator[ProcessLoop]:
    """A loop that is closed at the end."""
    loop = ProcessLoop()
    yield loop
    loop.close()


def is_alive(loop: ProcessLoop) -> bool:
    """Tell whether the loop still runs what it is given; asked without waiting for ever."""
    answered = threading.Event()
    loop.get().call_soon_threadsafe(answered.set)
    return answered.wait(5)


class BreakIn:
    """Raises a soft time limit at the n-th instruction of the waiting thread, as a signal's handler may.

    Args:
        number: Which one.
    """

    def __init__(self, number: int) -> None:
        self.left = number
        self.happened = False

    def __call__(self, frame: FrameType, what: str, value: Any) -> BreakIn:
        frame.f_trace_opcodes = True
        self.left -= 1
        if self.left == 0:
            self.happened = True
            sys.settrace(None)
            raise SoftTimeLimitExceeded(1)
        return self


def break_in_at(loop: ProcessLoop, number: int) -> tuple[bool, str]:
    """Run a short coroutine and break into the waiting for it; return whether that happened, and how the coroutine's run ended."""

    async def work() -> str:
        await asyncio.sleep(0)
        return "returned"

    breaking = BreakIn(number)
    tracing = sys.gettrace()
    try:
        sys.settrace(breaking)
        ended = loop.run(work)
    except SoftTimeLimitExceeded:
        ended = "limited"
    finally:
        sys.settrace(tracing)
    return breaking.happened, ended


@pytest.mark.parametrize("first_use", [False, True], ids=["running", "just started"])
def test_soft_limit_at_any_instruction_leaves_the_loop_running(first_use: bool) -> None:
    """Every instruction of the way from the call to its result, one after the other; also that of the loop's start.

    In a child, whose end takes with it what is left of loops that were broken into while they were
    made, and the error that CPython 3.11 goes on handling for ever after a trace function has
    raised in its handler.
    """
    result = in_child(partial(break_in_everywhere, first_use))

    assert isinstance(result, tuple), result
    number, ends = result
    assert number > 50
    assert ends == {"limited", "returned"}


def break_in_everywhere(first_use: bool) -> tuple[int, set[str]]:
    """Return how many instructions there were, and how the coroutine's runs ended."""
    loop = ProcessLoop()
    number, ends = 0, set()
    happened = True
    while happened:
        number += 1
        if not first_use:
            loop.get()
        happened, ended = break_in_at(loop, number)
        ends.add(ended)
        assert is_alive(loop), f"the loop stands still after the instruction {number}"
        if first_use:
            loop.close()
    loop.close()
    return number, ends


# One that comes in the middle of a garbage collection's callback is reported there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_many_soft_limits_leave_the_loop_running(loop: ProcessLoop) -> None:
    """Real signals at random moments, as the children of a worker get them."""
    loop.get()

    def limit(*_: Any) -> None:
        raise SoftTimeLimitExceeded(1)

    async def work() -> None:
        await asyncio.sleep(0.002)

    before = signal.signal(signal.SIGALRM, limit)
    try:
        limited = 0
        for number in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001 + number * 0.00001)
                loop.run(work)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except SoftTimeLimitExceeded:
                limited += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert limited > 50
    assert is_alive(loop)


def test_coroutine_that_a_limit_cancels_has_ended_when_the_task_goes_on(loop: ProcessLoop) -> None:
    """Its clean-up is waited for: the connection of its session is given back by then."""
    steps: list[str] = []

    async def work() -> None:
        steps.append("began")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            steps.append("cleaned up")

    def limit(*_: Any) -> None:
        raise SoftTimeLimitExceeded(1)

    before = signal.signal(signal.SIGALRM, limit)
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(SoftTimeLimitExceeded):
            loop.run(work)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert steps == ["began", "cleaned up"]
    assert time.monotonic() - started < 30
