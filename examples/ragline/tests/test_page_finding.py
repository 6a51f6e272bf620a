"""The page in a real browser: a long document is overviewed by its headings and searched as a whole."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Browser, Locator, Page, expect

from pages import Service, add, browser, document, is_in_state, page, service

__all__ = ["browser", "page", "service"]  # fixtures

FILLING = "Nothing of note is said in this sentence 🦤. " * 60
LONG = "\n\n".join(
    f"{'#' * (1 + bool(number % 3))} Chapter {number}\n\n{FILLING}The wren\nno. {number} sings. {FILLING}"
    for number in range(12)
)

PLACE = """
(text) => {
    const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
    const range = document.createRange();
    while (walker.nextNode()) {
        const at = walker.currentNode.data.indexOf("no. 11 sings");
        if (at < 0) continue;
        range.setStart(walker.currentNode, at);
        range.setEnd(walker.currentNode, at + 1);
        return range.getBoundingClientRect().top;
    }
    return NaN;
}
"""


def read(page: Page, name: str, content: str = LONG) -> Locator:
    """Add a document and open it; its text."""
    add(page, name, content)
    is_in_state(page, name, "Ready")
    document(page, name).get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#reader-title")).to_have_text(name)
    expect(page.locator("#reader-text")).not_to_have_text("…")
    return page.locator("#reader-text")


def test_the_headings_of_a_document_lead_to_their_places(page: Page) -> None:
    """Also to those that are not shown yet; the keyboard opens them, and goes on where they lead."""
    text = read(page, "chapters.md")
    expect(text).not_to_contain_text("Chapter 11")
    outline = page.locator("#outline")
    expect(outline.locator("summary")).to_have_text("Outline 12")

    outline.locator("summary").press("Enter")
    headings = outline.get_by_role("navigation", name="Outline").get_by_role("button")
    expect(headings).to_have_text([f"Chapter {number}" for number in range(12)])
    left = [heading.evaluate("(one) => one.getBoundingClientRect().left") for heading in headings.all()[:4]]
    assert left[0] == left[3] < left[1] == left[2]
    headings.nth(11).press("Enter")

    mark = text.locator("mark")
    expect(mark).to_have_text("## Chapter 11")
    expect(mark).to_be_focused()
    expect(mark).to_be_in_viewport(ratio=1)
    expect(headings.first).to_be_hidden()
    outline.locator("summary").click()
    headings.nth(10).click()
    expect(mark).to_have_text("## Chapter 10")
    expect(mark).to_be_in_viewport(ratio=1)
    page.locator("#reader-before").click()
    expect(mark).to_be_in_viewport(ratio=1)


def test_a_document_of_few_headings_has_no_outline(page: Page) -> None:
    """Nor one that was opened after one that has."""
    read(page, "chapters.md")
    expect(page.locator("#outline")).to_be_visible()
    page.keyboard.press("Escape")

    read(page, "two.md", "# One\n\nText.\n\n# Two\n\nText.\n")

    expect(page.locator("#outline")).to_be_hidden()


def test_words_are_found_in_the_whole_of_a_document(page: Page) -> None:
    """One place after the other and back, around its ends, whatever part of it is shown; the focus stays in the field."""
    text = read(page, "chapters.md")
    field, said, mark = (
        page.get_by_label("Find in this document"),
        page.locator("#find-said"),
        text.locator("mark"),
    )

    field.fill("the WREN no.")
    field.press("Enter")
    expect(mark).to_have_text("The wren\nno.")
    expect(said).to_contain_text("1 of 12")
    expect(said).to_contain_text("no. 0 sings")
    field.press("Enter")
    field.press("Enter")
    expect(said).to_contain_text("3 of 12")
    expect(said).to_contain_text("no. 2 sings")
    expect(mark).to_be_in_viewport(ratio=1)
    expect(field).to_be_focused()
    for _ in range(3):
        field.press("Shift+Enter")
    expect(said).to_contain_text("12 of 12")
    expect(said).to_contain_text("no. 11 sings")
    expect(mark).to_have_text("The wren\nno.")
    expect(mark).to_be_in_viewport(ratio=1)
    page.get_by_role("button", name="Next place").click()
    expect(said).to_contain_text("no. 0 sings")
    field.fill("no such words")
    field.press("Enter")
    expect(said).to_have_text("Not found")
    page.get_by_role("button", name="Previous place").click()
    expect(said).to_have_text("Not found")


def test_what_was_found_is_forgotten_when_other_words_are_typed(page: Page) -> None:
    """Neither the count nor the mark is of them; what comes before is read on from there all the same."""
    text = read(page, "chapters.md")
    field, said = page.get_by_label("Find in this document"), page.locator("#find-said")
    field.fill("wren")
    field.press("Shift+Enter")
    expect(said).to_contain_text("12 of 12")
    expect(text.locator("mark")).to_have_text("wren")
    scrolled = text.evaluate("(one) => one.scrollTop")

    field.press_sequentially("s")
    expect(said).to_have_text("")
    expect(text.locator("mark")).to_have_count(0)
    assert text.evaluate("(one) => one.scrollTop") == scrolled
    place = text.evaluate(PLACE)
    page.locator("#reader-before").click()
    expect(text).to_contain_text("no. 10 sings")
    assert abs(text.evaluate(PLACE) - place) < 3

    field.fill("wren")
    field.press("Enter")
    expect(text.locator("mark")).to_have_text("wren")
    field.press("Escape")
    expect(field).to_have_value("")
    expect(said).to_have_text("")
    expect(text.locator("mark")).to_have_count(0)


def test_what_was_looked_for_in_a_document_is_not_looked_for_in_the_next(page: Page) -> None:
    """The field is empty again, and finds what stands there."""
    read(page, "chapters.md")
    field, said = page.get_by_label("Find in this document"), page.locator("#find-said")
    field.fill("wren")
    field.press("Enter")
    expect(said).to_contain_text("1 of 12")
    page.get_by_role("button", name="Close").click()

    read(page, "short.md", "A wren, and another Wren (once more).")

    expect(field).to_have_value("")
    expect(said).to_have_text("")
    field.fill("wren (once")
    field.press("Enter")
    expect(said).to_contain_text("1 of 1")


def test_a_document_is_searched_with_a_finger(browser: Browser, service: Service) -> None:
    """All that is pressed for it is large enough, and its text keeps room on a phone."""
    options = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.goto(service.url)
        text = read(page, "chapters.md")
        page.get_by_label("Find in this document").fill("wren")
        page.get_by_role("button", name="Next place").tap()
        expect(page.locator("#find-said")).to_contain_text("1 of 12")
        page.locator("#outline summary").tap()
        small = page.evaluate(
            """() => [...document.querySelectorAll("#reader :is(button, a, input, summary)")]
                .filter((one) => one.checkVisibility())
                .map((one) => [one.id || one.textContent, one.getBoundingClientRect()])
                .filter(([, box]) => box.height < 44 || box.width < 44)
                .map(([name, box]) => `${name}: ${box.width} x ${box.height}`)"""
        )
        assert small == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.locator("#outline summary").tap()
        box = text.bounding_box()
        assert box is not None
        assert box["height"] > 844 / 2
