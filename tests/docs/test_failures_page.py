"""docs/explanation/failures.md has all reported failures, each with its source and with tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.page import blocks_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "failures.md").read_text(encoding="utf-8")
#: Number, title and text of each case.
CASES = re.findall(r"^## F(\d\d) (.+)\n((?:(?!^## ).*\n)*)", PAGE, flags=re.MULTILINE)
NUMBERS = [f"F{number}" for number, _, _ in CASES]
PROOF = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_all_are_there() -> None:
    """In their order, on the page and in the table at its top."""
    first = [f"F{number:02}" for number in range(1, 38)]
    table = re.findall(r"^\| \[(F\d\d)\]\(#\S+\) \| (.+?) \|", PAGE, flags=re.MULTILINE)

    assert NUMBERS[: len(first)] == first
    assert sorted(set(NUMBERS)) == NUMBERS
    assert table == [(f"F{number}", title) for number, title, _ in CASES]


@pytest.mark.parametrize("case", [text for _, _, text in CASES], ids=NUMBERS)
def test_case_has_code_a_source_and_tests_that_exist(case: str) -> None:
    """The code that loses data comes first; the tests are named as pytest names them."""
    first = blocks_of(case)[0]
    proofs = PROOF.findall(case)

    assert first.skipped == "it loses data"
    assert re.search(r"\]\(https?://", case)
    assert proofs
    assert [proof for proof in proofs if not _exists(*proof)] == []


@pytest.mark.parametrize("case", [text for _, _, text in CASES], ids=NUMBERS)
def test_code_that_loses_data_is_python(case: str) -> None:
    """It is not executed, but a reader can paste it."""
    for block in blocks_of(case):
        compile(block.code, "failures.md", "exec")


def _exists(path: str, name: str) -> bool:
    file = ROOT / path
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    # The three of F14 are made by a function, from the way to end.
    made = re.fullmatch(r"f14_(\w+)_leaks_nothing", name)
    return f"def {name}(" in text or (made is not None and f'_f14("{made[1]}"' in text)
