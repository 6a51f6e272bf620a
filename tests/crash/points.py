"""The names of the moments at which something dies, and what dies there.

A point is `who: what, before|after`. Producers and relays are forked for one fault each; in a worker the fault travels with the task
and strikes at its first delivery.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

#: Starts after which the poison task is dead.
POISON_DELIVERIES = 3

#: "kill": SIGKILL of the process itself. "kill worker": SIGKILL of the parent of a pool's child, which Celery has the kernel
#: kill with it. "wipe": the same, and the broker has lost every message when the next worker starts.
#: "cut": the database cuts the connection; right after a COMMIT, its answer does not arrive. "broker": the broker refuses, or
#: right after a publish its confirm does not arrive.
Action = Literal["kill", "kill worker", "wipe", "cut", "broker"]

# RabbitMQ alone confirms: after the message was sent, and before the confirm arrived.
CONFIRM_POINTS = ("producer: confirm, before", "relay: confirm, before")
_SENDING = ("insert", "insert's COMMIT", "publish", "settle", "settle's COMMIT")
# The database cannot cut what is not connected; a body is cut at the statement that follows it.
_WITHOUT_CONNECTION = ("publish", "confirm", "body", "work", "result")
#: How many of the kills of whole workers are made: each needs another worker, which takes a second or two.
Extent = Literal["few", "most", "every"]
_WORKERS_DIE_AT = {
    "few": ("insert's COMMIT, after",),
    "most": (
        "start, before",
        "start's COMMIT, after",
        "body, after",
        "insert's COMMIT, before",
        "insert's COMMIT, after",
        "publish, after",
        "settle's COMMIT, after",
        "result, before",
        "result, after",
        "work, after",
        "keep's COMMIT, before",
        "keep's COMMIT, after",
        "forget, after",
    ),
}
#: At how many points of a step the broker is wiped.
_WIPED_AT = {"few": ("keep's COMMIT, after",), "most": ("keep's COMMIT, before", "keep's COMMIT, after")}


def _around(who: str, steps: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{who}: {step}, {when}" for step in steps for when in ("before", "after"))


PRODUCER_POINTS = _around("producer", _SENDING)
RELAY_POINTS = _around("relay", ("claim", "claim's COMMIT", "publish", "settle", "settle's COMMIT"))
CHILD_POINTS = _around(
    "child",
    ("start", "start's COMMIT", "body", "complete", *_SENDING, "result"),
)
#: In a task that always fails, whose ``record_failure`` keeps the promise.
DEATH_POINTS = _around("child", ("die", "die's COMMIT"))
#: In a task of steps: it reads what is recorded, does the work of a step, keeps what that returned, and forgets all of it at its end.
_OF_STEPS = ("load", "work", "keep", "keep's COMMIT", "forget")
STEP_POINTS = _around("child", _OF_STEPS)
#: The same in an ``async def`` task.
ASYNC_STEP_POINTS = _around("coroutine", _OF_STEPS)
PARENT_POINTS = _around("parent", ("acknowledge",))

# Where the database is the broker nothing is published, and the worker's thread takes messages and ends deliveries. Which message
# dies is known when it has been taken.
SENT_BY_COMMIT_POINTS = _around("producer", ("insert", "insert's COMMIT"))
TAKEN_CHILD_POINTS = _around("child", ("body", "complete", "insert", "insert's COMMIT", "result"))
TAKER_POINTS = ("taker: take, after", *_around("taker", ("take's COMMIT", "end", "end's COMMIT")))


@dataclass(frozen=True)
class Fault:
    """One thing that dies at one point.

    Attributes:
        point: Where.
        action: What.
    """

    point: str
    action: Action

    def __str__(self) -> str:
        return f"{self.action} at {self.point}"

    @property
    def slug(self) -> str:
        """The fault as a file's name and as a part of task names."""
        return "".join(letter if letter.isalnum() else "-" for letter in str(self))


def faults(points: Iterable[str], *, has_server: bool, extent: Extent = "every") -> list[Fault]:
    """Return every sensible fault at these points.

    Args:
        points: Where.
        has_server: The database is a server, which can cut connections.
        extent: At how many of them whole workers die.
    """
    return [Fault(point, action) for point in points for action in _actions(point, has_server=has_server, extent=extent)]


def _actions(point: str, *, has_server: bool, extent: Extent) -> list[Action]:
    who, what = point.split(": ")
    if who == "parent":
        return ["kill"]
    actions: list[Action] = ["kill"]
    if who == "coroutine" and extent != "every":
        # What differs from a plain task is the process's event loop, which dies with each kind of kill.
        extent = "few"
    if who in ("child", "coroutine") and (extent == "every" or what in _WORKERS_DIE_AT[extent]):
        actions.append("kill worker")
    if point in (*STEP_POINTS, *ASYNC_STEP_POINTS) and (extent == "every" or what in _WIPED_AT[extent]):
        actions.append("wipe")
    if has_server and not what.startswith(_WITHOUT_CONNECTION):
        actions.append("cut")
    if what.startswith("publish"):
        actions.append("broker")
    return actions
