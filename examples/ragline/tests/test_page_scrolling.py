"""The page in a real browser: how a long document is scrolled, and where it is opened."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Page, expect

from pages import add, browser, document, is_in_state, page, search, service

__all__ = ["browser", "page", "service"]  # fixtures

LONG = "\n\n".join(f"Paragraph {number} is about nothing at all." for number in range(900))

A_FRAME = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def open_long(page: Page, name: str) -> None:
    """Open a document of several pieces at its beginning."""
    add(page, name, f"{LONG}\n\nThe end of {name}.")
    is_in_state(page, name, "Ready")
    document(page, name).locator(".name").click()
    expect(page.locator("#reader-text")).to_be_focused()


def test_who_scrolls_to_the_end_of_what_is_shown_reads_on(page: Page) -> None:
    """To the end of the document, without a button; what is on the screen stays where it is."""
    open_long(page, "scrolled.md")
    text = page.locator("#reader-text")
    length = len(text.inner_text())
    text.hover()

    page.mouse.wheel(0, 100_000)
    page.wait_for_function(
        "before => document.querySelector('#reader-text').innerText.length > before", arg=length
    )
    expect(page.locator("#reader-share")).to_have_text("to 33 % of the text")
    assert (
        page.evaluate(
            "(({ scrollTop, scrollHeight, clientHeight }) => scrollHeight - clientHeight - scrollTop)"
            "(document.querySelector('#reader-text'))"
        )
        > 1000
    )
    while page.locator("#reader-after").is_visible():
        page.mouse.wheel(0, 100_000)
        page.evaluate(A_FRAME)

    expect(text).to_contain_text("The end of scrolled.md.")


def test_a_selection_is_kept_at_the_end_of_what_is_shown(page: Page) -> None:
    """Text that is drawn anew would lose it: whoever selects goes on with the button."""
    open_long(page, "selected.md")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.locator("#reader-text").press("Control+a")

    page.evaluate("document.querySelector('#reader-text').scrollTop = 1e6")
    page.evaluate(A_FRAME)

    assert len(page.evaluate("getSelection().toString()")) > 1000
    assert [url for url in asked if "/excerpt" in url] == []


def test_a_passage_that_is_higher_than_the_window_is_read_from_its_beginning(page: Page) -> None:
    """Its middle would be in the middle, and its first lines out of sight."""
    lines = "\n".join(f"- point {number} of the ocelot" for number in range(40))
    add(page, "tall.md", f"{LONG[:3000]}\n\n# Ocelots\n\n{lines}\n\n# After\n\n{LONG[:6000]}")
    is_in_state(page, "tall.md", "Ready")
    page.set_viewport_size({"width": 390, "height": 600})
    search(page, "ocelot")

    page.locator("#passages .source").first.click()

    expect(page.locator("#reader-text mark").first).to_be_visible()
    top, above = page.evaluate(
        "['#reader-text mark', '#reader-text'].map((one) => document.querySelector(one).getBoundingClientRect().top)"
    )
    assert above <= top < above + 120


def test_the_words_that_were_asked_for_stand_out_in_a_passage_that_is_read(page: Page) -> None:
    """Also when text before it is shown; what is found in the document takes their place."""
    before = "\n\n".join(f"Paragraph {number} is filling 🐳." for number in range(200))
    add(page, "words.md", f"{before}\n\n# Coatis\n\nA coati climbs. Two coatis climb higher.\n\n{LONG}")
    is_in_state(page, "words.md", "Ready")
    search(page, "coati climbing")
    page.locator("#passages .source").first.click()
    expect(page.locator("#reader-text mark").first).to_be_visible()
    emphasized = "[...CSS.highlights.get('asked')].map((one) => one.startContainer.data.slice(one.startOffset, one.endOffset))"
    words = ["Coatis", "coati", "climbs", "coatis", "climb"]

    assert page.evaluate(emphasized) == words
    page.get_by_role("button", name="Show what comes before").click()
    expect(page.locator("#reader-before")).to_be_hidden()
    assert page.evaluate(emphasized) == words
    page.get_by_label("Find in this document").fill("higher")
    page.keyboard.press("Enter")
    expect(page.locator("#reader-text mark")).to_have_text("higher")
    assert page.evaluate(emphasized) == []
