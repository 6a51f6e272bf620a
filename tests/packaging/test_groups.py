"""Each target of the Makefile works in a fresh clone: its dependency groups have what it imports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _read(path: str) -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no tomllib")
    import tomllib

    return tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


def test_documentation_builds_with_its_own_group() -> None:
    """`make docs` imports the integrations for their docstrings, also where nobody has run `make test`."""
    project = _read("pyproject.toml")

    needed = {each for extra in ("prometheus", "opentelemetry") for each in project["project"]["optional-dependencies"][extra]}

    assert needed <= set(project["dependency-groups"]["docs"])


def test_examples_have_the_plugins_that_their_settings_need() -> None:
    """`make example NAME=from_hand_written` runs pytest with the settings of `examples/pyproject.toml`."""
    settings = _read("examples/pyproject.toml")["tool"]["pytest"]["ini_options"]
    group = " ".join(_read("pyproject.toml")["dependency-groups"]["examples"])

    assert "timeout" not in settings or "pytest-timeout" in group
