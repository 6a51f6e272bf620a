"""The page in a real browser: what it says of documents, workers and steps agrees at every moment."""

from __future__ import annotations

import re
from typing import Literal

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Page, expect

from pages import Told, browser, contrast, document, page, service, told_document

__all__ = ["browser", "page", "service"]  # fixtures


def test_the_steps_to_do_never_contradict_the_documents_that_wait(page: Page) -> None:
    """Messages are counted more rarely than documents: each that waits is at least one step, and none is none."""
    told = Told(page)
    waiting = [told_document(number, "queued") for number in range(6)]

    told.tell(waiting)
    expect(page.locator("#banner")).to_contain_text("No worker is running: 6 documents wait.")
    expect(page.locator("#vital-steps dd")).to_have_text("6")
    told.tell([told_document(0)], messages={"waiting": 3, "owed": 4, "dead": 0}, workers=["one"])
    expect(page.locator("#vital-workers dd")).to_have_text("1")
    expect(page.locator("#vital-steps dd")).to_have_text("0")


def test_documents_without_a_worker_wait_wherever_they_are(page: Page) -> None:
    """Nobody is working: neither the filter nor a document that a worker left half done says so."""
    told = Told(page)

    told.tell([told_document(1, "queued"), told_document(2, "splitting")])

    expect(page.locator("#filters")).to_contain_text("Waiting2")
    expect(page.locator("#filters")).not_to_contain_text("Working")
    expect(page.locator("#documents .state")).to_have_text(["Waits for a worker"] * 2)


def test_a_document_that_moves_tells_of_a_worker_that_has_not_answered_yet(page: Page) -> None:
    """The banner goes at once, the count of workers says that there is one, and documents are worked on."""
    told = Told(page)
    told.tell([told_document(1, "queued")])
    expect(page.locator("#banner")).to_be_visible()

    told.tell([told_document(1, "splitting")], is_worked_on=True)

    expect(page.locator("#documents .state")).to_have_text("Splitting")
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#vital-workers dd")).to_have_text("1+")
    expect(page.locator("#filters")).to_contain_text("Working1")
    assert page.locator("body.workerless").count() == 0


def test_a_new_version_is_told_from_the_one_that_is_found(page: Page) -> None:
    """In the list, and before it is deleted."""
    told = Told(page)
    told.tell([told_document(1), told_document(2, "failed", is_newer=True, name="1.md")])

    expect(page.locator("#documents .document").first).to_contain_text(
        "a new version; the one before is still found"
    )
    expect(page.locator("#documents .document").last).not_to_contain_text("version")
    page.locator("#documents .document").first.get_by_role("button", name="Delete").click()
    expect(page.locator("#confirm-words")).to_have_text("The version before it stays. This cannot be undone.")


def test_documents_on_the_way_are_counted_together(page: Page) -> None:
    """How many of all are ready, and how far each is, in words that can be seen."""
    told = Told(page)
    told.tell(
        [told_document(1), told_document(2, "embedding", chunks=931, embedded=64), told_document(3, "failed")]
    )

    expect(page.locator("#overall")).to_contain_text("1 of 2 ready")
    assert (
        page.get_by_role("progressbar", name="1 of 2 ready").evaluate("(one) => one.value / one.max") == 0.5
    )
    expect(document(page, "2.md")).to_contain_text("64 of 931 passages")
    told.tell([told_document(1), told_document(2, chunks=931, embedded=931), told_document(3, "failed")])
    expect(page.locator("#overall")).to_be_hidden()
    expect(document(page, "2.md")).to_contain_text("· 931 passages")


GROUNDS = """
() => Object.fromEntries(Object.entries({
    page: "body",
    pressed: "#filters [aria-pressed=true]",
    other: "#filters [aria-pressed=false]",
    done: ".track .done i",
    bar: "#overall-bar",
}).map(([name, selector]) => [name, getComputedStyle(document.querySelector(selector)).backgroundColor]))
"""
DOTS = """
() => [...document.querySelectorAll("#documents .state")].map((one) => {
    const dot = getComputedStyle(one, "::before");
    return [dot.backgroundColor, dot.borderTopWidth, dot.borderLeftWidth, dot.borderLeftColor, dot.rotate].join(" ");
})
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_states_can_be_seen_in_colours_that_the_system_forces(
    page: Page, scheme: Literal["light", "dark"]
) -> None:
    """As with high contrast in Windows, where backgrounds are taken away that do not tell of themselves."""
    page.emulate_media(forced_colors="active", color_scheme=scheme)
    told = Told(page)
    states = ["ready", "failed", "paused", "embedding", "cancelled"]
    told.tell([told_document(number, state) for number, state in enumerate(states, 1)])
    expect(page.locator("#documents > li")).to_have_count(5)

    grounds = page.evaluate(GROUNDS)

    assert grounds["pressed"] not in (grounds["page"], grounds["other"])
    assert grounds["done"] != grounds["page"]
    for selector in (".track span", "#overall-bar"):
        assert contrast(page, selector, "borderTopColor") >= 3
    dots = page.evaluate(DOTS)
    assert len(set(dots)) == len(states), dots
    hollow = "rgba(0, 0, 0, 0) 0px 0px"
    assert all(grounds["page"] not in dot and not dot.startswith(hollow) for dot in dots), dots


def test_a_state_tells_since_when(page: Page) -> None:
    """To who points at it: the list shows the newest first, and not how old they are."""
    told = Told(page)
    told.tell(
        [told_document(1, "failed", since="2031-05-04T10:00:00Z", reason="It is torn."), told_document(2)]
    )

    expect(document(page, "1.md").locator(".state")).to_have_attribute("title", re.compile(r"^since .*2031"))
    expect(document(page, "2.md").locator(".state")).to_have_attribute("title", "")
