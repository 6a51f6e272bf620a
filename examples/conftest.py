"""A folder for the data of all examples; they read its place when they are imported."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Give this process, and the workers that it starts, a new folder."""
    os.environ["EXAMPLE_FOLDER"] = tempfile.mkdtemp(prefix="examples-")
    for name in ("DATABASE_URL", "BROKER_URL"):
        os.environ.pop(name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the folder."""
    shutil.rmtree(os.environ["EXAMPLE_FOLDER"], ignore_errors=True)
