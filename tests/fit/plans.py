"""Plans: what a task does, with which session, how it is run and how it ends; drawn at random.

``bodies.py`` carries a plan out in a task, ``model.py`` says what must come of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from hypothesis import strategies as st

__all__ = [
    "FORMS",
    "Attempt",
    "Block",
    "Call",
    "Clash",
    "Commit",
    "Ending",
    "Hear",
    "Plan",
    "Read",
    "Release",
    "Remove",
    "Rollback",
    "Savepoint",
    "Send",
    "Step",
    "Write",
    "plans",
]

Ending = Literal[
    "returns",
    "duplicate",
    "raises",
    "retries",
    "ignores",
    "rejects",
    "soft limit",
    "exits",
]

#: The forms of session, and whether their tasks are plain ones (False) or ``async def`` (True).
FORMS: dict[str, tuple[bool, ...]] = {
    "url": (False, True),
    "engine": (False,),
    "sessionmaker": (False,),
    "registry": (False,),
    "callable": (False,),
    "factory": (False,),
    "async engine": (False, True),
    "async sessionmaker": (False, True),
    "async registry": (True,),
}


@dataclass(frozen=True)
class Write:
    """Add a row; flushed at once, or left to the next flush."""

    flushed: bool = True


@dataclass(frozen=True)
class Read:
    """Count the rows."""


@dataclass(frozen=True)
class Commit:
    """Commit as a body may."""


@dataclass(frozen=True)
class Rollback:
    """Take back what is not committed."""


@dataclass(frozen=True)
class Release:
    """Give the connection back, with or without a commit."""

    commit: bool


@dataclass(frozen=True)
class Send:
    """Send a task on commit, by its own method or by ``enqueue``; or plainly."""

    by: Literal["task", "enqueue", "delay"]


@dataclass(frozen=True)
class Hear:
    """Have a callable run, by ``on_commit`` or ``on_end``."""

    on: Literal["commit", "end"]


@dataclass(frozen=True)
class Block:
    """Write and send in an ``alchemy.begin()`` block of its own, which commits or raises."""

    kept: bool


@dataclass(frozen=True)
class Call:
    """Run another task, which writes and sends, and returns or raises.

    Attributes:
        kept: It returns.
        how: As a function, as one with the caller's session, or eagerly.
    """

    kept: bool
    how: Literal["call", "lend", "apply"]


@dataclass(frozen=True)
class Savepoint:
    """Do steps in a SAVEPOINT: released, rolled back, or left by an error that the body catches."""

    steps: tuple[Step, ...]
    ending: Literal["released", "rolled back", "raised"]


@dataclass(frozen=True)
class Clash:
    """Have the database refuse rows in a SAVEPOINT, and go on."""


@dataclass(frozen=True)
class Remove:
    """Take the session out of the application's registry; the next use makes another."""


_Ends: TypeAlias = Commit | Rollback | Release | Remove
Step: TypeAlias = Write | Read | Send | Hear | Block | Call | Savepoint | Clash | _Ends


@dataclass(frozen=True)
class Attempt:
    """One attempt of the task.

    Attributes:
        steps: What it does.
        ending: How it ends.
        in_savepoint: It ends inside of a SAVEPOINT that nobody has ended.
    """

    steps: tuple[Step, ...]
    ending: Ending
    in_savepoint: bool = False


@dataclass(frozen=True)
class Plan:
    """One example.

    Attributes:
        form: Where the session comes from.
        is_async: The task is an ``async def``.
        shape: How the body gets it: a parameter, ``self.session``, or the application's registry.
        way: Who runs the task: a worker's tracer, ``apply()``, or a direct call.
        outbox: The Alchemy keeps messages.
        tenant: For whom it works; None for nobody in particular.
        by_path: The tenant's schema comes from the ``search_path``, not from a map.
        once: The task takes effect once; by its id, or by a key of its own.
        records: The task records its failure.
        commit_on: The outcomes that commit.
        transient_retries: How often it may run again.
        failures: How many runs fail with what may pass.
        fails_at: Where they fail.
        held: The registry's session outside of the task has a pending object.
        within: The task is run inside of an ``alchemy.begin()`` block, which has work of its own.
        attempts: The first one, and the one after a retry.
    """

    form: str = "url"
    is_async: bool = False
    shape: str = "parameter"
    way: str = "delivered"
    outbox: bool = True
    tenant: str | None = None
    by_path: bool = False
    once: str = ""
    records: bool = False
    commit_on: tuple[str, ...] = ("success",)
    transient_retries: int = 0
    failures: int = 0
    fails_at: str = "body"
    held: bool = False
    within: bool = False
    attempts: tuple[Attempt, ...] = (Attempt((), "returns"),)


_INSIDE: st.SearchStrategy[Any] = st.one_of(
    st.builds(Write, st.booleans()),
    st.just(Read()),
    st.builds(Send, st.sampled_from(["task", "enqueue", "delay"])),
    st.builds(Hear, st.sampled_from(["commit", "end"])),
    st.builds(Call, st.booleans(), st.sampled_from(["call", "lend", "apply"])),
    st.builds(Block, st.booleans()),
    st.just(Clash()),
)
_SAVEPOINT_ENDS = st.sampled_from(["released", "released", "rolled back", "raised"])
_SAVEPOINTS = st.recursive(
    st.builds(Savepoint, st.lists(_INSIDE, min_size=1, max_size=3).map(tuple), _SAVEPOINT_ENDS),
    lambda inner: st.builds(
        Savepoint,
        st.lists(_INSIDE | inner, min_size=1, max_size=3).map(tuple),
        _SAVEPOINT_ENDS,
    ),
    max_leaves=3,
)
_STEPS = st.lists(
    st.one_of(
        _INSIDE,
        _SAVEPOINTS,
        st.just(Commit()),
        st.just(Rollback()),
        st.just(Remove()),
        st.builds(Release, st.booleans()),
    ),
    min_size=2,
    max_size=8,
)
_ENDINGS: tuple[Ending, ...] = (
    "returns",
    "returns",
    "returns",
    "duplicate",
    "raises",
    "retries",
    "ignores",
    "rejects",
    "soft limit",
    "exits",
)


@st.composite
def plans(draw: st.DrawFn, database: str, *, has_async: bool = True) -> Plan:
    """Draw a plan that an application could have on a database, with or without an async driver."""
    allowed = {False, True} if has_async else {False}
    kinds = {form: sorted(allowed.intersection(both)) for form, both in FORMS.items()}
    form = draw(st.sampled_from([form for form in sorted(kinds) if kinds[form]]))
    once = draw(st.sampled_from(["", "", "id", "key"])) if form != "factory" else ""
    ways = ["delivered", "eager"] if once == "id" else ["delivered", "eager", "direct"]
    way = draw(st.sampled_from(ways))
    may_end = list(_ENDINGS)
    if way == "direct":
        may_end.remove("retries")
    may_commit = ["success", "ignore"] if once else ["success", "retry", "ignore", "reject"]
    commit_on = draw(st.lists(st.sampled_from(may_commit[1:]), unique=True))
    shapes = ["parameter", "attribute"] + ["registry"] * 2 * form.endswith("registry")
    shape = draw(st.sampled_from(shapes))
    unwelcome: list[Step] = [] if shape == "registry" else [Remove()]
    if once and draw(st.integers(0, 3)):
        # They end most once tasks before their end.
        unwelcome += [Commit(), Release(commit=True), Release(commit=False)]
    attempts = [draw(_attempts(unwelcome, may_end))]
    if attempts[0].ending == "retries":
        may_end.remove("retries")
        attempts.append(draw(_attempts(unwelcome, may_end)))
    tenant = draw(st.sampled_from([None, "emma", "anne"]))
    # A once task whose success does not commit is none.
    success = ["success"] if once or draw(st.integers(0, 7)) else []
    plan = Plan(
        form=form,
        is_async=draw(st.sampled_from(kinds[form])),
        shape=shape,
        way=way,
        outbox=draw(st.booleans()),
        tenant=tenant,
        by_path=database == "postgresql" and tenant is not None and draw(st.booleans()),
        once=once,
        records=draw(st.booleans()),
        commit_on=tuple(success + commit_on),
        transient_retries=draw(st.integers(0, 2)),
        failures=draw(st.sampled_from([0, 0, 0, 1, 2])),
        fails_at=draw(st.sampled_from(["body", "commit"])),
        held=draw(st.booleans()),
        within=way != "delivered" and draw(st.booleans()),
        attempts=tuple(attempts),
    )
    if database == "mariadb":
        # What was refused stays locked until the transaction ends, also after its SAVEPOINT.
        unwanted = _is_clash if draw(st.booleans()) else _needs_another
        return _changed(plan, lambda steps: _without(steps, unwanted))
    return _changed(plan, _alone) if database == "sqlite" else plan


@st.composite
def _attempts(draw: st.DrawFn, unwelcome: list[Step], endings: list[Ending]) -> Attempt:
    steps = tuple(step for step in draw(_STEPS) if step not in unwelcome)
    return Attempt(steps, draw(st.sampled_from(endings)), draw(st.booleans()))


def _changed(plan: Plan, change: Callable[[tuple[Step, ...]], tuple[Step, ...]]) -> Plan:
    changed = [replace(attempt, steps=change(attempt.steps)) for attempt in plan.attempts]
    return replace(plan, attempts=tuple(changed))


def _alone(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Leave out what waits for itself: SQLite has one writer, and a body may be that one."""
    found: list[Step] = []
    for step in steps:
        if isinstance(step, Savepoint):
            found.append(replace(step, steps=_without(step.steps, _needs_another)))
        elif _needs_another(step):
            found += [Rollback(), step]
        else:
            found.append(step)
    return tuple(found)


def _without(steps: tuple[Step, ...], unwanted: Callable[[Step], bool]) -> tuple[Step, ...]:
    """Leave out steps, in SAVEPOINTs too."""
    kept: list[Step] = []
    for step in steps:
        if isinstance(step, Savepoint):
            kept.append(replace(step, steps=_without(step.steps, unwanted)))
        elif not unwanted(step):
            kept.append(step)
    return tuple(kept)


def _is_clash(step: Step) -> bool:
    return isinstance(step, Clash)


def _needs_another(step: Step) -> bool:
    return isinstance(step, Block) or (isinstance(step, Call) and step.how != "lend")
