"""Every Python block of README.md and docs/ runs as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.page import blocks_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNER = Path(__file__).with_name("page.py")


def _run(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), str(page)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_page_runs(page: Path, tmp_path: Path) -> None:
    """The blocks of a page, pasted one after the other into one file, end without an error."""
    finished = _run(page, tmp_path)

    assert finished.returncode == 0, finished.stderr


def test_documentation_has_code_that_is_executed() -> None:
    """A fence that is written in another way would silently take all blocks out of the test above."""
    executed = [block for page in PAGES for block in blocks_of(page.read_text()) if block.skipped is None]

    assert len(executed) >= 5


def test_failing_block_is_reported_with_its_line(tmp_path: Path) -> None:
    """The second block sees the first one's names, and its error names the page's line."""
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n")

    finished = _run(page, tmp_path)

    assert finished.returncode == 1
    assert f'"{page}", line 10' in finished.stderr


def test_block_is_skipped_only_with_a_reason(tmp_path: Path) -> None:
    """The comment before a block takes it out when it says why, and does nothing when it does not."""
    fence = "```python\nraise SystemExit(3)\n```\n"

    with_reason = blocks_of(f"<!-- not executed: needs a Redis server -->\n{fence}")
    without_reason = blocks_of(f"<!-- not executed: -->\n{fence}")

    assert [block.skipped for block in with_reason] == ["needs a Redis server"]
    assert [block.skipped for block in without_reason] == [None]


def _included() -> list[tuple[Path, str]]:
    """Return each part of another file that a page shows: the page, and the directive with its options."""
    directive = re.compile(r"```\{literalinclude\} (.+?)\n```", re.DOTALL)
    return [(page, found) for page in PAGES for found in directive.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "directive"), _included(), ids=lambda value: value.stem if isinstance(value, Path) else None)
def test_included_code_is_there(page: Path, directive: str) -> None:
    """A page shows a part of an example that exists, from its first mark to its last."""
    name, *options = directive.splitlines()

    text = (page.parent / name).read_text(encoding="utf-8")

    places = [text.find(option.split('"')[1]) for option in options if option.startswith((":start-after:", ":end-before:"))]
    assert -1 not in places
    assert places == sorted(places)
