"""The page in a real browser: many files on their way to the server, what became of them, and who leaves meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Browser, Dialog, Page, Route, expect

from pages import Service, Told, add, browser, page, service, told_document

__all__ = ["browser", "page", "service"]  # fixtures


SENT_AT_ONCE = 3
"""How many files the page sends side by side."""


class Uploads:
    """What the server does with uploads, in its place: they are held until they are let go."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.held: list[Route] = []
        self.outcome = "added"
        self.document = told_document(1)
        page.route("**/api/documents?name=*", lambda route: self.held.append(route))

    def wait(self, number: int) -> None:
        """Wait until so many are held."""
        while len(self.held) < number:
            self.page.wait_for_timeout(20)

    def let_go(self, number: int = 1) -> None:
        """Take so many of them in, one after the other, in the order of their names."""
        for left in range(number, 0, -1):
            self.wait(min(left, SENT_AT_ONCE))
            self.held.sort(key=lambda route: route.request.url)
            request = self.held[0].request
            taken = {"outcome": self.outcome, "document": self.document}
            with self.page.expect_event("requestfinished", lambda done, request=request: done == request):
                self.held.pop(0).fulfill(status=201, json=taken)


@pytest.fixture
def uploads(page: Page) -> Uploads:
    """Uploads that are held."""
    return Uploads(page)


@pytest.fixture
def leaving(browser: Browser, service: Service) -> Iterator[Page]:
    """A page that may ask its visitor to stay."""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(service.url)
        page.locator("#query").click()  # browsers let pages ask only those who have done something there
        yield page


def choose(page: Page, *names: str) -> None:
    """Choose files, all at once."""
    page.set_input_files("#files", [{"name": name, "mimeType": "", "buffer": b"x"} for name in names])


def test_who_leaves_while_uploads_are_on_their_way_is_asked(leaving: Page) -> None:
    """Those that wait or run would be lost without a word; afterwards nobody is asked."""
    asked: list[str] = []

    def stay(dialog: Dialog) -> None:
        asked.append(dialog.type)
        dialog.dismiss()

    leaving.on("dialog", stay)
    uploads = Uploads(leaving)
    choose(leaving, "one.md")
    uploads.wait(1)

    leaving.close(run_before_unload=True)
    while not asked:
        leaving.wait_for_timeout(20)

    assert asked == ["beforeunload"]
    uploads.let_go()
    expect(leaving.locator("#uploads > li")).to_have_count(0)
    leaving.reload()
    assert len(asked) == 1


def test_what_replaces_another_version_says_so_by_name(page: Page, uploads: Uploads) -> None:
    """Who takes a name that is taken already learns that the document of before goes."""
    uploads.outcome = "replaced"
    choose(page, "CHANGES.md")
    uploads.let_go()

    notes = page.locator("#uploads > li > span")
    expect(notes).to_have_text(["CHANGES.md replaces the version that was here."])
    choose(page, "a.md", "b.md")
    uploads.let_go(2)
    expect(notes.last).to_have_text("2 files replace the versions that were here: a.md, b.md.")


def test_files_that_are_here_are_named_and_counted_anew_for_each_choice(page: Page, uploads: Uploads) -> None:
    """The first ones by name, then how many more."""
    uploads.outcome = "unchanged"
    choose(page, "docs/1.md")
    uploads.let_go()
    notes = page.locator("#uploads > li > span")
    expect(notes).to_have_text(["docs/1.md is here already."])
    choose(page, "a.md", "b.md", "c.md", "d.md", "e.md")
    uploads.let_go(5)

    a_to_c = "a.md (as 1.md), b.md (as 1.md), c.md (as 1.md)"
    expect(notes).to_have_text(
        ["docs/1.md is here already.", f"5 files are here already: {a_to_c} and 2 more."]
    )
    expect(page.locator("#announcer")).to_contain_text(f"5 files are here already: {a_to_c} and 2 more.")


def test_files_that_are_here_but_cannot_be_read_say_why(page: Page, uploads: Uploads) -> None:
    """Of one the reason as it is, of several each with its own; what will be found later is told apart."""
    uploads.outcome, uploads.document = "failed", told_document(1, "failed", reason="The PDF is torn.")
    choose(page, "1.md")
    uploads.let_go()
    notes = page.locator("#uploads > li > span")
    unreadable = "1.md is here already, but cannot be read: The PDF is torn."
    expect(notes).to_have_text([unreadable])
    expect(page.locator("#announcer")).to_contain_text(unreadable)
    choose(page, "a/1.md", "b/1.md")
    uploads.let_go(2)
    both = "a/1.md (The PDF is torn.), b/1.md (The PDF is torn.)"
    expect(notes.last).to_have_text(f"2 files are here already, but cannot be read: {both}.")
    uploads.outcome, uploads.document = "unchanged", told_document(1, "queued")
    choose(page, "1.md")
    uploads.let_go()
    expect(notes.last).to_have_text("1.md is here already, but not ready yet.")
    choose(page, "a/1.md", "b/1.md")
    uploads.let_go(2)
    expect(notes.last).to_have_text("2 files are here already, but not ready yet: a/1.md, b/1.md.")


def test_uploads_wait_until_they_are_sent(page: Page, uploads: Uploads) -> None:
    """A few have a row each, which says whether anything is sent."""
    choose(page, "1.md", "2.md", "3.md", "4.md", "5.md")
    uploads.wait(3)

    states = page.locator("#uploads .state")
    expect(states).to_have_text(["Uploading"] * 3 + ["Waiting"] * 2)
    uploads.let_go()
    expect(states).to_have_text(["Uploading"] * 3 + ["Waiting"])


def test_many_uploads_are_one_line(page: Page, uploads: Uploads) -> None:
    """With those that were refused as rows below it; it goes with the last one."""
    choose(page, *(f"{number}.md" for number in range(1, 31)))
    rows = page.locator("#uploads > li")
    expect(rows).to_have_text(["Uploading 1 of 30"])

    uploads.wait(3)
    refused = uploads.held.pop(0)
    refused.fulfill(status=415, json={"detail": "This is a PNG picture."})
    uploads.let_go(19)

    expect(rows.first).to_have_text("Uploading 21 of 30")
    assert rows.first.locator("progress").evaluate("(one) => one.value") == pytest.approx(20 / 30)
    expect(rows).to_have_count(2)
    expect(rows.last).to_contain_text("1.mdNot takenThis is a PNG picture.")
    uploads.let_go(10)
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text(["1.mdNot taken"])


def test_uploads_that_failed_are_tried_again_when_the_server_is_back(page: Page) -> None:
    """Those that may pass: what the server refused stays refused."""
    told = Told(page)
    told.tell([told_document(1)])
    # What was told later would have the upload tried again that fails first.
    expect(page.locator("#documents > li")).to_have_count(1)
    uploads = Uploads(page)
    add(page, "away.md", "x")
    uploads.wait(1)
    uploads.held.pop(0).abort()
    add(page, "picture.md", "x")
    uploads.wait(1)
    uploads.held.pop(0).fulfill(status=415, json={"detail": "This is a PNG picture."})
    rows = page.locator("#uploads > li")
    expect(rows).to_contain_text(["The server does not answer.", "This is a PNG picture."])

    told.tell([told_document(1)])

    uploads.let_go()
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text(["This is a PNG picture."])
