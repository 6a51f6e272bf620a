"""The worker that a command starts for the time being, as soon as there is something to do."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.progress import Progress

from ragline.app import reading_session, settings
from ragline.following import may_be_there
from ragline.intake import Outcome
from ragline.progress import Progress as Counts
from ragline.progress import measure
from ragline.workers import check_runs, stop, temporary_worker


class Helper:
    """A worker that is started when the first document is in the queue, unless another one may be there.

    Args:
        stack: ends it.
        console: is told when somebody interrupts it.
        processes: how many documents it works on at once.
    """

    def __init__(self, stack: ExitStack, console: Console, *, processes: int) -> None:
        self._stack, self._console, self._processes = stack, console, processes
        self._worker: subprocess.Popen[bytes] | None = None
        self._is_wanted = not may_be_there()

    @property
    def has_started(self) -> bool:
        """Whether it was needed."""
        return self._worker is not None

    def look(self, outcomes: dict[str, Outcome], _: Progress) -> None:
        """Start it when a file that was taken in is the first that waits; called after each file."""
        if self._is_wanted and self._worker is None and next(reversed(outcomes.values())).is_queued:
            self.start()

    def start(self) -> None:
        """Start it now."""
        self._worker = self._stack.enter_context(
            temporary_worker(home=settings.home, processes=self._processes)
        )
        self._stack.push(self._tell)

    def check(self, _: Counts) -> None:
        """See that it is still there.

        Raises:
            RaglineError: it ended by itself, so nothing would happen any more.
        """
        if self._worker is not None:
            check_runs(self._worker, settings.home)

    def end(self) -> None:
        """End it soon, if it was started and no document of anybody's is under way."""
        if self._worker is None:
            return
        with reading_session() as session:
            counts = measure(session)
        if counts.settled == counts.total:
            stop(self._worker, is_idle=True)

    def _tell(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._console.print("The worker finishes the step that it is at; Ctrl-C again ends it at once.")
