"""Progress bars as all commands show them; what is left of them on the screen is true and still."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column


class _Spinner(SpinnerColumn):
    """Turns while work goes on: one that stands still on the screen would say that it still does."""

    is_over = False

    def render(self, task: Task) -> RenderableType:
        """A frame, or room for one."""
        return self.finished_text if self.is_over else super().render(task)


class Bars(Progress):
    """Bars for a console; where there is little room the bars give way, not the numbers."""

    def __init__(self, console: Console) -> None:
        self._spinner = _Spinner()
        super().__init__(
            self._spinner,
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Draw them for the last time: how far it came, without what has no number."""
        self._spinner.is_over = True
        for task in self.tasks:
            if task.total is None:
                self.update(task.id, visible=False)
        super().__exit__(kind, error, traceback)
