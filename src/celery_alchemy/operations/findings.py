"""What a check has found.

Beneath the checks (``check.py``) and the command line, which prints findings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to change.

    Attributes:
        code: A short name, stable across releases.
        level: ``"error"``: a guarantee does not hold, or tasks will fail. ``"warning"``: worth a
            look.
        reason: What was found and what it leads to.
        fix: What to change.
    """

    code: str
    level: Literal["error", "warning"]
    reason: str
    fix: str

    def as_dict(self) -> dict[str, str]:
        """Return the finding as plain values."""
        return asdict(self)
