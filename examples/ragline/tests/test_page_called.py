"""The page in a real browser: who searches for the name of a file is led to it."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Page, expect

from pages import add, browser, is_in_state, page, search, service

__all__ = ["browser", "page", "service"]  # fixtures


def test_a_search_for_the_name_of_a_file_leads_to_it(page: Page) -> None:
    """Its text need not have a word of it."""
    add(page, "budget-2031.md", "Nothing but flowers.")
    is_in_state(page, "budget-2031.md", "Ready")
    called = page.locator("#called-so")

    search(page, "Budget 2031")
    expect(called).to_have_text("A document has this in its name: budget-2031.md")
    called.get_by_role("button").click()
    expect(page.locator("#reader-text")).to_have_text("Nothing but flowers.")
    page.keyboard.press("Escape")
    expect(called.get_by_role("button")).to_be_focused()

    search(page, "flowers")
    expect(page.locator("#passages > li")).to_have_count(1)
    expect(called).to_be_hidden()


def test_many_files_of_a_name_are_not_all_told(page: Page) -> None:
    """And none for a letter, which is part of most names."""
    for number in range(4):
        add(page, f"minutes-{number}.md", f"Meeting {number}.")
        is_in_state(page, f"minutes-{number}.md", "Ready")

    search(page, "minutes")
    expect(page.locator("#called-so")).to_have_text(
        "Documents with this in their name: minutes-3.md, minutes-2.md, minutes-1.md and more"
    )
    search(page, "m")
    expect(page.locator("#search-note")).not_to_have_text("Searching…")
    expect(page.locator("#called-so")).to_be_hidden()
