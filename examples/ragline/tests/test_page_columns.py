"""The page in a real browser: results and documents are each reached without scrolling past the other."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Page, expect

from pages import Told, browser, page, search, service, told_document, told_passage

__all__ = ["browser", "page", "service"]  # fixtures


def fill(page: Page) -> None:
    """Many documents, and as many passages as a search gives."""
    Told(page).tell([told_document(number) for number in range(60, 0, -1)])
    passages = [told_passage(number, quote="A heron is long. " * 25) for number in range(10)]
    found = {"passages": passages, "note": None, "has_more": True}
    page.route("**/api/search?*", lambda route: route.fulfill(json=found))
    expect(page.locator("#documents > li")).to_have_count(50)


def test_results_and_documents_scroll_each_on_their_own(page: Page) -> None:
    """Beside each other on a desktop: who is at the end of one has the beginning of the other, and the search."""
    page.set_viewport_size({"width": 1280, "height": 800})
    fill(page)
    search(page, "heron")
    expect(page.locator("#passages > li")).to_have_count(10)

    page.mouse.move(300, 500)
    page.mouse.wheel(0, 20_000)
    expect(page.locator("#more-passages")).to_be_in_viewport()
    expect(page.locator("#query")).to_be_in_viewport()
    expect(page.locator("#documents > li").first).to_be_in_viewport()
    page.mouse.move(1000, 500)
    page.mouse.wheel(0, 20_000)
    expect(page.locator("#older")).to_be_in_viewport()
    expect(page.locator("#select-all")).to_be_in_viewport()
    expect(page.locator("#more-passages")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    for held, column in ((".chosen", ".documents"), ("#search", ".questions")):
        top = "(one) => one.getBoundingClientRect().top"
        assert page.locator(held).evaluate(top) <= page.locator(column).evaluate(top), (
            held
        )  # nothing peeks out above it
    search(page, "another heron")
    expect(page.locator("#passages > li").first).to_be_in_viewport()


def test_each_column_is_scrolled_with_the_keyboard(page: Page) -> None:
    """It takes the focus where it scrolls, and there alone; what has the focus is under nothing else."""
    page.set_viewport_size({"width": 1280, "height": 800})
    fill(page)
    for column in page.locator("main > section").all():
        expect(column).to_have_attribute("tabindex", "0")
        column.focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Shift+Tab")
        expect(column).to_be_focused()
    page.keyboard.press("End")
    expect(page.locator("#older")).to_be_in_viewport()

    page.locator("#documents .name").last.focus()
    for _ in range(60):
        page.keyboard.press("Shift+Tab")
        is_seen = page.evaluate(
            """() => {
                const one = document.activeElement;
                const { left, top, width, height } = one.getBoundingClientRect();
                const seen = document.elementFromPoint(left + width / 2, top + height / 2);
                return one.contains(seen) || seen?.contains(one);
            }"""
        )
        assert is_seen, page.evaluate("document.activeElement.outerHTML")
    page.set_viewport_size({"width": 390, "height": 844})
    expect(page.locator("main > section").first).not_to_have_attribute("tabindex", "0")


@pytest.mark.parametrize("width", [390, 800])
def test_the_way_to_the_documents_stays_in_sight_on_a_phone(page: Page, width: int) -> None:
    """After a search, and from the end of the documents back to it; with the focus, and without leaving the search."""
    page.set_viewport_size({"width": width, "height": 844})
    fill(page)
    search(page, "heron")
    expect(page.locator("#passages > li")).to_have_count(10)
    address = page.url
    ways = page.get_by_role("navigation", name="On this page")

    page.locator("#passages > li").nth(5).scroll_into_view_if_needed()
    ways.get_by_role("link", name="Documents 60").click()
    expect(page.locator("#choose-files")).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("heading", name="Documents")).to_be_focused()
    expect(page.get_by_role("heading", name="Documents")).to_be_in_viewport(ratio=1)
    assert page.evaluate(
        """() => document.querySelector("#documents-title").getBoundingClientRect().top
            >= document.querySelector(".jump").getBoundingClientRect().bottom"""
    )
    page.locator("#older").scroll_into_view_if_needed()
    ways.get_by_role("link", name="Search").click()
    expect(page.locator("#query")).to_be_in_viewport(ratio=1)
    assert page.url == address


def test_who_has_no_documents_needs_no_way_to_them(page: Page) -> None:
    """Nor who sees both beside each other."""
    page.set_viewport_size({"width": 390, "height": 844})
    told = Told(page)
    told.tell([])
    expect(page.locator("body.bare")).to_be_visible()
    expect(page.locator(".jump")).to_be_hidden()

    told.tell([told_document(1)])
    expect(page.locator(".jump")).to_be_visible()
    page.set_viewport_size({"width": 1280, "height": 844})
    expect(page.locator(".jump")).to_be_hidden()
