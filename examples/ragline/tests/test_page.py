"""The page in a real browser, on a real server with a real worker: what a person who opens it does."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

import httpx
from playwright.sync_api import Browser, Page, Route, expect

from pages import PATIENT_MS, Service, add, browser, contrast, document, is_in_state, page, service
from pipelines import long_text

__all__ = ["browser", "page", "service"]  # fixtures


def test_a_first_visitor_adds_watches_searches_and_reads(page: Page) -> None:
    """From nothing to a highlighted passage in its place, without a word of explanation."""
    expect(page.get_by_text("Drop files or a folder here")).to_be_visible()
    expect(page.locator("body.bare")).to_have_count(1)
    page.get_by_label("A question, or words").fill("anything")
    page.keyboard.press("Enter")
    expect(page.locator("#search-note")).to_have_text("There are no documents to search yet: add some first.")
    add(page, "bees.md", "# Bees\n\nBees dance to tell where flowers are.\n\nWasps do not.\n")

    is_in_state(page, "bees.md", "Ready")
    page.get_by_label("A question, or words").fill("where do bees dance?")
    page.keyboard.press("Enter")

    passage = page.locator("#passages > li").first
    expect(passage.locator("mark").first).to_have_text("Bees")
    expect(passage).to_contain_text(re.compile(r"bees\.mdcharacters \d+–\d+"))
    add(page, "bees.md", "# Bees\n\nBees dance to tell where flowers are.\n\nWasps do not.\n")
    add(page, "copy.md", "# Bees\n\nBees dance to tell where flowers are.\n\nWasps do not.\n")
    expect(page.locator("#uploads > li > span")).to_have_text(
        ["bees.md is here already.", "copy.md (as bees.md) is here already."]
    )
    passage.locator(".source").click()
    expect(page.locator("#reader-text mark")).to_contain_text("Bees dance")
    page.keyboard.press("Escape")
    expect(page.locator("#reader")).to_be_hidden()
    expect(page.get_by_text("Keyword search only")).to_be_visible()
    expect(page.locator("#vital-workers dd")).to_have_text("1", timeout=PATIENT_MS)


def test_words_are_marked_where_there_are_no_spaces(page: Page) -> None:
    """A question in Chinese marks what the passage shares with it."""
    add(page, "蜜蜂.md", "蜜蜂用舞蹈告诉同伴花在哪里。")
    is_in_state(page, "蜜蜂.md", "Ready")
    page.get_by_label("A question, or words").fill("蜜蜂的舞蹈")
    page.keyboard.press("Enter")

    expect(page.locator("#passages > li").first.locator("mark")).to_have_text(["蜜蜂", "舞蹈"])


def test_an_answer_leads_to_its_passages(page: Page) -> None:
    """A citation that does not exist is not shown, and what nobody wrote is marked."""
    add(page, "dance.md", "Bees dance to tell where flowers are, says this one.")
    is_in_state(page, "dance.md", "Ready")
    page.get_by_label("A question, or words").fill("what do bees do?")
    page.get_by_role("button", name="Ask").click()

    answer = page.locator("#answer")
    expect(answer.locator(".citation")).to_have_count(1)
    expect(answer.locator(".unverified")).to_have_text('"fly to the moon and back"')
    expect(answer).to_contain_text("[9]")
    answer.locator(".citation").click()
    expect(page.locator("#passage-1")).to_be_in_viewport()


def test_a_document_that_fails_says_why_and_is_tried_again(page: Page, service: Service) -> None:
    """A broken one fails alone; only a reason that may pass is worth another try; deleted, no task is dead any more."""
    add(page, "broken.pdf", b"%PDF-1.7\nthis is no PDF after all\n")

    is_in_state(page, "broken.pdf", "Cannot be read")
    row = document(page, "broken.pdf")
    expect(row.locator(".reason")).not_to_be_empty()
    expect(row.get_by_role("button", name="Retry")).to_have_count(0)
    expect(page.locator("#retry-failed")).to_be_hidden()
    assert dead(service) == 1
    with sqlite3.connect(service.home / "ragline.db", timeout=30) as database:
        # As if it had failed again, for a reason that may pass.
        failed = "UPDATE document SET is_permanent = 0, failed_at = '2030-01-01 00:00:00.000000'"
        database.execute(f"{failed} WHERE name = 'broken.pdf'")
    is_in_state(page, "broken.pdf", "Failed")
    expect(page.locator("#retry-failed")).to_be_visible()
    row.get_by_role("button", name="Retry broken.pdf").click()
    is_in_state(page, "broken.pdf", "Cannot be read")
    row.get_by_role("button", name="Delete broken.pdf").click()
    page.get_by_role("button", name="Keep it").click()
    expect(row).to_be_visible()
    row.get_by_role("button", name="Delete broken.pdf").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(row).to_have_count(0)
    assert dead(service) == 0


def dead(service: Service) -> int:
    """How many tasks are given up."""
    count: int = httpx.get(f"{service.url}api/status", timeout=30).json()["messages"]["dead"]
    return count


def test_uploads_that_are_refused_say_why(page: Page) -> None:
    """Too large without being sent, a picture by its bytes; both can be put away."""
    add(page, "large.md", "x" * 200_001)
    add(page, "picture.md", b"\x89PNG\r\n\x1a\n" + bytes(99))

    tray = page.locator("#uploads > li")
    expect(tray.filter(has_text="large.md")).to_contain_text("larger than the limit of 200 kB")
    expect(tray.filter(has_text="picture.md")).to_contain_text("PNG picture")
    for _ in range(2):
        page.get_by_role("button", name="Dismiss").first.click()
    expect(tray).to_have_count(0)
    expect(document(page, "picture.md")).to_have_count(0)


def test_a_folder_is_taken_without_what_is_no_document(page: Page, tmp_path: Path) -> None:
    """Hidden files and other kinds are left out, and that is said."""
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "whale.md").write_text("The whale is in a folder.")
    (folder / ".hidden.md").write_text("hidden")
    (folder / "program.exe").write_text("MZ")

    page.set_input_files("#folder", folder)

    is_in_state(page, "whale.md", "Ready")
    expect(page.locator("#uploads")).to_have_text(
        "2 files were left out (hidden, .exe): notes/.hidden.md, notes/program.exe.Dismiss"
    )
    expect(document(page, "whale.md").locator(".name")).to_have_attribute("title", "notes/deep/whale.md")


def test_a_folder_that_comes_before_the_limits_are_known_is_taken(page: Page, tmp_path: Path) -> None:
    """It waits until the server has said which files it takes, instead of leaving all of them out."""
    (tmp_path / "early.md").write_text("The early one is about larks.")
    (tmp_path / "program.exe").write_text("MZ")
    held: list[Route] = []
    page.route("**/api/limits", lambda route: held.append(route))
    page.reload()

    page.set_input_files("#folder", tmp_path)
    while len(held) < 2:  # the page's own question, and the one for the folder
        page.wait_for_timeout(20)
    for route in held:
        route.continue_()

    is_in_state(page, "early.md", "Ready")
    expect(page.locator("#uploads")).to_contain_text("1 file was left out (.exe): ")


def test_files_dropped_anywhere_are_taken(page: Page) -> None:
    """Also beside the field: else the browser would show the file instead of the page."""
    transfer = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["The dropped one is about otters."], "dropped.md"));
            return transfer;
        }"""
    )
    page.dispatch_event("header", "drop", {"dataTransfer": transfer})

    is_in_state(page, "dropped.md", "Ready")


def test_a_folder_that_is_dropped_is_walked(page: Page, tmp_path: Path) -> None:
    """With all that is below it, more than a browser lists at once, and beside a file of its own."""
    folder = tmp_path / "walked"
    (folder / "deep").mkdir(parents=True)
    for number in range(110):
        (folder / "deep" / f"{number}.png").write_text("left out")
    (folder / "deep" / "lynx.md").write_text("The lynx is deep in a folder.")
    (tmp_path / "alone.log").write_text("The marten is alone in a file of no known kind.")
    expect(page.locator("#drop-limits")).to_contain_text("200 kB")

    tools = page.context.new_cdp_session(page)
    dropped = {"items": [], "files": [str(folder), str(tmp_path / "alone.log")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        if kind == "drop":
            # The browser calls it off unless the page has answered what was dragged over it.
            expect(page.locator("#drop")).to_have_class(re.compile(r"\bover\b"))
        tools.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": dropped})

    is_in_state(page, "lynx.md", "Ready")
    is_in_state(page, "alone.log", "Ready")
    expect(document(page, "lynx.md").locator(".name")).to_have_attribute("title", "walked/deep/lynx.md")
    expect(page.locator("#uploads")).to_contain_text(
        re.compile(r"110 files were left out \(\.png\): (walked/deep/\d+\.png,? ){3}and 107 more\.")
    )


def test_nothing_of_a_document_runs_or_becomes_markup(page: Page) -> None:
    """Not its name, its headings, its text or the reason of its failure: all are shown as they are."""
    hostile = "<img src=x onerror=alert(1)>"
    add(
        page,
        f"{hostile}.md",
        f"# Porcupine {hostile}\n\nA porcupine <script>alert(2)</script> {hostile} walks.\n",
    )

    is_in_state(page, f"{hostile}.md", "Ready")
    page.get_by_label("A question, or words").fill("porcupine <script>alert(3)</script>")
    page.keyboard.press("Enter")

    expect(page.locator("#passages blockquote").first).to_contain_text(hostile)
    page.locator(".source").first.click()
    expect(page.locator("#reader-text mark")).to_contain_text("<script>alert(2)</script>")
    assert page.locator("#main img, dialog img, #main script").count() == 0


def test_a_server_that_has_nothing_to_tell_is_missed(page: Page) -> None:
    """As when its database is away: the page says so, and goes on by itself."""
    page.route("**/api/events", lambda route: route.fulfill(status=503))
    page.reload()
    expect(page.locator("#banner")).to_contain_text("does not answer", timeout=PATIENT_MS)

    page.unroute("**/api/events")
    expect(page.locator("#banner")).to_be_hidden(timeout=PATIENT_MS)


def test_everything_is_done_with_the_keyboard(page: Page) -> None:
    """The way leads from search to documents, where one is deleted; the focus is always seen."""
    add(page, "keys.md", "Only the keyboard is used for this walrus.")
    is_in_state(page, "keys.md", "Ready")

    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to search")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#query")).to_be_focused()
    assert "#" not in page.url
    page.keyboard.type("walrus")
    page.keyboard.press("Enter")
    expect(page.locator("#passages > li").first).to_contain_text("walrus")
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate("document.activeElement.getAttribute('aria-label') ?? ''")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", focused
        if focused == "Delete keys.md":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(document(page, "keys.md")).to_have_count(0)
    expect(page.locator("#announcer")).to_contain_text("keys.md was deleted")


def test_several_pages_see_the_same(page: Page, browser: Browser, service: Service) -> None:
    """What one adds, the other shows; and closing a page closes its connection."""
    with browser.new_context() as context:
        other = context.new_page()
        other.goto(service.url)
        add(page, "shared.md", "Both pages see this badger.")
        is_in_state(other, "shared.md", "Ready")

    page.reload()
    is_in_state(page, "shared.md", "Ready")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_text_can_be_read(browser: Browser, service: Service, scheme: str) -> None:
    """Nothing is wider than the screen; text and fields stand out as WCAG 2 AA asks, by day and night."""
    with browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(service.url)
        add(
            page,
            "a-name-that-is-so-long-that-no-phone-shows-it-on-one-line-" + "x" * 80 + ".md",
            "A long name.",
        )
        expect(page.locator("#documents > li").first).to_be_visible()
        expect(page.locator("#vitals")).to_be_visible(timeout=PATIENT_MS)

        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for selector in (
            "h2",
            ".fine",
            ".claim, .vitals dt",
            "button.main",
            "button.quiet",
            ".document .state",
        ):
            assert contrast(page, selector) >= 4.5, selector
        for selector in ("#query", "#called", "#order", "#token"):
            page.evaluate("login.open || login.show()")
            assert contrast(page, selector, "borderTopColor") >= 3, selector


def test_a_server_without_a_worker_says_so_and_waits(browser: Browser, tmp_path: Path) -> None:
    """Documents wait, are paused, resumed and cancelled; a server that goes is missed, and gets what it missed."""
    service = Service(tmp_path)
    try:
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(service.url)
            add(page, "later.md", long_text("whale"))
            is_in_state(page, "later.md", "Waits for a worker")
            track = document(page, "later.md").locator(".track .now i")
            assert track.evaluate("(one) => getComputedStyle(one).animationName") == "none"
            expect(page.locator("#banner")).to_contain_text("No worker is running", timeout=PATIENT_MS)
            row = document(page, "later.md")
            row.get_by_role("button", name="Pause").click()
            is_in_state(page, "later.md", "Paused")
            row.get_by_role("button", name="Resume").click()
            is_in_state(page, "later.md", "Waits for a worker")
            row.get_by_role("button", name="Cancel").click()
            is_in_state(page, "later.md", "Cancelled")

            assert service.stop() == 0
            expect(page.locator("#banner")).to_contain_text("does not answer", timeout=PATIENT_MS)
            add(page, "away.md", "The server is away when this heron comes.")
            expect(page.locator("#uploads")).to_contain_text("away.mdNot takenThe server does not answer.")
            service.start()
            expect(page.locator("#banner")).to_be_hidden(timeout=PATIENT_MS)
            is_in_state(page, "away.md", "Waits for a worker")
            expect(page.locator("#uploads > li")).to_have_count(0)
            is_in_state(page, "later.md", "Cancelled")
    finally:
        service.stop()


def test_a_server_for_others_asks_for_its_token(browser: Browser, tmp_path: Path) -> None:
    """The link that it prints is enough; without it the page asks, and tells nothing before."""
    service = Service(tmp_path, "--host", "0.0.0.0")
    try:
        token = service.link.partition("token=")[2]
        assert len(token) >= 32
        assert httpx.get(f"{service.url}api/documents").status_code == 401
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(service.link)
            expect(page.get_by_text("Drop files or a folder here")).to_be_visible()
            expect(page.locator("#vitals")).to_be_visible(timeout=PATIENT_MS)
            assert "token" not in page.url
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(service.url)
            page.locator("#token").fill("wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#login-error")).to_have_text("This is not the token.")
            page.locator("#token").fill(token)
            page.keyboard.press("Enter")
            expect(page.locator("#login")).to_be_hidden()
            expect(page.locator("#vitals")).to_be_visible(timeout=PATIENT_MS)
    finally:
        assert service.stop() == 0
