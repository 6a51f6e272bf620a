"""The tests that the page about testing shows are tests that pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from celery_alchemy.testing import plugin
from celery_alchemy.testing.points import POINTS
from tests.docs.page import blocks_of

pytest_plugins = ["pytester"]
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "test.md"


def test_shown_tests_pass(pytester: pytest.Pytester) -> None:
    """Its blocks, pasted into one test module, are collected and pass."""
    blocks = [block.code for block in blocks_of(PAGE.read_text(encoding="utf-8")) if block.skipped is None]
    pytester.makepyfile(test_page="\n\n".join(blocks))

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=14)


def test_every_fixture_and_point_is_shown() -> None:
    """Whoever looks for a fixture of the plugin, or for a point at which a process can die, finds it on the page."""
    text = PAGE.read_text(encoding="utf-8")
    fixtures = [name for name, value in vars(plugin).items() if type(value).__name__ == "FixtureFunctionDefinition"]

    assert len(fixtures) >= 8
    assert [name for name in fixtures if name not in text] == []
    assert [point for point in POINTS if f'`"{point}"`' not in text] == []
