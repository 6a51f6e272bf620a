"""Transactions of commands and routes: run again when the database had to end them, as tasks are."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from celery_alchemy import is_transient
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from ragline.app import alchemy

RUNS = 5
PAUSE_SECONDS = 0.1

Result = TypeVar("Result")


def in_transaction(use_case: Callable[[Session], Result]) -> Result:
    """Run a use case in a transaction of its own and commit it.

    A deadlock with another person's or a worker's transaction, or a lost connection, undoes all of it: then
    it runs again, at most `RUNS` times in all.

    Args:
        use_case: what is done with the session; it may be called several times, each time with a fresh one.
    """
    for run in range(1, RUNS + 1):
        try:
            with alchemy.begin() as session:
                return use_case(session)
        except DBAPIError as error:
            if run == RUNS or not is_transient(error):
                raise
            time.sleep(random.uniform(0, PAUSE_SECONDS * 2**run))
    raise AssertionError("the last run returns or raises")
