"""The page in a real browser: what it says of a search stays true, whatever happens afterwards."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Page, expect

from pages import (
    PATIENT_MS,
    Service,
    Told,
    add,
    browser,
    is_in_state,
    page,
    search,
    service,
    told_document,
    told_passage,
)

__all__ = ["browser", "page", "service"]  # fixtures

ONLY_NEAR = "No passage has a word of the query; these are the nearest in meaning."
NO_WORD = "The question only says what to leave out: add a word to look for."


def answer(page: Page, number: int = 1, note: str | None = None, *, has_more: bool = False) -> None:
    """What the server finds from now on, in its place."""
    passages = [told_passage(at, document_id=at + 1) for at in range(number)]
    found = {"passages": passages, "note": note, "has_more": has_more}
    page.unroute("**/api/search?*")
    page.route("**/api/search?*", lambda route: route.fulfill(json=found))


def test_a_search_says_how_many_documents_are_on_the_way(page: Page) -> None:
    """Also where something was found: it may not be all."""
    told = Told(page)
    told.tell([told_document(1), told_document(2, "parsing"), told_document(3, "queued")])
    answer(page)
    search(page, "heron")

    expect(page.locator("#search-note")).to_have_text("1 passage. 2 documents are still on the way.")
    expect(page.locator("#search-again")).to_be_hidden()
    expect(page.locator("#search-note")).to_have_attribute("aria-live", "polite")
    told.tell([told_document(1), told_document(2, "parsing")])
    expect(page.locator("#search-note")).to_have_text("1 passage. 1 document is still on the way.")
    expect(page.locator("#search-note")).to_have_attribute("aria-live", "off")


def test_new_results_are_offered_when_documents_have_become_ready(page: Page) -> None:
    """They come when they are asked for, and the focus is not lost."""
    told = Told(page)
    told.tell([told_document(1), told_document(2, "embedding")])
    answer(page)
    search(page, "heron")
    expect(page.locator("#passages > li")).to_have_count(1)
    answer(page, 2)

    told.tell([told_document(1), told_document(2)])

    again = page.get_by_role("button", name="Search again: documents were added")
    expect(again).to_be_visible()
    assert again.evaluate("(one) => one.getBoundingClientRect().height") >= 44
    expect(page.locator("#passages > li")).to_have_count(1)
    again.press("Enter")
    expect(page.locator("#passages > li")).to_have_count(2)
    expect(again).to_be_hidden()
    expect(page.locator("#search-note")).to_have_text("2 passages")
    expect(page.locator("#search-note")).to_be_focused()


@pytest.mark.parametrize(
    ("number", "note", "now", "later"),
    [
        (
            0,
            "Nothing found: no passage has a word of the query.",
            "Nothing found: no passage has a word of the query. 1 document is still on the way.",
            "Nothing found: no passage has a word of the query. Documents have become ready since then.",
        ),
        (
            2,
            ONLY_NEAR,
            f"2 passages. {ONLY_NEAR} 1 document is still on the way.",
            f"2 passages. {ONLY_NEAR} Documents have become ready since then.",
        ),
        (
            0,
            None,
            "Nothing found for “heron”. 1 document is still on the way.",
            "Nothing found for “heron”. Documents have become ready since then.",
        ),
        (
            0,
            NO_WORD,
            f"{NO_WORD} 1 document is still on the way.",
            f"{NO_WORD} Documents have become ready since then.",
        ),
    ],
)
def test_what_is_said_of_a_search_stays_true(
    page: Page, number: int, note: str | None, now: str, later: str
) -> None:
    """What explains it is kept: it is true of the documents that there were, and there are others since."""
    told = Told(page)
    told.tell([told_document(1), told_document(2, "embedding")])
    answer(page, number, note)
    search(page, "heron")
    expect(page.locator("#search-note")).to_have_text(now)

    told.tell([told_document(1), told_document(2)])

    expect(page.locator("#search-note")).to_have_text(later)
    expect(page.locator("#search-again")).to_be_visible()


def test_sentences_about_passages_end(page: Page) -> None:
    """The count and what the server has to say are two sentences."""
    Told(page).tell([told_document(1)])
    expect(page.locator("#documents > li")).to_have_count(1)
    answer(page, 10, ONLY_NEAR, has_more=True)
    search(page, "heron")

    expect(page.locator("#search-note")).to_have_text(f"The first 10 passages. {ONLY_NEAR}")


def test_a_passage_that_is_only_near_in_meaning_says_so(page: Page) -> None:
    """Where others have a word of the query, nobody takes it for one of them."""
    Told(page).tell([told_document(1)])
    passages = [told_passage(1), told_passage(2, is_near=True)]
    found = {"passages": passages, "words": [], "note": None, "has_more": False}
    page.route("**/api/search?*", lambda route: route.fulfill(json=found))

    search(page, "heron")

    expect(page.locator("#passages > li").first).not_to_contain_text("Near in meaning")
    expect(page.locator("#passages > li").last).to_contain_text("Near in meaning")


def test_a_search_that_the_server_does_not_answer_is_made_again(page: Page) -> None:
    """What was found before stays until then, and is told from what was asked."""
    told = Told(page)
    told.tell([told_document(1)])
    answer(page)
    search(page, "heron")
    expect(page.locator("#passages > li")).to_have_count(1)
    page.unroute("**/api/search?*")
    page.route("**/api/search?*", lambda route: route.abort())
    search(page, "egret")

    expect(page.locator("#search-note")).to_have_text(
        "The server does not answer. What is below was found for “heron”."
        " “egret” is asked again when the server is back."
    )
    expect(page.locator("#passages > li")).to_have_count(1)
    answer(page, 2)
    told.tell([told_document(1)])

    expect(page.locator("#passages > li")).to_have_count(2)
    expect(page.locator("#search-note")).to_have_text("2 passages")
    expect(page.locator("#search-note")).not_to_have_class("note error")


def test_passages_of_a_document_that_goes_are_marked(page: Page) -> None:
    """Whoever deletes it; and who opens one all the same is told so, in a dialog that has a name."""
    told = Told(page)
    told.tell([told_document(1), told_document(2)])
    answer(page, 2)
    search(page, "heron")
    passages = page.locator("#passages > li")
    expect(passages).to_have_count(2)

    told.tell([told_document(2)])

    expect(passages.first).to_contain_text("no longer here")
    expect(passages.last).not_to_contain_text("no longer here")
    page.route(
        "**/api/documents/1**", lambda route: route.fulfill(status=404, json={"detail": "It is gone."})
    )
    passages.first.locator(".source").click()
    expect(page.get_by_role("dialog", name="This document is no longer here")).to_be_visible()
    expect(page.locator("#reader-text")).to_have_text("It was deleted, or a newer version has replaced it.")


def test_a_document_that_is_replaced_leaves_results_that_say_so(page: Page) -> None:
    """From the upload, which tells what goes, to the passages of the newer version."""
    add(page, "CHANGES.md", "The heron is of the first version.")
    is_in_state(page, "CHANGES.md", "Ready")
    search(page, "heron")
    passage = page.locator("#passages > li")
    expect(passage).to_contain_text("first version")

    add(page, "CHANGES.md", "The heron is of the second version.")

    expect(page.locator("#uploads > li > span")).to_have_text(
        "CHANGES.md replaces the version that was here."
    )
    expect(passage).to_contain_text("no longer here", timeout=PATIENT_MS)
    page.get_by_role("button", name="Search again: documents were added").click()
    expect(passage).to_contain_text("second version")
    expect(passage).not_to_contain_text("no longer here")


def test_an_empty_search_goes_back_to_the_beginning(page: Page, service: Service) -> None:
    """As the cross in the field empties it, which can be seen."""
    answer(page)
    search(page, "heron")
    expect(page.locator("#passages > li")).to_have_count(1)
    field = page.locator("#query")
    box = field.bounding_box()
    assert box is not None

    # The cross can be clicked once the pointer is over the field, and the field stands still.
    field.hover(position={"x": box["width"] - 20, "y": box["height"] / 2})
    field.click(position={"x": box["width"] - 20, "y": box["height"] / 2})
    expect(field).to_have_value("")
    field.press("Enter")

    expect(page.locator("#passages > li")).to_have_count(0)
    expect(page.locator("#search-empty")).to_be_visible()
    expect(page).to_have_url(service.url)
    expect(field).to_be_focused()
    page.go_back()
    expect(page.locator("#passages > li")).to_have_count(1)


def test_a_passage_is_copied_with_its_citation(page: Page) -> None:
    """For a letter or a report: the exact words, and where they stand."""
    Told(page).tell([told_document(1)])
    answer(page)
    search(page, "heron")
    copy = page.get_by_role("button", name="Copy the passage from a.md")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])

    copy.click()

    expect(copy).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "“Passage 0.”\na.md"
    expect(page.locator("#announcer")).to_have_text("Copied.")
    expect(copy).to_have_text("Copy")


def test_a_clipboard_that_is_refused_is_told(page: Page) -> None:
    """Nobody is to paste something else without noticing."""
    Told(page).tell([told_document(1)])
    answer(page)
    search(page, "heron")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('refused')); }")

    page.get_by_role("button", name="Copy the passage from a.md").click()

    expect(page.locator("#passages .foot")).to_have_text("Not copied: the browser does not allow it")
