"""What goes wrong in a soak: kills, pauses, cut connections and a broker that forgets."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import redis
from sqlalchemy.exc import DBAPIError

from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.soak.fleet import Member, Role

#: Longer than every lease of the soak's app and than the time after which it sends an owed task again.
LONGEST_PAUSE_SECONDS = 9.0


class Chaos:
    """Does harm at random, and counts it.

    Args:
        members: The processes.
        database: Whose connections are cut.
        broker: What is emptied.
        seed: Of the random choices; which process meets them where is the machine's own choice.

    Attributes:
        done: How often each kind of harm was done: "child", "worker", "relay", "producer" for kills; "pause", "cut", "emptied".
    """

    def __init__(self, members: Sequence[Member], database: Database, broker: Broker, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._members = members
        self._database = database
        self._broker = broker
        self._random = random.Random(seed)
        self._paused: dict[int, float] = {}
        acts: list[tuple[Callable[[], bool], int]] = [
            (self._kill_child, 45),
            (lambda: self._kill("worker"), 9),
            (lambda: self._kill("relay"), 8),
            (lambda: self._kill("producer"), 8),
            (self._pause, 14),
        ]
        if broker.name != "alchemy":
            # There the rows are the messages.
            acts.append((self._empty_broker, 6))
        if database.name != "sqlite":
            acts.append((self._cut_connections, 10))
        self._acts = [act for act, _ in acts]
        self._weights = [weight for _, weight in acts]

    @property
    def kills(self) -> int:
        """How many processes were killed."""
        return sum(self.done[kind] for kind in ("child", "worker", "relay", "producer"))

    def strike(self) -> None:
        """Do one thing, and let those go on whose pause is over."""
        self._resume(time.monotonic())
        act = self._random.choices(self._acts, self._weights)[0]
        act()

    def end(self) -> None:
        """Let every process go on."""
        self._resume(float("inf"))

    def _of(self, role: Role) -> Member:
        return self._random.choice([member for member in self._members if member.role == role])

    def _kill_child(self) -> bool:
        children = self._of("worker").children()
        if not children:
            return False
        return self._signal(self._random.choice(children), signal.SIGKILL, "child")

    def _kill(self, role: Role) -> bool:
        member = self._of(role)
        if self._random.random() < 0.5:
            member.kill()
        else:
            member.kill_group()
        self.done[role] += 1
        return True

    def _pause(self) -> bool:
        member = self._random.choice(self._members)
        pid = self._random.choice([member.pid, *member.children()])
        if pid in self._paused or not self._signal(pid, signal.SIGSTOP, "pause"):
            return False
        self._paused[pid] = time.monotonic() + self._random.uniform(0.5, LONGEST_PAUSE_SECONDS)
        return True

    def _resume(self, now: float) -> None:
        for pid, until in list(self._paused.items()):
            if until <= now:
                del self._paused[pid]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _signal(self, pid: int, number: signal.Signals, kind: str) -> bool:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        self.done[kind] += 1
        return True

    def _cut_connections(self) -> bool:
        """Cut one connection, or all of them as a restarting server does."""
        if self._random.random() < 0.3:
            self._database.disconnect_others()
        else:
            connections = self._database.connections()
            if not connections:
                return False
            cut(self._database, self._random.choice(connections))
        self.done["cut"] += 1
        return True

    def _empty_broker(self) -> bool:
        empty(self._broker)
        self.done["emptied"] += 1
        return True


def cut(database: Database, connection_id: int) -> None:
    """Cut one connection of a PostgreSQL or MariaDB database."""
    if database.name == "postgresql":
        database.rows("SELECT pg_terminate_backend(:id)", id=connection_id)
        return
    # It may have ended by itself a moment ago.
    with contextlib.suppress(DBAPIError):
        database.execute(f"KILL {connection_id}")


def empty(broker: Broker) -> None:
    """Make the broker forget all of its messages, delivered and not acknowledged ones too where it keeps them apart."""
    if broker.name == "redis":
        with redis.Redis.from_url(broker.settings["broker_url"]) as client:
            keys = list(client.scan_iter(match=f"{broker.prefix}*", count=1000))
            if keys:
                client.delete(*keys)
    elif broker.name == "filesystem":
        for path in Path(broker.settings["broker_transport_options"]["data_folder_in"]).iterdir():
            path.unlink(missing_ok=True)
    else:
        broker.purge()
