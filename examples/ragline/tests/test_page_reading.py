"""The page in a real browser: searching, reading, and keeping many documents in order."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Browser, Page, expect

from pages import PATIENT_MS, Service, add, browser, document, is_in_state, page, search, service

__all__ = ["browser", "page", "service"]  # fixtures

LONG = " ".join(f"Sentence {number} is about nothing at all." for number in range(900))


def test_a_passage_is_clamped_around_what_was_asked_for(page: Page) -> None:
    """With the way of headings to it, and the rest of it one press away."""
    before = " ".join(f"This is sentence {number} of the chapter." for number in range(18))
    add(page, "guide.md", f"# Guide\n\n## Animals\n\n{before} The axolotl keeps its gills.\n")
    is_in_state(page, "guide.md", "Ready")

    search(page, "axolotl gills")

    passage = page.locator("#passages > li").first
    quote = passage.locator("blockquote")
    expect(passage.locator(".section")).to_have_text("Guide › Animals")
    expect(quote.locator("mark")).to_have_text(["axolotl", "gills"])
    expect(quote).to_have_text(re.compile(r"^… "))
    expect(quote).not_to_contain_text("sentence 0 ")
    passage.get_by_role("button", name="Show more").press("Enter")
    expect(quote).to_contain_text("sentence 0 ")
    expect(quote.locator("mark")).to_have_text(["axolotl", "gills"])
    passage.get_by_role("button", name="Show less").click()
    expect(quote).not_to_contain_text("sentence 0 ")


def test_what_is_shown_is_in_the_address(page: Page, service: Service) -> None:
    """A search and a passage can be sent to somebody; back and forward go through them."""
    add(page, "ibis.md", "The ibis wades, and the ibis waits.")
    is_in_state(page, "ibis.md", "Ready")
    search(page, "ibis")
    expect(page.locator("#passages > li")).to_have_count(1)
    assert page.url.endswith("/?q=ibis")
    expect(page).to_have_title("ibis · ragline")

    page.locator(".source").first.click()
    expect(page.locator("#reader-text mark")).to_have_text("The ibis wades, and the ibis waits.")
    address = page.url
    page.go_back()
    expect(page.locator("#reader")).to_be_hidden()
    page.go_forward()
    expect(page.locator("#reader-text mark")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page).to_have_url(f"{service.url}?q=ibis")
    page.go_back()
    expect(page.locator("#passages > li")).to_have_count(0)
    expect(page.locator("#query")).to_have_value("")

    page.goto(address)
    expect(page.locator("#reader-text mark")).to_have_text("The ibis wades, and the ibis waits.")
    page.keyboard.press("Escape")
    expect(page.locator("#reader")).to_be_hidden()
    expect(page.locator("#passages > li")).to_have_count(1)
    assert page.url.endswith("/?q=ibis")


def test_who_closes_a_document_that_the_address_opened_goes_on_where_it_is_listed(
    page: Page, service: Service
) -> None:
    """At its passage, at its row, or at the beginning; no button was pressed that could have the focus again."""
    add(page, "crane.md", "The crane calls, and the crane dances.")
    is_in_state(page, "crane.md", "Ready")
    search(page, "crane")
    page.locator(".source").first.click()
    expect(page.locator("#reader-text mark")).to_be_visible()

    page.reload()
    expect(page.locator("#reader-text mark")).to_be_visible()
    expect(page.locator("#passages > li")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator(".source").first).to_be_focused()

    number = page.locator("#documents > li").first.get_attribute("data-id")
    page.goto(f"{service.url}?document={number}")
    expect(page.locator("#reader-title")).to_have_text("crane.md")
    expect(document(page, "crane.md")).to_be_visible()
    page.keyboard.press("Escape")
    expect(document(page, "crane.md").locator(".name")).to_be_focused()
    page.goto(f"{service.url}?document=9999")
    expect(page.locator("#reader-title")).to_have_text("This document is no longer here")
    page.keyboard.press("Escape")
    expect(page.get_by_role("heading", name="Search")).to_be_focused()


def test_a_document_is_opened_from_the_list_read_on_and_downloaded(page: Page) -> None:
    """From its beginning to its end, and as the file that it was."""
    add(page, "long.md", LONG)
    is_in_state(page, "long.md", "Ready")

    document(page, "long.md").get_by_role("button", name="long.md", exact=True).click()

    text = page.locator("#reader-text")
    expect(text).to_contain_text("Sentence 0 is")
    expect(text).to_be_focused()
    expect(page.locator("#reader-before")).to_be_hidden()
    expect(page.locator("#reader-share")).to_have_text(re.compile(r"to 1\d % of the text"))
    while page.locator("#reader-after").is_visible():
        before = len(text.text_content() or "")
        page.locator("#reader-after").click()
        page.wait_for_function(
            "(before) => document.getElementById('reader-text').textContent.length > before", arg=before
        )
    expect(text).to_have_text(LONG)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "long.md"
    assert download.value.path().read_text() == LONG


def test_the_focus_stays_at_a_button_whose_request_failed(page: Page) -> None:
    """Whoever reads on, or looks at more passages, tries again with the next key."""
    add(page, "long.md", LONG)
    is_in_state(page, "long.md", "Ready")
    page.route("**/api/search?*skip=10*", lambda route: route.abort())
    search(page, "sentence")
    more = page.get_by_role("button", name="Show more passages")
    more.press("Enter")
    expect(page.locator("#search-note")).to_have_text("The server does not answer.")
    expect(more).to_be_focused()

    document(page, "long.md").get_by_role("button", name="long.md", exact=True).click()
    expect(page.locator("#reader-text")).to_contain_text("Sentence 0 is")
    page.route("**/excerpt?*", lambda route: route.abort())
    page.get_by_role("button", name="Read on").press("Enter")
    expect(page.locator("#reader-said")).to_have_text("The server does not answer.")
    expect(page.get_by_role("button", name="Read on")).to_be_focused()


@pytest.mark.parametrize("width", [460, 490, 900])
def test_a_passage_is_read_on_in_both_directions(page: Page, width: int) -> None:
    """What was read stays where it is, wherever its lines break."""
    page.set_viewport_size({"width": width, "height": 800})
    add(page, "middle.md", LONG.replace("Sentence 450 is", "The quokka of sentence 450 is"))
    is_in_state(page, "middle.md", "Ready")
    search(page, "quokka")
    page.locator(".source").first.click()
    text, mark = page.locator("#reader-text"), page.locator("#reader-text mark")
    expect(mark).to_contain_text("The quokka")
    expect(mark).to_be_in_viewport()
    before = mark.bounding_box()

    page.locator("#reader-before").click()
    expect(text).to_contain_text("Sentence 330 is")
    after = mark.bounding_box()
    page.locator("#reader-after").click()
    expect(text).to_contain_text("Sentence 560 is")

    assert before is not None
    assert after is not None
    assert abs(before["y"] - after["y"]) < 3


def test_a_passage_is_asked_for_by_its_place(page: Page) -> None:
    """Its text stays out of the address of the request, which servers and proxies write into logs."""
    add(page, "short.md", "The bittern booms in the reeds. " * 30)
    is_in_state(page, "short.md", "Ready")
    search(page, "bittern")

    with page.expect_request("**/excerpt?*") as request:
        page.locator(".source").first.click()

    assert re.fullmatch(r".*/api/documents/\d+/excerpt\?start=\d+&end=\d+", request.value.url)
    expect(page.locator("#reader-text mark")).to_contain_text("The bittern booms")
    expect(page.get_by_role("dialog", name="short.md")).to_be_visible()


def test_a_document_without_text_says_why(page: Page) -> None:
    """It opens like any other, and its file can be had."""
    add(page, "torn.pdf", b"%PDF-1.7\nthis is no PDF after all, it is torn\n")
    is_in_state(page, "torn.pdf", "Cannot be read")

    document(page, "torn.pdf").get_by_role("button", name="torn.pdf", exact=True).click()

    expect(page.locator("#reader-text")).not_to_have_text("…")
    expect(page.locator("#reader-text")).to_have_text(
        document(page, "torn.pdf").locator(".reason").text_content() or ""
    )
    expect(page.locator("#reader-download")).to_be_visible()


def test_what_an_answer_quotes_is_marked_in_its_passage(page: Page) -> None:
    """As it stands there, whatever spaces and capitals the model wrote."""
    add(page, "quoted.md", "Bees of the quote dance to tell where flowers are, it is said.")
    is_in_state(page, "quoted.md", "Ready")
    page.get_by_label("A question, or words").fill("what is the quote on bees?")
    page.get_by_role("button", name="Ask").click()

    expect(page.locator("#passages > li").first.locator("mark")).to_have_text(["tell where flowers are"])
    assert "ask=1" in page.url


def test_documents_of_one_name_are_told_apart(page: Page, tmp_path: Path) -> None:
    """By their folders, in the list and in citations."""
    for folder, animal in (("north", "penguin"), ("south", "puffin")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "readme.md").write_text(f"The {animal} of readme.")
    page.set_input_files("#folder", tmp_path)

    is_in_state(page, "north/readme.md", "Ready")
    is_in_state(page, "south/readme.md", "Ready")
    search(page, "puffin readme")
    expect(page.locator("#passages .source").first).to_have_text("south/readme.md")


def test_documents_are_filtered_sorted_and_selected(page: Page) -> None:
    """What is done with those that are selected is done with all of them, after a question."""
    for name, size in (("zebra-1.md", 10), ("zebra-10.md", 30), ("zebra-2.md", 20)):
        add(page, name, f"{name} " + "stripe " * size)
        is_in_state(page, name, "Ready")
    names = page.locator("#documents .name")

    page.get_by_label("Filter by name or folder").fill("ZEBRA")
    expect(names).to_have_text(["zebra-2.md", "zebra-10.md", "zebra-1.md"])
    page.get_by_label("Sort by").select_option("By name")
    expect(names).to_have_text(["zebra-1.md", "zebra-2.md", "zebra-10.md"])
    page.get_by_label("Sort by").select_option("Largest first")
    expect(names).to_have_text(["zebra-10.md", "zebra-2.md", "zebra-1.md"])
    page.get_by_label("Select zebra-10.md").check()
    expect(page.locator("#selected-count")).to_have_text("1 selected")
    page.get_by_label("Select all that are shown").check()
    expect(page.locator("#selected-count")).to_have_text("3 selected")
    page.get_by_label("Select zebra-2.md").uncheck()
    page.locator("#selected-actions").get_by_role("button", name="Delete").click()
    expect(page.locator("#confirm-title")).to_have_text("Delete 2 documents?")
    page.get_by_role("button", name="Delete", exact=True).last.click()
    expect(names).to_have_text(["zebra-2.md"])
    expect(page.locator("#selection")).to_be_hidden()
    page.get_by_label("Filter by name or folder").fill("no such name")
    expect(page.locator("#no-match")).to_have_text("No document is called “no such name”.")


def seed(home: Path, number: int) -> None:
    """Write ready documents into the database of a home that is not served yet."""
    subprocess.run(
        [sys.executable, "-c", "from ragline.cli import main; main()", "status"],
        env={**os.environ, "RAGLINE_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=100,
    )
    with sqlite3.connect(home / "ragline.db") as database:
        for at in range(1, number + 1):
            name = f"{number - at:04}.md"
            uri = f"upload:///{name}"
            database.execute(
                "INSERT INTO document (id, name, size_bytes, parser, splitter, embedder, state, is_permanent,"
                " ready_at) VALUES (?, ?, ?, '1', '1', 'none', 'ready', 0, '2026-01-01 00:00:00')",
                (at, name, at),
            )
            database.execute(
                "INSERT INTO source (uri_digest, uri, name, generation, serving_id) VALUES (?, ?, ?, 1, ?)",
                (f"{at:064}", uri, name, at),
            )


def test_documents_that_the_page_does_not_know_are_found_and_sorted(browser: Browser, tmp_path: Path) -> None:
    """The server lists them: the page watches the newest only."""
    seed(tmp_path, 900)
    service = Service(tmp_path)
    try:
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(service.url)
            names = page.locator("#documents .name")
            expect(names).to_have_count(50, timeout=PATIENT_MS)
            expect(page.locator("#older")).to_have_text("Show more documents (850 left)")
            page.get_by_label("Sort by").select_option("By name")
            expect(names.first).to_have_text("0000.md")
            expect(names).to_have_count(50)
            page.get_by_label("Sort by").select_option("Oldest first")
            expect(names.first).to_have_text("0899.md")
            page.get_by_role("button", name="Show more documents").click()
            expect(names).to_have_count(150)
            page.get_by_label("Filter by name or folder").fill("0600")
            expect(names).to_have_text(["0600.md"])
            page.get_by_label("Filter by name or folder").fill("")
            page.get_by_label("Sort by").select_option("Newest first")
            for number in range(50, 900, 100):
                expect(names).to_have_count(number)
                page.get_by_role("button", name="Show more documents").click()
            expect(names).to_have_count(900)
            expect(names.last).to_have_text("0899.md")
            expect(page.locator("#older")).to_be_hidden()
    finally:
        service.stop()


SMALL = """
(limit) => [...document.querySelectorAll("button, a, select, input, .check")]
    .filter((one) => one.checkVisibility() && !one.matches(".skip, .check input"))
    .map((one) => [one.id || one.className || one.textContent, one.getBoundingClientRect()])
    .filter(([, box]) => box.width > 2 && (box.height < limit || box.width < limit))
    .map(([name, box]) => `${name}: ${Math.round(box.width)} x ${Math.round(box.height)}`)
"""


def test_a_finger_finds_everything(browser: Browser, service: Service) -> None:
    """All that can be pressed is at least 44 pixels wide and high where the pointer is a finger."""
    options = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.goto(service.url)
        add(page, "finger.md", "# Hand\n\nThe finger quote. " + "It presses what it sees. " * 40)
        is_in_state(page, "finger.md", "Ready")
        page.get_by_label("A question, or words").fill("finger quote")
        page.get_by_role("button", name="Ask").tap()
        expect(page.locator("#passages > li").first).to_be_visible()
        page.get_by_label("Select finger.md").check()
        assert page.evaluate(SMALL, 44) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.locator(".source").first.tap()
        expect(page.locator("#reader-text")).to_be_visible()
        assert page.evaluate(SMALL, 44) == []


SCROLLED = """
() => [...document.querySelectorAll("*")]
    .filter((one) => one.checkVisibility() && one.scrollHeight > one.clientHeight + 1
        && /auto|scroll/.test(getComputedStyle(one).overflowY)
        && one !== document.scrollingElement && one.tabIndex < 0)
    .map((one) => one.id || one.className)
"""


def test_what_scrolls_is_reached_with_the_keyboard(page: Page) -> None:
    """Every region with a scroll bar takes the focus (axe: scrollable-region-focusable)."""
    add(page, "scroll.md", LONG.replace("Sentence 7 is", "The scrolling sentence 7 is"))
    is_in_state(page, "scroll.md", "Ready")
    search(page, "scrolling sentence")
    expect(page.locator("#passages > li").first).to_be_visible()

    assert page.evaluate(SCROLLED) == []
    page.locator(".source").first.click()
    expect(page.locator("#reader-text mark")).to_be_visible()
    assert page.evaluate(SCROLLED) == []
