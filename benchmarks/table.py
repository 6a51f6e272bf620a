"""The figures of ``overhead.py`` as a table, and what the library promises of them."""

from __future__ import annotations

from dataclasses import dataclass

LABELS = {
    "plain": "no session",
    "hand_written": "by hand: with Session(engine)",
    "hand_written_sessionmaker": "by hand: sessionmaker",
    "before_start": "before_start / after_return",
    "dishka": "dishka",
    "modern_di": "modern-di-celery",
    "wireup": "wireup",
    "flask": "Flask-SQLAlchemy in FlaskTask",
    "injected": "celery-alchemy: session parameter",
    "self_session": "celery-alchemy: self.session",
}
OURS = ("injected", "self_session")
INTEGRATIONS = ("dishka", "modern_di", "wireup", "flask")
#: Microseconds that a session may cost more than the reference: than no session where it is not touched, than one by hand else.
BAR = {"untouched": 1.5, "select": 3.0, "insert": 3.0}


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        contender: A key of LABELS.
        median_us: Microseconds for one task, waiting included, median of all rounds.
        min_us: The same, best round.
        more_us: CPU microseconds more than the reference, best round against best round, median of the sets of processes.
        ratio: Times the reference's CPU time, likewise.
    """

    contender: str
    median_us: float
    min_us: float
    more_us: float
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """All contenders doing the same work on the same database, against one of them."""

    database: str
    work: str
    reference: str
    rows: list[Row]

    def as_text(self) -> str:
        """Return a Markdown table, cheapest first."""
        lines = [
            f"### {self.database}, session {self.work}",
            "",
            f"| {'':34} | median us | min us | more us | ratio |",
            f"|{'-' * 36}|----------:|-------:|--------:|------:|",
        ]
        lines += [
            f"| {LABELS[row.contender]:34} | {row.median_us:9.1f} | {row.min_us:6.1f} | {row.more_us:+7.1f} | {row.ratio:5.2f} |"
            for row in sorted(self.rows, key=lambda row: row.more_us)
        ]
        return "\n".join(lines) + "\n"

    def verdict(self) -> str:
        """Say whether the promises hold: the bar, and cheaper than every other integration."""
        more = {row.contender: row.more_us for row in self.rows}
        bar = BAR[self.work]
        parts = []
        for ours in OURS:
            if ours in more:
                others = [LABELS[name] for name in INTEGRATIONS if more.get(name, more[ours]) < more[ours]]
                held = "holds" if more[ours] <= bar and not others else "FAILS"
                dearer = f"; cheaper: {', '.join(others)}" if others else ""
                parts.append(f"{LABELS[ours]} {more[ours]:+.2f} us, at most {bar:+.1f}: {held}{dearer}")
        return f"{self.database}, {self.work}: " + " | ".join(parts)
