"""The page in a real browser: long documents are read on without being drawn anew, and found in from where one reads."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Browser, Page, expect

from pages import Service, add, browser, document, is_in_state, page, search, service

__all__ = ["browser", "page", "service"]  # fixtures

MIXED = "".join(
    f"## Section {at}\n\nThe plover 🐦 of section {at} runs along the shore.\n\n```\nplover = {at}\n```\n\n"
    f"| place | plovers |\n|---|---|\n| shore {at} | {at} |\n\n"
    for at in range(170)
)
TABLE = "place,plovers,remark\n" + "".join(f"shore {at},{at},seen at low tide\n" for at in range(600))
CODE = "\n\n".join(f"def plover_{at}(shore):\n    return shore * {at}" for at in range(400))
PROSE = "\n\n".join(f"Paragraph {at}. " + "The plover runs along the shore. " * 6 for at in range(90))


def open_document(page: Page, name: str, content: str) -> None:
    """Add a document, and read it from its beginning."""
    add(page, name, content)
    is_in_state(page, name, "Ready")
    document(page, name).get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#reader-after")).to_be_visible()


def read_on(page: Page) -> None:
    """Read on by one piece."""
    share = page.locator("#reader-share").text_content() or ""
    page.locator("#reader-after").click()
    expect(page.locator("#reader-share")).not_to_have_text(share)


@pytest.mark.parametrize(
    ("name", "content", "kept"),
    [
        ("mixed.md", MIXED, "#reader-text .table"),
        ("table.csv", TABLE, "#reader-text .row"),
        ("code.py", CODE, "#reader-text > *"),
        ("prose.txt", PROSE, "#reader-text > *"),
    ],
)
def test_what_is_read_stays_as_it_is_when_more_is_read_on(
    page: Page, name: str, content: str, kept: str
) -> None:
    """A page that draws 300,000 characters anew for each 6,000 lags; what is drawn on looks as drawn at once."""
    open_document(page, name, content)
    read_on(page)
    page.evaluate("(kept) => { window.kept = document.querySelector(kept); }", kept)
    while page.locator("#reader-after").is_visible():
        read_on(page)

    assert page.evaluate("kept.isConnected")
    look = """() => {
        const text = document.getElementById("reader-text");
        getSelection().selectAllChildren(text);
        return [text.textContent, text.scrollHeight, getSelection().toString()];
    }"""
    drawn_on = page.evaluate(look)
    page.get_by_label("Find in this document").fill("plover")
    page.keyboard.press("Enter")
    expect(page.locator("#reader-text mark")).to_be_visible()
    page.get_by_label("Find in this document").fill("")  # what was marked is drawn anew without the mark
    expect(page.locator("#reader-text mark")).to_have_count(0)
    assert drawn_on == page.evaluate(look)


def test_who_copies_a_long_text_gets_its_lines(page: Page) -> None:
    """The parts that it is drawn in are not seen in what is copied."""
    content = PROSE.replace("plover", "lapwing")
    open_document(page, "copied.txt", content)
    while page.locator("#reader-after").is_visible():
        read_on(page)

    copied = page.evaluate(
        "() => { getSelection().selectAllChildren(document.getElementById('reader-text'));"
        " return getSelection().toString(); }"
    )
    assert copied.strip() == content.strip()


def test_words_are_found_from_where_one_reads(page: Page) -> None:
    """Not from where the text begins that is here, nor from the end of what was scrolled by."""
    open_document(page, "found.txt", PROSE.replace("plover", "dunlin"))
    page.locator("#reader-text").evaluate("(text) => { text.scrollTop = text.scrollHeight / 2; }")
    seen = page.evaluate(
        """() => {
            const { left, top } = document.getElementById("reader-text").getBoundingClientRect();
            const { startContainer: node, startOffset: at } = document.caretRangeFromPoint(left + 10, top + 12);
            return node.textContent.slice(at).match(/Paragraph (\\d+)/)[1];
        }"""
    )

    page.get_by_label("Find in this document").fill("paragraph")
    page.keyboard.press("Enter")

    expect(page.locator("#find-said")).to_have_text(re.compile(rf"^{int(seen) + 1} of 90"))
    page.keyboard.press("Shift+Enter")
    expect(page.locator("#find-said")).to_have_text(re.compile(rf"^{int(seen)} of 90"))


def test_a_passage_comes_before_what_is_found_behind_it(page: Page) -> None:
    """Who has opened a passage and looks for a word is led on from there."""
    content = PROSE.replace("plover", "sanderling").replace("Paragraph 45. ", "Paragraph 45. The phalarope. ")
    add(page, "behind.txt", content)
    is_in_state(page, "behind.txt", "Ready")
    search(page, "phalarope")
    page.locator(".source").first.click()
    mark = page.locator("#reader-text mark").first
    expect(mark).to_contain_text("phalarope")
    first = re.search(r"Paragraph (\d+)", page.locator("#reader-text").locator("mark").all_text_contents()[0])
    assert first is not None

    page.get_by_label("Find in this document").fill("paragraph")
    page.keyboard.press("Enter")

    expect(page.locator("#find-said")).to_have_text(re.compile(rf"^{int(first[1]) + 1} of 90"))


def test_what_is_found_has_the_text_before_it(page: Page) -> None:
    """Also at the very beginning of the text that is here: of half a sentence nobody can tell what it says."""
    words = " ".join(f"Sentence {at} of the godwit." for at in range(2000))
    add(page, "edge.txt", words)
    is_in_state(page, "edge.txt", "Ready")
    number = page.locator("#documents > li").first.get_attribute("data-id")
    start = words.index("Sentence 1000 ") - 3
    origin = page.url.split("?")[0]
    page.goto(f"{origin}?document={number}&start={start + 700}&end={start + 720}")
    expect(page.locator("#reader-text mark")).to_be_visible()

    page.get_by_label("Find in this document").fill("sentence 1000 of")
    page.keyboard.press("Enter")

    expect(page.locator("#reader-text mark")).to_have_text("Sentence 1000 of")
    expect(page.locator("#reader-text")).to_contain_text(
        "Sentence 998 of the godwit. Sentence 999 of the godwit."
    )


def test_the_words_of_the_search_stand_out_again_after_a_reload(page: Page) -> None:
    """And for whom the address was sent to: it has the search in it."""
    add(page, "again.md", "The wryneck turns its head, and the wrynecks call.")
    is_in_state(page, "again.md", "Ready")
    search(page, "wryneck")
    page.locator(".source").first.click()
    expect(page.locator("#reader-text mark")).to_be_visible()
    words = "() => [...(CSS.highlights.get('asked') ?? [])].map((one) => one.startContainer.data.slice(one.startOffset, one.endOffset))"
    assert page.evaluate(words) == ["wryneck", "wrynecks"]

    page.reload()

    expect(page.locator("#reader-text mark")).to_be_visible()
    assert page.evaluate(words) == ["wryneck", "wrynecks"]
    page.keyboard.press("Escape")
    expect(page.locator("#reader")).to_be_hidden()
    page.go_forward()
    expect(page.locator("#reader-text mark")).to_be_visible()
    assert page.evaluate(words) == ["wryneck", "wrynecks"]


@pytest.mark.parametrize(
    ("width", "height", "is_phone", "share"),
    [(844, 390, True, 0.45), (667, 375, True, 0.45), (720, 450, False, 0.6), (360, 225, False, 0.6)],
)
def test_a_low_window_is_for_the_text(
    browser: Browser, service: Service, width: int, height: int, is_phone: bool, share: float
) -> None:
    """On a phone held sideways, and with letters of 200 % and 400 % (WCAG 2.2, 1.4.10), a passage is read."""
    with browser.new_context(
        viewport={"width": width, "height": height}, has_touch=is_phone, is_mobile=is_phone
    ) as context:
        page = context.new_page()
        page.goto(service.url)
        chapters = "\n\n".join(f"## Chapter {at}\n\n" + "The turnstone turns. " * 20 for at in range(30))
        add(page, "low.md", f"{chapters}\n\nThe knot flies.\n\n{chapters}")
        is_in_state(page, "low.md", "Ready")
        search(page, "knot flies")
        page.locator(".source").first.click()
        expect(page.locator("#outline")).to_be_visible()
        expect(page.locator("#reader-before")).to_be_visible()

        seen = page.locator("#reader-text").evaluate(
            """(text) => {
                const { top, bottom } = text.getBoundingClientRect();
                return Math.min(bottom, innerHeight) - Math.max(top, 0);
            }"""
        )

        assert seen >= share * height
        expect(page.locator("#reader-text mark").first).to_be_in_viewport()
        page.locator("#reader-places").scroll_into_view_if_needed()
        expect(page.locator("#reader-places")).to_be_in_viewport()
        assert page.evaluate("document.getElementById('reader').scrollWidth <= innerWidth")
