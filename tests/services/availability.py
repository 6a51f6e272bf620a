"""Decides whether tests use a server, skip with a reason, or fail; the lowest part of the test services."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import pytest


@dataclass(frozen=True)
class Missing:
    """A server that no test can use, and why.

    Attributes:
        name: What people call it.
        reason: Why not.
        is_wanted: False if this run was asked to leave servers alone; then its tests are skipped in CI too.
    """

    name: str
    reason: str
    is_wanted: bool = True


@dataclass(frozen=True)
class Found:
    """A server that answers.

    Attributes:
        name: What people call it.
        url: Where it is, for its own client.
        origin: How it came to be: "server" or the wheel it was started from.
    """

    name: str
    url: str
    origin: str


def locate(
    name: str,
    *,
    variable: str,
    default_url: str,
    probe: Callable[[str], None],
    embedded: Callable[[], str] | None = None,
) -> Found | Missing:
    """Find one server: the URL from the environment, the default one, or one started from a wheel.

    Args:
        name: What people call it.
        variable: Environment variable with its URL. When it is set, nothing else is tried.
        default_url: Where an unconfigured local server listens.
        probe: Connects to a URL and raises when the server cannot be used.
        embedded: Starts the server from a wheel and returns its URL; raises when it cannot. Not tried in CI,
            which must show that the real servers work.
    """
    if os.environ.get("TEST_SERVERS") == "none":
        return Missing(name, f"{name} is not used in this run (TEST_SERVERS=none)", is_wanted=False)
    try:
        probe(os.environ.get(variable, default_url))
    except Exception as error:  # noqa: BLE001 (each client has its own errors; all of them mean "cannot be used")
        reason = f"{name} does not answer ({variable}): {_first_line(error)}"
    else:
        return Found(name, os.environ.get(variable, default_url), "server")
    if embedded is None or variable in os.environ or in_ci():
        return Missing(name, reason)
    try:
        return Found(name, embedded(), "wheel")
    except Exception as error:  # noqa: BLE001 (an import error, a platform without the wheel, a refused start)
        return Missing(name, f"{reason}; from its wheel: {_first_line(error)}")


def require(server: Found | Missing) -> Found:
    """Return a found server; skip the running test when it is missing, or fail it in CI."""
    if isinstance(server, Missing):
        _refuse(server)
    return server


def in_ci() -> bool:
    """Whether this run must not skip anything (the variable CI is set to something)."""
    return bool(os.environ.get("CI"))


def _refuse(server: Missing) -> NoReturn:
    if in_ci() and server.is_wanted:
        pytest.fail(f"{server.reason} (CI is set: a missing server is a failure)", pytrace=False)
    pytest.skip(server.reason)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
