"""The page in a real browser: lists of documents and passages, however long, and what is asked before a deletion."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Locator, Page, Route, expect

from pages import (
    Service,
    Told,
    add,
    browser,
    document,
    page,
    search,
    service,
    told_document,
    told_passage,
)

__all__ = ["browser", "page", "service"]  # fixtures


def places(*folders: str) -> list[str]:
    """The same file in several folders."""
    return [f"upload:///{folder}/same.txt" for folder in folders]


def test_who_deletes_a_document_is_told_of_all_its_places(page: Page) -> None:
    """The file was added three times: it is one document, and goes from all three places."""
    told = Told(page)
    told.tell([told_document(1, name="a/same.txt", uris=places("a", "b", "c")), told_document(2)])

    document(page, "a/same.txt").get_by_role("button", name="Delete").click()

    expect(page.locator("#confirm-title")).to_have_text("Delete a/same.txt?")
    expect(page.locator("#confirm-words")).to_have_text(
        "It is deleted from here and from 2 other places: b/same.txt, c/same.txt."
        " Its passages will no longer be found. This cannot be undone."
    )
    page.keyboard.press("Escape")
    document(page, "2.md").get_by_role("button", name="Delete").click()
    expect(page.locator("#confirm-words")).to_have_text(
        "Its passages will no longer be found. This cannot be undone."
    )


def test_who_deletes_several_documents_is_asked_about_several(page: Page) -> None:
    """In the plural, with the places of all."""
    told = Told(page)
    told.tell([told_document(1, name="a/same.txt", uris=places("a", "b", "c")), told_document(2)])

    page.get_by_label("Select all that are shown").check()
    page.locator("#selected-actions").get_by_role("button", name="Delete").click()

    expect(page.locator("#confirm-title")).to_have_text("Delete 2 documents?")
    expect(page.locator("#confirm-words")).to_have_text(
        "They are deleted from all 4 places where they stand."
        " Their passages will no longer be found. This cannot be undone."
    )


def test_who_deletes_a_selection_is_told_how_many_of_it_stay(page: Page) -> None:
    """What is worked on is not deleted: nobody is to think that all are gone."""
    told = Told(page)
    told.tell([told_document(1), told_document(2, "queued"), told_document(3, "parsing")])

    page.get_by_label("Select all that are shown").check()
    page.locator("#selected-actions").get_by_role("button", name="Delete").click()

    expect(page.locator("#confirm-title")).to_have_text("Delete 1.md?")
    expect(page.locator("#confirm-words")).to_contain_text(
        "2 others that are selected are worked on and stay."
    )


def test_the_focus_stays_in_the_list_when_a_selection_is_deleted(page: Page) -> None:
    """At the next document, as when one is deleted; without any, where documents come from."""
    told = Told(page)
    told.tell([told_document(number) for number in (4, 3, 2, 1)])
    page.route("**/api/documents/*", lambda route: route.fulfill(status=204))
    page.get_by_label("Select 3.md").check()
    page.get_by_label("Select 2.md").check()

    delete_selected(page)

    names = page.locator("#documents .name")
    expect(names).to_have_text(["4.md", "1.md"])
    expect(names.last).to_be_focused()
    expect(page.locator("#announcer")).to_have_text("2 documents deleted.")
    told.tell([told_document(number) for number in (4, 1)])
    expect(names.last).to_be_focused()
    page.get_by_label("Select all that are shown").check()
    delete_selected(page)
    expect(names).to_have_count(0)
    expect(page.locator("#choose-files")).to_be_focused()


@pytest.mark.parametrize(
    ("label", "state", "said"),
    [
        ("Pause", "queued", "2 documents paused."),
        ("Resume", "paused", "2 documents resumed."),
        ("Retry", "failed", "2 documents tried again."),
        ("Cancel", "paused", "2 documents cancelled."),
    ],
)
def test_what_was_done_with_a_selection_is_said_in_a_sentence(
    page: Page, label: str, state: str, said: str
) -> None:
    """To those who listen, in the words of the action."""
    Told(page).tell([told_document(2, state), told_document(1, state)])
    page.route("**/api/documents/*/*", lambda route: route.fulfill(json=told_document(1, "queued")))
    page.get_by_label("Select all that are shown").check()

    page.locator("#selected-actions").get_by_role("button", name=label).press("Enter")

    expect(page.locator("#announcer")).to_have_text(said)


def delete_selected(page: Page) -> None:
    """Delete what is selected, with the keyboard."""
    page.locator("#selected-actions").get_by_role("button", name="Delete").press("Enter")
    page.locator("#confirm").get_by_role("button", name="Delete").press("Enter")


def test_the_focus_stays_in_the_list_when_one_document_is_deleted(page: Page) -> None:
    """By its own button: at the next document."""
    Told(page).tell([told_document(number) for number in (3, 2, 1)])
    page.route("**/api/documents/*", lambda route: route.fulfill(status=204))

    document(page, "2.md").get_by_role("button", name="Delete").press("Enter")
    page.locator("#confirm").get_by_role("button", name="Delete").press("Enter")

    names = page.locator("#documents .name")
    expect(names).to_have_text(["3.md", "1.md"])
    expect(names.last).to_be_focused()


def test_the_focus_stays_at_the_list_when_the_last_document_leaves_it(page: Page) -> None:
    """At the filter that is empty now, and then at the one that is shown instead of it."""
    told = Told(page)
    told.tell([told_document(2), told_document(1, "paused")])
    filters = page.locator("#filters")
    filters.get_by_role("button", name="Stopped").click()
    page.route("**/api/documents/1/resume", lambda route: route.fulfill(json=told_document(1, "queued")))

    document(page, "1.md").get_by_role("button", name="Resume").press("Enter")

    expect(page.locator("#documents > li")).to_have_count(0)
    expect(filters.get_by_role("button", name="Stopped")).to_be_focused()
    told.tell([told_document(2), told_document(1, "queued")])
    expect(page.locator("#documents > li")).to_have_count(2)
    expect(filters.get_by_role("button", name="All")).to_be_focused()


def test_the_focus_stays_where_a_button_has_nothing_left_to_do(page: Page) -> None:
    """At the document that is ready now, at its selection, and at the title where no document has failed any more."""
    told = Told(page)
    told.tell([told_document(1, "embedding"), told_document(2, "failed")], retryable=1)
    row = document(page, "1.md")
    row.get_by_role("button", name="Pause").focus()
    told.tell([told_document(1), told_document(2, "failed")], retryable=1)
    expect(row.locator(".name")).to_be_focused()

    page.get_by_label("Select 2.md").check()
    page.locator("#selected-actions").get_by_role("button", name="Retry").focus()
    told.tell([told_document(1), told_document(2, "ready"), told_document(3, "failed")], retryable=1)
    expect(page.get_by_role("button", name="Clear")).to_be_focused()

    page.route("**/api/documents/retry-failed", lambda route: route.fulfill(json={"ids": [3]}))
    page.get_by_role("button", name="Retry failed").press("Enter")
    expect(page.get_by_role("button", name="Retry failed")).to_be_focused()
    told.tell([told_document(1), told_document(2), told_document(3, "queued")])
    expect(page.get_by_role("heading", name="Documents")).to_be_focused()


def test_who_selects_all_is_told_how_many_are_shown(page: Page) -> None:
    """Where there are more than that, nobody takes the ones for the others."""
    told = Told(page)
    told.tell([told_document(number) for number in range(60, 0, -1)])
    expect(page.locator("#unselected")).to_have_text("Select all 50 that are shown")
    page.get_by_label("Select all 50 that are shown").check()

    expect(page.locator("#selected-count")).to_have_text("The 50 that are shown are selected")
    page.get_by_label("Select 60.md").uncheck()
    expect(page.locator("#selected-count")).to_have_text("49 selected")
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Show more documents").click()
    expect(page.locator("#unselected")).to_have_text("Select all")


def test_the_shift_key_selects_all_between_two_documents(page: Page) -> None:
    """Both ways, and out of the selection as well; without one before it, the document alone."""
    Told(page).tell([told_document(number) for number in range(6, 0, -1)])
    selected = page.locator("#documents > li:has(:checked) .name")

    page.get_by_label("Select 5.md").click(modifiers=["Shift"])
    expect(selected).to_have_text(["5.md"])
    page.get_by_label("Select 2.md").click(modifiers=["Shift"])
    expect(selected).to_have_text(["5.md", "4.md", "3.md", "2.md"])
    expect(page.locator("#selected-count")).to_have_text("4 selected")
    page.get_by_label("Select 4.md").click(modifiers=["Shift"])
    expect(selected).to_have_text(["5.md"])


def test_many_documents_are_shown_piece_by_piece(page: Page) -> None:
    """The page stays short, says how many more there are, and is filtered and sorted as a whole."""
    told = Told(page)
    told.tell([told_document(number) for number in range(218, 0, -1)])
    rows, more = page.locator("#documents > li"), page.locator("#older")

    expect(rows).to_have_count(50)
    expect(more).to_have_text("Show more documents (168 left)")
    assert more.evaluate("(one) => one.getBoundingClientRect().height") >= 44
    more.focus()
    page.keyboard.press("Enter")
    expect(rows).to_have_count(150)
    expect(page.locator("#documents .name").nth(50)).to_be_focused()
    page.get_by_label("Sort by").select_option("Oldest first")
    expect(rows).to_have_count(50)
    expect(rows.first.locator(".name")).to_have_text("1.md")
    page.get_by_label("Filter by name or folder").fill("21")
    expect(rows).to_have_count(11)
    expect(more).to_be_hidden()


def test_documents_are_filtered_by_words_in_any_order_and_counted(page: Page) -> None:
    """Each word stands in the path; the filter that is chosen tells how many of all that are."""
    paths = ["docs/pg15/wal.html", "docs/pg16/wal.html", "docs/pg15/wal.md", "notes.html"]
    told = Told(page)
    told.tell([told_document(at, name=path, uris=[f"upload:///{path}"]) for at, path in enumerate(paths)])
    field, chosen = (
        page.get_by_label("Filter by name or folder"),
        page.locator("#filters [aria-pressed=true]"),
    )
    expect(chosen).to_have_text("All4")

    field.fill("html  DOC")

    expect(page.locator("#documents .name")).to_have_text(["docs/pg16/wal.html", "docs/pg15/wal.html"])
    expect(chosen).to_have_text("All2 of 4")
    page.locator("#filters").get_by_role("button", name="Ready").click()
    expect(page.locator("#filters")).to_have_text("All4Ready2 of 4")
    field.fill("")
    expect(chosen).to_have_text("Ready4")


def test_what_is_selected_stays_when_newer_documents_come(page: Page) -> None:
    """The last row that is shown is not pushed off the list while somebody is at it."""
    told = Told(page)
    told.tell([told_document(number) for number in range(60, 0, -1)])
    page.get_by_label("Select 11.md").check()

    told.tell([told_document(number) for number in range(63, 0, -1)])

    expect(page.locator("#documents .name").first).to_have_text("63.md")
    expect(page.get_by_label("Select 11.md")).to_be_checked()
    expect(page.locator("#older")).to_have_text("Show more documents (10 left)")


def find(page: Page, number: int) -> None:
    """Find so many passages, in the place of the server."""
    passages = [told_passage(at) for at in range(number)]

    def answer(route: Route) -> None:
        query = parse_qs(urlsplit(route.request.url).query)
        skip, limit = (
            int(query.get(name, [default])[0]) for name, default in (("skip", "0"), ("limit", "10"))
        )
        some = passages[skip : skip + limit]
        has_more = skip + limit < len(passages)
        route.fulfill(json={"passages": some, "note": None, "has_more": has_more})

    page.route("**/api/search?*", answer)


def test_as_many_passages_are_shown_again_as_were_shown_before(page: Page) -> None:
    """Whoever comes back to a search, also with a reload; another search begins anew."""
    Told(page).tell([told_document(1)])
    find(page, 75)
    search(page, "heron")
    shown = page.locator("#passages > li")
    for number in range(10, 70, 10):
        expect(shown).to_have_count(number)
        page.locator("#more-passages").click()
    expect(shown).to_have_count(70)

    page.go_back()
    expect(shown).to_have_count(0)
    page.go_forward()
    expect(shown).to_have_count(70)
    expect(page.locator("#search-note")).to_have_text("The first 70 passages")
    page.locator(".source").first.click()
    expect(page.locator("#reader")).to_be_visible()
    page.reload()
    expect(shown).to_have_count(70)
    page.keyboard.press("Escape")
    search(page, "egret")
    expect(shown).to_have_count(10)


def test_more_passages_are_shown_when_asked_for(page: Page) -> None:
    """Numbered on, the first of the new ones at hand; and no more is offered than there is."""
    Told(page).tell([told_document(1)])
    find(page, 13)
    search(page, "heron")
    shown, more = page.locator("#passages > li"), page.locator("#more-passages")
    expect(shown).to_have_count(10)
    expect(page.locator("#search-note")).to_have_text("The first 10 passages")
    assert more.evaluate("(one) => one.getBoundingClientRect().height") >= 44
    more.focus()
    page.keyboard.press("Enter")
    expect(shown).to_have_count(13)
    expect(shown.nth(10).locator(".number")).to_have_text("11")
    expect(shown.nth(10)).to_be_focused()
    expect(page.locator("#search-note")).to_have_text("13 passages")
    expect(more).to_be_hidden()


@pytest.mark.parametrize("asked", ["", "&ask=1"])
def test_a_question_that_is_too_long_is_told_so_in_words(page: Page, service: Service, asked: str) -> None:
    """It came with the address, which no field limits; the field has as much of it as may be asked."""
    page.goto(f"{service.url}?q={'x' * 2500}{asked}")

    expect(page.locator("#search-note")).to_have_text(
        "The question is too long: it has 2,500 characters, and at most 2,000 are taken."
        " The field has the first 2,000 of them."
    )
    expect(page.locator("#search-note")).to_have_class("note error")
    expect(page.locator("#query")).to_have_value("x" * 2000)
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#search-note")).not_to_have_class("note error")


def test_what_the_server_does_not_understand_is_told_in_words(page: Page) -> None:
    """A field that is wrong is named, with what is wrong about it."""
    wrong = {
        "loc": ["query", "q"],
        "msg": "String should have at most 3 characters",
        "type": "string_too_long",
    }
    page.route("**/api/search?*", lambda route: route.fulfill(status=422, json={"detail": [wrong]}))

    search(page, "heron")

    expect(page.locator("#search-note")).to_have_text("q: String should have at most 3 characters.")


def found_also(page: Page, *also: dict[str, object]) -> Locator:
    """What is said of the other places of a passage of a.md."""
    Told(page).tell([told_document(1), told_document(2)])
    passage = told_passage(1, start=0, end=1015, also=list(also))
    answer = {"passages": [passage], "note": None, "has_more": False}
    page.route("**/api/search?*", lambda route: route.fulfill(json=answer))
    search(page, "heron")
    return page.locator("#passages .also")


def place(name: str, start: int, **values: object) -> dict[str, object]:
    """Another place of the same words."""
    return told_passage(1, name=name, document_id=2, start=start, end=start + 1015) | values


def test_other_places_are_written_as_the_first_one_is(page: Page) -> None:
    """With the same words, and thousands told from hundreds."""
    also = found_also(page, place("b.md", 1016, pages=[3, 4]), place("c.md", 0))

    expect(page.locator("#passages .place")).to_have_text("characters 0–1,015")
    expect(also).to_have_text("Also in b.md, pages 3–4, characters 1,016–2,031; c.md, characters 0–1,015")


def test_repetitions_within_a_document_are_summed(page: Page) -> None:
    """A file that says one thing a thousand times is one place, and so is each of its copies."""
    again = [place("a.md", 1016 * number, document_id=1) for number in range(1, 1571)]
    elsewhere = [
        place(name, start) for name in ("b.md", "c.md", "d.md", "e.md", "f.md") for start in (0, 1016)
    ]

    also = found_also(page, *again, *elsewhere)

    expect(also).to_have_text(
        "Also 1,570 more times in this document; in b.md, characters 0–1,015 and 1 more time;"
        " c.md, characters 0–1,015 and 1 more time; d.md, characters 0–1,015 and 1 more time;"
        " and 2 more places"
    )


def test_only_the_document_itself_repeats_a_passage(page: Page) -> None:
    """Nothing is said of other places where there are none."""
    also = found_also(page, place("a.md", 1016, document_id=1))

    expect(also).to_have_text("Also 1 more time in this document")


ROWS = """
() => [...document.querySelectorAll("#uploads > li")].map((row) => {
    const [button, box] = [row.querySelector("button:last-of-type"), row.getBoundingClientRect()];
    const words = document.createRange();
    words.selectNodeContents(button);
    const parts = [...row.children].map((one) => one.getBoundingClientRect());
    const [top, bottom] = [Math.min(...parts.map((part) => part.top)), Math.max(...parts.map((part) => part.bottom))];
    return {
        weight: getComputedStyle(button).fontWeight,
        right: words.getBoundingClientRect().right,
        above: box.top - (row.previousElementSibling ?? drop).getBoundingClientRect().bottom,
        within: top - box.top - (box.bottom - bottom - 1),
    };
})
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_what_became_of_uploads_stands_in_line(page: Page, width: int) -> None:
    """All that is put away is put away by the same button at the same edge, with room above and below each."""
    page.set_viewport_size({"width": width, "height": 900})
    page.route(
        "**/api/documents?name=picture.md",
        lambda route: route.fulfill(status=415, json={"detail": "This is a PNG picture, and it has a name."}),
    )
    known = {"outcome": "unchanged", "document": told_document(1)}
    page.route("**/api/documents?name=here.md", lambda route: route.fulfill(status=201, json=known))
    add(page, "picture.md", b"x")
    expect(page.locator("#uploads > li")).to_contain_text(["picture.md"])
    add(page, "here.md", b"x")
    expect(page.locator("#uploads > li")).to_contain_text(
        ["picture.md", "here.md (as 1.md) is here already."]
    )

    rows = page.evaluate(ROWS)

    edge = page.locator("#drop").evaluate("(one) => one.getBoundingClientRect().right")
    assert {row["weight"] for row in rows} == {"450"}
    assert all(abs(row["right"] - edge) < 2 for row in rows), rows
    assert rows[0]["above"] >= 8
    assert all(abs(row["within"]) < 2 for row in rows), rows


def test_words_that_are_typed_before_the_server_answers_stay(page: Page) -> None:
    """A slow server does not empty the field of who is quick."""
    held: list[Route] = []
    page.route("**/api/limits", lambda route: held.append(route))
    page.reload()
    page.locator("#query").fill("heron")
    while not held:
        page.wait_for_timeout(20)

    with page.expect_request("**/api/events"):
        held[0].continue_()

    expect(page.locator("#query")).to_have_value("heron")
