"""The pytest plugin: the testing kit as fixtures.

At the edge: pytest finds it by its entry point, and nothing else imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from sqlalchemy.orm import Session

from ..messages.celery_types import AnyTask
from . import faults
from .faults import CrashAt
from .joining import Joined, joined
from .leaks import no_leaks as check_leaks
from .points import Point
from .process import WorkerProcess
from .sending import Sent, captured

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from ..alchemy import Alchemy


@pytest.fixture
def alchemy() -> Alchemy:
    """Your Alchemy: define a fixture of this name in your ``conftest.py``."""
    raise pytest.UsageError(
        "The fixtures of celery-alchemy need to know your Alchemy. Define in conftest.py:\n\n"
        "    @pytest.fixture\n    def alchemy():\n        return shop.alchemy\n"
    )


@pytest.fixture
def joined_transaction(alchemy: Alchemy) -> Iterator[Joined]:
    """Everything that the sessions of the Alchemy commit is rolled back at the end of the test."""
    with joined(alchemy) as transaction:
        yield transaction


@pytest.fixture
def alchemy_session(joined_transaction: Joined) -> Session:
    """A session for the test itself, in the transaction that all others join."""
    return joined_transaction.session()


@pytest.fixture
def alchemy_async_session(joined_transaction: Joined) -> AsyncSession:
    """An AsyncSession for the test itself, in the transaction that all others join."""
    return joined_transaction.async_session()


@pytest.fixture
def sent(alchemy: Alchemy) -> Iterator[Sent]:
    """The tasks that were sent, instead of the broker; ``sent.run()`` runs them."""
    with captured(alchemy) as tasks:
        yield tasks


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Sessions and connections that the test opens are closed at its end."""
    with check_leaks():
        yield


class MakeCrash(Protocol):
    """``crash_at`` of a test's Alchemy."""

    def __call__(
        self, point: Point | str, *, task: AnyTask | str | None = None
    ) -> AbstractContextManager[CrashAt]: ...


@pytest.fixture
def crash_at(alchemy: Alchemy) -> MakeCrash:
    """A context manager that kills the process that comes to a point first.

    A point is ``"COMMIT, after"``, for example.
    """
    return partial(faults.crash_at, alchemy)


@pytest.fixture
def deliver_twice() -> Callable[[], AbstractContextManager[None]]:
    """A context manager inside of which every task is delivered twice."""
    return faults.deliver_twice


@pytest.fixture
def worker_process(tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Starts real workers: ``worker_process("shop.tasks")``.

    They are killed at the end of the test.
    """
    with ExitStack() as stack:

        def start(app: str, **options: Any) -> WorkerProcess:
            return stack.enter_context(WorkerProcess(app, tmp_path, **options))

        yield start
