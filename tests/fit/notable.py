"""Plans that are carried out at each run: those that show mistakes which few others show."""

from __future__ import annotations

from tests.fit.plans import (
    Attempt,
    Call,
    Clash,
    Commit,
    Hear,
    Plan,
    Read,
    Release,
    Remove,
    Rollback,
    Savepoint,
    Send,
    Write,
)

__all__ = ["NOTABLE"]

_BOTH = (Send("task"), Hear("commit"), Hear("end"), Write())
_BACK = Savepoint(_BOTH, "rolled back")
_CAUGHT = Savepoint(_BOTH, "raised")
_KEPT = Savepoint((*_BOTH, _CAUGHT), "released")


def _plan(*steps: object, ending: str = "returns", **options: object) -> Plan:
    attempt = Attempt(steps, ending)  # type: ignore[arg-type]
    return Plan(attempts=(attempt,), **options)  # type: ignore[arg-type]


NOTABLE = (
    _plan(Write(), _BACK, _KEPT, *_BOTH, tenant="emma"),
    _plan(Write(), _KEPT, _CAUGHT, form="callable", ending="raises", records=True),
    _plan(Clash(), *_BOTH, Commit(), _BACK, form="sessionmaker", commit_on=()),
    _plan(*_BOTH, Rollback(), *_BOTH, form="factory", tenant="anne", outbox=False),
    _plan(Read(), Release(commit=False), *_BOTH, form="engine", once="id"),
    _plan(Write(), Release(commit=False), form="url"),
    _plan(Write(), Release(commit=True), *_BOTH, transient_retries=2, failures=1),
    _plan(*_BOTH, transient_retries=2, failures=2, fails_at="commit", once="key"),
    _plan(Send("task"), Commit(), outbox=False, transient_retries=1, failures=1),
    _plan(Write(), Commit(), once="id"),
    _plan(Write(), Send("delay"), Hear("end"), Hear("end"), ending="raises"),
    _plan(Write(), Send("delay"), Rollback(), Send("delay")),
    _plan(Write(), Remove(), *_BOTH, form="registry", shape="registry", tenant="emma", held=True),
    _plan(Write(), Call(kept=False, how="lend"), form="registry", tenant="anne"),
    _plan(Send("task"), Call(kept=False, how="lend"), Send("task"), outbox=False, once="id"),
    _plan(Rollback(), Call(kept=True, how="apply"), Write(), way="eager", within=True),
    _plan(*_BOTH, ending="soft limit"),
    _plan(*_BOTH, ending="exits"),
    _plan(*_BOTH, ending="ignores", commit_on=("success", "ignore"), once="id"),
    _plan(*_BOTH, ending="rejects", commit_on=("reject",)),
)
