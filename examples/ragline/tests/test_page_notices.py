"""The page in a real browser: what it says of files that were not taken, and how that is put away."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Page, expect

from pages import PATIENT_MS, browser, page, search, service

__all__ = ["browser", "page", "service"]  # fixtures


def choose(page: Page, *files: tuple[str, bytes]) -> None:
    """Choose several files at once."""
    page.set_input_files("#files", [{"name": name, "mimeType": "", "buffer": data} for name, data in files])


def test_notices_are_put_away_one_by_one_or_all_at_once(page: Page) -> None:
    """With the keyboard too: the next one has the focus, and at the end what files are chosen with."""
    notices = page.locator("#uploads > li")
    every = page.get_by_role("button", name="Dismiss all")
    choose(page, ("a.txt", b""), ("b.txt", b""), ("c.pdf", b"no"))
    expect(notices).to_have_count(3)
    expect(notices.filter(has_text="Not taken")).to_have_count(3, timeout=PATIENT_MS)

    notices.first.get_by_role("button", name="Dismiss").press("Enter")
    expect(notices).to_have_count(2)
    expect(notices.first.get_by_role("button", name="Dismiss")).to_be_focused()
    every.press("Enter")

    expect(notices).to_have_count(0)
    expect(every).to_be_hidden()
    expect(page.get_by_role("button", name="Choose files")).to_be_focused()
    choose(page, ("a.txt", b""))
    expect(notices.filter(has_text="Not taken")).to_have_count(1, timeout=PATIENT_MS)
    expect(every).to_be_hidden()


def test_uploads_on_their_way_are_not_put_away(page: Page) -> None:
    """Only what somebody has read by now."""
    page.route("**/api/documents?name=slow*", lambda route: None)
    choose(page, ("a.txt", b""), ("b.txt", b""), ("slow.txt", b"slow"))
    notices = page.locator("#uploads > li")
    expect(notices.filter(has_text="Not taken")).to_have_count(2, timeout=PATIENT_MS)

    page.get_by_role("button", name="Dismiss all").click()

    expect(notices).to_have_count(1)
    expect(notices).to_contain_text("slow.txt")


def test_many_files_that_are_refused_for_one_reason_are_one_line(page: Page) -> None:
    """A folder with hundreds of empty files does not push the documents out of sight."""
    choose(page, ("no.pdf", b"no"), *((f"{number}.txt", b"") for number in range(9)))

    notices = page.locator("#uploads > li")
    expect(notices.filter(has_text="9 files were not taken: ")).to_have_count(1, timeout=PATIENT_MS)
    expect(notices).to_have_count(2)
    expect(notices.filter(has_text="and 6 more. For each: The file is empty.")).to_have_count(1)
    expect(notices.filter(has_text="no.pdf")).to_contain_text("Not taken")


def test_a_notice_does_not_turn_while_a_search_is_made(page: Page) -> None:
    """Only what is waited for does."""
    choose(page, *((f"{number}.txt", b"") for number in range(5)))
    expect(page.locator("#uploads > li")).to_have_count(1, timeout=PATIENT_MS)
    page.route("**/api/search?*", lambda route: None)
    search(page, "heron")
    expect(page.locator("body")).to_have_class(re.compile("busy"))

    def behind(selector: str) -> str:
        content: str = page.locator(selector).evaluate("(one) => getComputedStyle(one, '::after').content")
        return content

    assert behind("#search-note") != "none"
    assert behind("#uploads > li") == "none"
