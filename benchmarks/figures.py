"""A promise, what was measured of it, and whether it holds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Figure:
    """One promise, and what was measured of it.

    Attributes:
        name: What is measured, and beside what.
        most: The promise, where it is the most that the figure may be.
        least: The promise, where it is the least. With neither it is there for comparison.
        measured: One value for each round.
    """

    name: str
    most: float | None = None
    least: float | None = None
    measured: list[float] = field(default_factory=list)

    @property
    def interval(self) -> tuple[float, float]:
        """Between which values the median lies, at 95%, by drawing rounds again and again."""
        draw = random.Random(7)
        medians = sorted(median(draw.choices(self.measured, k=len(self.measured))) for _ in range(500))
        return medians[12], medians[487]

    @property
    def verdict(self) -> str:
        """Say whether the promise holds."""
        low, high = self.interval
        figure = median(self.measured)
        if self.most is not None:
            return "MISSED" if low > self.most else "holds" if figure <= self.most else "unclear"
        if self.least is not None:
            return "MISSED" if high < self.least else "holds" if figure >= self.least else "unclear"
        return ""

    def as_row(self) -> list[str]:
        """Return it as a row of a table."""
        low, high = self.interval
        values = [f"{median(self.measured):.2f}", f"{low:.2f}-{high:.2f}"]
        promise = "" if self.most is None else f"<= {self.most:g}"
        promise = promise if self.least is None else f">= {self.least:g}"
        return [self.name, promise, *values, self.verdict]


def take_turns(acts: dict[str, Callable[[], float]], rounds: int, note: Callable[[dict[str, float]], None]) -> None:
    """Let each act, in another order in each round, and note what each round has given."""
    order = list(acts)
    for name in order:
        acts[name]()
    for _ in range(rounds):
        random.shuffle(order)
        note({name: acts[name]() for name in order})
