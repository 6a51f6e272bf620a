"""A producer process of the soak: transactions that commit, that roll back, and that do both by SAVEPOINT."""

from __future__ import annotations

import logging
import random
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from tests.soak.app import alchemy, send_chain, send_family, send_ghosts, send_keyed

logger = logging.getLogger(__name__)


class RollBackError(Exception):
    """The producer's own reason to roll back."""


def commit_one(session: Session) -> None:
    """Send something and let it be committed."""
    random.choice((send_family, send_family, send_family, send_chain, send_keyed))(session)


def roll_back(session: Session) -> None:
    """Send ghosts, half of them in a SAVEPOINT that is released, and take all back."""
    send_ghosts(session)
    with session.begin_nested():
        send_ghosts(session)
    raise RollBackError


def roll_back_savepoint(session: Session) -> None:
    """Send something, ghosts in a SAVEPOINT that rolls back with one that was released inside it, and something again."""
    commit_one(session)
    with session.begin_nested() as savepoint:
        send_ghosts(session)
        with session.begin_nested():
            send_ghosts(session)
        savepoint.rollback()
    with session.begin_nested():
        commit_one(session)


def main(folder: Path, per_second: float) -> None:
    """Produce until SIGTERM.

    Args:
        folder: Where a byte is left for every rollback, so that a run that rolled nothing back is noticed.
        per_second: Transactions.
    """
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    while not stopping.wait(random.uniform(0.5, 1.5) / per_second):
        act = random.choices((commit_one, roll_back, roll_back_savepoint), (6, 2, 2))[0]
        try:
            with alchemy.begin() as session:
                act(session)
        except RollBackError:
            pass
        except DBAPIError as error:
            # The connection was cut: committed or not, the promise says which.
            logger.warning("A transaction failed: %r", error.orig)
        if act is not commit_one:
            with (folder / "rollbacks").open("ab") as file:
                file.write(b".")


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(process)d %(message)s")
    main(Path(sys.argv[1]), float(sys.argv[2]))
