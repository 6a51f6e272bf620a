"""A session cannot be had, or cannot do what is asked of it."""

from __future__ import annotations

from .root import CeleryAlchemyError

__all__ = [
    "OPEN_SAVEPOINT",
    "CommitIgnoredError",
    "LocksHeldError",
    "NoSessionError",
    "SessionArgumentError",
    "UncommittedChangesError",
]


class SessionArgumentError(CeleryAlchemyError, TypeError):
    """A caller passed a session in a message.

    Args:
        task_name: The task's registered name.
        parameter: The name of the injected parameter.
    """

    def __init__(self, task_name: str, parameter: str) -> None:
        super().__init__(task_name, parameter)
        self.task_name = task_name
        self.parameter = parameter

    def __str__(self) -> str:
        return (
            f"{self.task_name}() got a value for {self.parameter!r}, which the worker injects: a"
            " session cannot travel in a message. Leave it out. (A test may pass its own session"
            f" in a direct call, {self.task_name.rsplit('.', 1)[-1]}({self.parameter}=session,"
            " ...).)"
        )


class NoSessionError(CeleryAlchemyError, AttributeError):
    """A session was asked for where none is at hand.

    Also an AttributeError, as it is the attribute ``self.session`` that is not there: what looks at
    all attributes of a task, such as ``mock.create_autospec()`` and ``inspect.getmembers()``,
    passes over it.

    Args:
        what: What asked for it: ``"self.session"``, ``"delay_on_commit"``, ...
        remedy: What to do at that place.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy
        # Else Python notes the task here, and ends the traceback with a similar attribute: "Did you
        # mean: ...?"
        self.obj: object = None

    def __str__(self) -> str:
        return f"{self.what} needs a session and none is at hand here. {self.remedy}"


OPEN_SAVEPOINT = "an open SAVEPOINT"


class UncommittedChangesError(CeleryAlchemyError):
    """``released()`` would have lost or published work that was not committed.

    Args:
        what: The kind of work: unflushed objects, uncommitted writes, pending sends or an open
            SAVEPOINT.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        # released(commit=True) refuses a SAVEPOINT too: it cannot be committed without the
        # transaction around it.
        way_out = (
            "Leave the `with session.begin_nested():` block first."
            if self.what == OPEN_SAVEPOINT
            else "Commit first, or use released(session, commit=True)."
        )
        return (
            f"released() found {self.what} in the session. Giving the connection back now would"
            f" lose it. {way_out}"
        )


class LocksHeldError(CeleryAlchemyError):
    """``released()`` would have let go of row locks that somebody may still rely on.

    Args:
        tables: The tables whose rows are locked, as far as they are known.
    """

    def __init__(self, tables: tuple[str, ...]) -> None:
        super().__init__(tables)
        self.tables = tables

    def __str__(self) -> str:
        return (
            f"released() found locked rows of {', '.join(self.tables)} (SELECT ... FOR UPDATE)."
            " Their locks end with the transaction: another task may change the rows before this"
            " one goes on. Lock them after the block, when their values are used; write down who"
            " works on them and use released(session, commit=True); or, if nobody relies on the"
            " locks any more, say released(session, locks=False)."
        )


class CommitIgnoredError(CeleryAlchemyError):
    """A Session class's ``commit()`` returned, and the transaction is still open.

    Args:
        owner: The task's name and the request's id, or what else has committed.
        session_class: The class of the session.
    """

    def __init__(self, owner: str, session_class: str) -> None:
        super().__init__(owner, session_class)
        self.owner = owner
        self.session_class = session_class

    def __str__(self) -> str:
        return (
            f"{self.owner} has committed nothing: commit() of {self.session_class} returned, and"
            " the transaction is still open. It is rolled back. Let commit() call"
            " super().commit(), or give the library a Session class that commits; a test that must"
            " not commit passes its session, task(session=...)."
        )
