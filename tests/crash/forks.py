"""A process that imports the app once and forks what is to die: a producer or relay for each fault, or a worker.

`python -m tests.crash.forks producers|relays|senders|poison`, with faults as JSON on its standard input: senders
print the ids of the tasks that they sent, by name; the exit code is 1 when a fork ended otherwise than its fault
lets expect. `python -m tests.crash.forks worker ...` keeps a worker running.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any
from uuid import uuid4

from sqlalchemy.exc import DBAPIError

from celery_alchemy.outbox.hand_over import drain_at_exit
from celery_alchemy.outbox.relay import relay_of
from tests.crash.app import alchemy, app, folder, injection, poison, send
from tests.crash.injection import WIPE
from tests.crash.points import Fault
from tests.soak.ledger import promise

RELAY_SECONDS = 15.0


class TakenBackError(Exception):
    """The producer's own reason to roll back."""


def take_back(name: str) -> None:
    """Send what is rolled back."""
    try:
        with alchemy.begin() as session:
            send(session, f"ghost of {name}", None)
            raise TakenBackError
    except TakenBackError:
        return


def produce(fault: Fault) -> None:
    """Die while sending."""
    take_back(fault.slug)
    injection.fault = fault
    try:
        with alchemy.begin() as session:
            send(session, fault.slug, None)
    except DBAPIError:
        # Committed or not: the promise says which.
        if fault.action != "cut":
            raise
    # As at the end of a process: what follows the commit dies there, or the process ends with it done.
    drain_at_exit()


def leave_behind(fault: Fault) -> None:
    """Commit, and end before anything is handed over."""
    outbox: Any = alchemy.outbox
    outbox.hand_over = lambda rows, claim: None
    with alchemy.begin() as session:
        send(session, fault.slug, None)


def relay(fault: Fault) -> None:
    """Die while relaying what was left behind."""
    injection.fault = fault
    worker = relay_of(alchemy)
    deadline = time.monotonic() + RELAY_SECONDS
    while not (folder / fault.slug).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"there was nothing to relay for: {fault}")
        try:
            worker.step()
        except DBAPIError:
            if fault.action != "cut":
                raise
        time.sleep(0.02)


def hand_to_worker(faults: list[Fault]) -> None:
    """Send tasks that carry their fault to a worker; those whose task is done already get another one."""
    ids = {}
    for fault in faults:
        name = f"{fault.slug}-{uuid4().hex[:8]}"
        with alchemy.begin() as session:
            ids[name] = send(session, name, fault)
    sys.stdout.write(json.dumps(ids))


def keep_worker(arguments: list[str]) -> int:
    """Run a worker in a fork, and another whenever it has died, until SIGTERM; the imports are done once."""
    stopping = False
    pid = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if pid:
            os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    while not stopping:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with ExitStack() as stack:
                if app.conf.broker_url.startswith("filesystem"):
                    # Without an event loop the pool's children write results to one pipe: one that is
                    # killed by its hand-over thread, while it writes, keeps the pipe's lock for ever.
                    stack.enter_context(alchemy.outbox.in_caller())
                app.worker_main(["worker", *arguments])
            os._exit(0)
        os.waitpid(pid, 0)
        pid = 0
        if (folder / WIPE).exists():
            wipe_broker()
            (folder / WIPE).unlink()
    return 0


def wipe_broker() -> None:
    """Throw away all messages, those too that the worker had which was killed."""
    with app.connection_for_write() as connection:
        channel: Any = connection.default_channel
        queue = app.conf.task_default_queue
        while connection.transport.driver_type == "amqp" and channel.queue_declare(queue, passive=True).consumer_count:
            # RabbitMQ puts back what the worker had when it sees that the worker has gone.
            time.sleep(0.01)
        channel.queue_purge(queue)
        if connection.transport.driver_type == "redis":
            channel.client.delete(channel.unacked_key, channel.unacked_index_key)


def in_fork(act: Callable[[Fault], None], fault: Fault, *, dies: bool) -> bool:
    """Do something in a forked process, and tell whether it ended as it should."""
    pid = os.fork()
    if pid == 0:
        try:
            act(fault)
        except BaseException:  # noqa: BLE001 (the fork must end here, whatever it was)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    expected = -signal.SIGKILL if dies else 0
    if code != expected:
        sys.stderr.write(f"{act.__name__} ended with {code}, not {expected}: {fault}\n")
    return code == expected


def fork_all(what: str, faults: list[Fault]) -> int:
    """Fork a producer, or a producer and a relay, for each fault."""
    as_expected = True
    for fault in faults:
        dies = fault.action == "kill"
        if what == "producers":
            as_expected &= in_fork(produce, fault, dies=dies)
        else:
            as_expected &= in_fork(leave_behind, fault, dies=False) and in_fork(relay, fault, dies=dies)
    return 0 if as_expected else 1


def main(what: str, arguments: list[str]) -> int:
    """Do what the command line asks."""
    if what == "worker":
        return keep_worker(arguments)
    faults = [Fault(*given) for given in json.load(sys.stdin)]
    if what == "senders":
        hand_to_worker(faults)
        return 0
    if what == "poison":
        with alchemy.begin() as session:
            poison.apply_async_on_commit((promise(session, "poison"),), task_id="poison", session=session)
        return 0
    return fork_all(what, faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
