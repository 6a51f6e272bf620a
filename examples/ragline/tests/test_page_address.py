"""The page in a real browser: which documents are shown, and in which order, is part of its address, and one without a page."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Browser, Page, expect
from test_page_reading import seed

from pages import (
    PATIENT_MS,
    Service,
    Told,
    add,
    browser,
    contrast,
    is_in_state,
    page,
    search,
    service,
    told_document,
)

__all__ = ["browser", "page", "service"]  # fixtures

SOME = [told_document(1), told_document(2, "failed"), told_document(3, "failed"), told_document(4)]


def test_filter_and_order_of_documents_are_in_the_address(page: Page, service: Service) -> None:
    """A reload, and whoever is sent the address, shows the same list beside the same search."""
    Told(page).tell(SOME)
    names = page.locator("#documents .name")
    page.locator("#filters").get_by_role("button", name="Failed").click()
    page.get_by_label("Sort by").select_option("Oldest first")
    page.get_by_label("Filter by name or folder").fill("3.MD")
    expect(page).to_have_url(f"{service.url}?show=failed&order=oldest&called=3.MD")
    page.get_by_label("Filter by name or folder").fill(".md")
    expect(page).to_have_url(f"{service.url}?show=failed&order=oldest&called=.md")
    search(page, "heron")
    expect(page).to_have_url(f"{service.url}?show=failed&order=oldest&called=.md&q=heron")

    Told(page).tell(SOME)  # to the page as it opens at this address

    expect(names).to_have_text(["2.md", "3.md"])
    expect(page.locator("#filters [aria-pressed=true]")).to_have_text("Failed2 of 2")
    expect(page.get_by_label("Sort by")).to_have_value("oldest")
    expect(page.get_by_label("Filter by name or folder")).to_have_value(".md")
    page.get_by_label("Sort by").select_option("Newest first")
    page.get_by_label("Filter by name or folder").fill("")
    page.locator("#filters").get_by_role("button", name="All").click()
    expect(page).to_have_url(f"{service.url}?q=heron")
    expect(names).to_have_count(4)


def test_back_leads_to_the_list_that_was_there(page: Page, service: Service) -> None:
    """Choosing is no step of its own; a document that is opened and closed leaves the list as it is."""
    Told(page).tell(SOME)
    names = page.locator("#documents .name")
    page.locator("#filters").get_by_role("button", name="Ready").click()
    expect(names).to_have_text(["4.md", "1.md"])
    search(page, "heron")
    expect(page).to_have_url(f"{service.url}?show=ready&q=heron")
    page.locator("#filters").get_by_role("button", name="All").click()
    expect(names).to_have_count(4)

    page.go_back()
    expect(page).to_have_url(f"{service.url}?show=ready")
    expect(names).to_have_text(["4.md", "1.md"])
    page.go_forward()
    expect(names).to_have_count(4)
    page.go_back()
    names.first.click()
    expect(page.locator("#reader")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page).to_have_url(f"{service.url}?show=ready")
    page.goto(f"{service.url}?show=ready&document=999")
    expect(page.locator("#reader-title")).to_have_text("This document is no longer here")
    page.get_by_role("button", name="Close").click()
    expect(page).to_have_url(f"{service.url}?show=ready")


def test_back_leads_on_after_a_document_that_was_reloaded_is_closed(page: Page, service: Service) -> None:
    """It was opened from here before: closing it is a step back, and leaves none that changes nothing."""
    add(page, "avocet.md", "The avocet sweeps its bill.")
    is_in_state(page, "avocet.md", "Ready")
    search(page, "avocet")
    page.locator(".source").first.click()
    expect(page.locator("#reader-text mark")).to_be_visible()

    page.reload()
    expect(page.locator("#reader-text mark")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page).to_have_url(f"{service.url}?q=avocet")
    page.go_back()

    expect(page).to_have_url(service.url)
    expect(page.locator("#passages > li")).to_have_count(0)


def test_what_an_address_says_that_does_not_exist_is_left_out(page: Page, service: Service) -> None:
    """No such filter, no such order, and a filter whose last document is gone: all are shown, and the address says so."""
    page.goto(f"{service.url}?show=constructor&order=toString")
    told = Told(page)
    told.tell(SOME)
    names = page.locator("#documents .name")
    expect(names).to_have_text(["1.md", "2.md", "3.md", "4.md"][::-1])
    page.locator("#filters").get_by_role("button", name="Failed").click()
    expect(names).to_have_count(2)

    told.tell([told_document(1)])

    expect(names).to_have_count(1)
    expect(page).to_have_url(service.url)


def test_a_place_that_a_document_does_not_have_opens_it_from_its_beginning(
    page: Page, service: Service
) -> None:
    """A range that begins behind the end, is empty or is none: the document is there all the same."""
    add(page, "plover.md", "The plover nests on the ground.")
    is_in_state(page, "plover.md", "Ready")
    number = page.locator("#documents > li").first.get_attribute("data-id")

    for start, end in ((999999, 9999999), (5, 5), (5, 2), (3, 99999999999)):
        page.goto(f"{service.url}?document={number}&start={start}&end={end}")

        expect(page.locator("#reader-title")).to_have_text("plover.md")
        expect(page.locator("#reader-text")).to_have_text("The plover nests on the ground.")
        expect(page.locator("#reader-text mark")).to_have_count(0)


def test_an_address_lists_documents_that_the_page_does_not_know(browser: Browser, tmp_path: Path) -> None:
    """The server lists them in the order that is asked for, also after the connection was lost."""
    seed(tmp_path, 900)
    service = Service(tmp_path)
    try:
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(f"{service.url}?order=oldest&called=6")
            names = page.locator("#documents .name")
            expect(names.first).to_have_text("0896.md", timeout=PATIENT_MS)
            expect(names).to_have_count(50)
    finally:
        service.stop()


def test_an_address_without_a_page_leads_to_the_start(browser: Browser, service: Service) -> None:
    """In the looks of the page, however deep the address is."""
    with browser.new_context(viewport={"width": 390, "height": 844}) as context:
        page = context.new_page()
        answer = page.goto(f"{service.url}no/such/page")
        assert answer is not None
        assert answer.status == 404
        expect(page.get_by_role("heading", name="There is nothing at this address")).to_be_visible()
        assert contrast(page, ".missing p") >= 4.5
        start = page.get_by_role("link", name="Go to the start")
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            box = start.bounding_box()
            assert box is not None
            assert box["height"] < 60
            assert box["y"] < 300
        start.click()
        expect(page.locator("#query")).to_be_visible()
