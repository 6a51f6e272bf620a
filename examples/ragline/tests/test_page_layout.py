"""The page in a real browser: code and tables are laid out so that their columns line up."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Locator, Page, expect

from pages import add, browser, document, is_in_state, page, search, service

__all__ = ["browser", "page", "service"]  # fixtures

WIDE = "kestrel_value = [" + ", ".join(f"'a long line {number}'" for number in range(8)) + "]"
GUIDE = f"""# Guide

The kestrel is described in prose 🦅 here.

```python
for kestrel in flock:
    {WIDE}
```

| bird | wing span of it |
|---|---|
| kestrel | 76 |
| a much longer name of a kestrel | 5 |

That was all on it.
"""


def is_monospaced(one: Locator) -> bool:
    """Whether narrow letters take as much room as wide ones there."""
    return bool(
        one.evaluate(
            """(one) => {
                const width = (text) => {
                    const probe = one.appendChild(Object.assign(document.createElement("span"), {textContent: text}));
                    const { width } = probe.getBoundingClientRect();
                    probe.remove();
                    return width;
                };
                return Math.abs(width("iiiiiiii") - width("MMMMMMMM")) < 1;
            }"""
        )
    )


def lefts(block: Locator) -> list[list[float]]:
    """Where the cells of each row begin."""
    edges: list[list[float]] = block.evaluate(
        """(one) => [...one.querySelectorAll(".row")].map((row) => (
            [...row.children].map((cell) => Math.round(cell.getBoundingClientRect().left))))"""
    )
    return edges


def read(page: Page, name: str) -> Locator:
    """Open a document from the list; its text."""
    document(page, name).get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#reader-title")).to_have_text(name)
    expect(page.locator("#reader-text")).not_to_have_text("…")
    return page.locator("#reader-text")


def test_code_and_tables_of_a_document_line_up(page: Page) -> None:
    """As its author marked them, in the reader and in passages; prose stays as it is, and the text is the same."""
    add(page, "kestrel.md", GUIDE)
    is_in_state(page, "kestrel.md", "Ready")

    search(page, "kestrel")
    passage = page.locator("#passages > li").first
    for text in (passage.locator("blockquote"), read(page, "kestrel.md")):
        assert (text.text_content() or "").strip() == GUIDE.strip()
        code, table = text.locator(".code"), text.locator(".table")
        expect(code).to_contain_text("for kestrel in flock:")
        expect(code).to_contain_text("```python")
        assert is_monospaced(code)
        assert is_monospaced(table)
        assert not is_monospaced(text)
        rows = lefts(table)
        assert len(rows) == 4
        assert all(row[:2] == rows[0][:2] for row in rows), rows
    expect(passage.locator(".code mark").first).to_have_text("kestrel")


def test_a_long_line_of_code_scrolls_within_its_block(page: Page) -> None:
    """The page stays as wide as the screen, and who has a keyboard alone scrolls what is wider."""
    page.set_viewport_size({"width": 390, "height": 844})
    add(page, "kestrel.md", GUIDE)
    is_in_state(page, "kestrel.md", "Ready")
    search(page, "kestrel")
    code = page.locator("#passages .code")
    table = page.locator("#passages .table")

    expect(code).to_have_attribute("tabindex", "0")
    expect(code).to_have_accessible_name("Code")
    assert code.evaluate("(one) => one.scrollWidth > one.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    code.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.activeElement.scrollLeft > 0")
    page.set_viewport_size({"width": 1280, "height": 844})
    expect(table).not_to_have_attribute("tabindex", "0")


SIDES = """
([selector, words]) => {
    const box = document.querySelector(selector);
    const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    const range = document.createRange();
    while (walker.nextNode()) {
        const at = walker.currentNode.data.indexOf(words);
        if (at < 0) continue;
        range.setStart(walker.currentNode, at);
        range.setEnd(walker.currentNode, at + 1);
        const [first, { left, right }] = [range.getBoundingClientRect(), box.getBoundingClientRect()];
        return first.left + first.right > left + right ? "right" : "left";
    }
    return "nowhere";
}
"""
TWO_WAYS = """# כותרת

שורה בעברית, heron, ועוד מילים.

A line in English.

| heron | עמודה |
|---|---|
| 1 | 2 |

سطر بالعربية، heron، وكلمات أخرى.

```
code in عربي
```
"""


def test_text_is_read_in_the_direction_of_its_script(page: Page) -> None:
    """Each paragraph by itself, in the reader as on a card and in its heading; code begins on the left."""
    add(page, "two-ways.md", TWO_WAYS)
    is_in_state(page, "two-ways.md", "Ready")
    search(page, "heron")
    lines = {"שורה": "right", "A line": "left", "سطر": "right", "code in": "left"}

    expect(page.locator("#passages .block")).to_have_count(2)
    for words, side in lines.items():
        assert page.evaluate(SIDES, ["#passages blockquote", words]) == side
    assert page.evaluate(SIDES, ["#passages .section", "כותרת"]) == "right"
    page.locator(".source").first.click()
    expect(page.locator("#reader-text mark").first).to_be_visible()
    for words, side in lines.items():
        assert page.evaluate(SIDES, ["#reader-text", words]) == side


def test_source_code_is_read_as_it_is_written(page: Page) -> None:
    """The whole of it, also what is read on: a line is not divided where a piece of the text ends."""
    source = "".join(f"def falcon_{number}(one):\n    return one + {number}\n\n\n" for number in range(200))
    add(page, "falcon.py", source)
    is_in_state(page, "falcon.py", "Ready")

    search(page, "falcon_7")
    expect(page.locator("#passages blockquote .code").first).to_be_visible()
    text = read(page, "falcon.py")

    assert is_monospaced(text)
    page.locator("#reader-after").click()
    expect(text).to_contain_text("falcon_199")
    expect(text.locator(".block")).to_have_count(0)
    assert (text.text_content() or "").strip() == source.strip()
    page.keyboard.press("Escape")
    add(page, "prose.md", "The falcon in prose.")
    is_in_state(page, "prose.md", "Ready")
    assert not is_monospaced(read(page, "prose.md"))


def test_the_rows_of_a_file_of_values_line_up(page: Page) -> None:
    """Each part with its header row."""
    rows = "".join(f"merlin {'x' * (number % 7)},{number}\n" for number in range(20))
    add(page, "merlin.csv", f"name of the bird,count\n{rows}")
    is_in_state(page, "merlin.csv", "Ready")

    table = read(page, "merlin.csv").locator(".table").first

    edges = lefts(table)
    assert len(edges) > 10
    assert len({tuple(row) for row in edges}) == 1, edges
    assert is_monospaced(table)


def test_what_reads_like_a_table_in_prose_is_left_alone(page: Page) -> None:
    """A bar in a sentence, or in plain text, tells nothing."""
    plain = "The hobby | a small falcon\nflies | fast\n\n    an indented verse\n"
    add(page, "hobby.txt", plain)
    is_in_state(page, "hobby.txt", "Ready")

    text = read(page, "hobby.txt")

    expect(text.locator(".block")).to_have_count(0)
    assert not is_monospaced(text)
