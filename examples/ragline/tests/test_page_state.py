"""The page in a real browser: what it says of documents, workers and steps agrees at every moment."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Page, expect

from pages import Told, browser, page, service, told_document

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
