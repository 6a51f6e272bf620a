"""What README.md claims and links to exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.page import blocks_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUARANTEES = README.split("## What is guaranteed\n", 1)[1].split("\n## ", 1)[0]
PROOFS = re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", GUARANTEES)
LINKS = re.findall(r"\]\((?!https?://)([^)#]+)", README)
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_every_guarantee_names_its_test() -> None:
    """A line of the table without a test would be a mere claim."""
    lines = [line for line in GUARANTEES.splitlines() if line.startswith("|")][2:]

    assert lines
    assert [line for line in lines if not re.search(r"\[`test_\w+`\]\([^)]+\) \|$", line)] == []


@pytest.mark.parametrize(("name", "path"), PROOFS)
def test_test_of_a_guarantee_exists(name: str, path: str) -> None:
    """A test that was renamed or removed no longer stands in the table."""
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("link", sorted(set(LINKS)))
def test_link_of_the_readme_leads_somewhere(link: str) -> None:
    """Every page that README.md points at is in the repository."""
    assert (ROOT / link).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Every page that a page of the documentation points at is in the repository."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))

    assert [link for link in links if not (page.parent / link).exists()] == []


def test_example_runs_with_celery_and_sqlalchemy_alone(tmp_path: Path) -> None:
    """SQLAlchemy 2.1 does not install greenlet: who has no async code must not need it."""
    script = tmp_path / "shop.py"
    script.write_text("import sys\nsys.modules['greenlet'] = None\n" + blocks_of(README)[0].code)

    command = [sys.executable, str(script)]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["thank", "you", "charged"]
