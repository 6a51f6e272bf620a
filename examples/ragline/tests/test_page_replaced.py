"""The page in a real browser: a document that is replaced, deleted or made ready while somebody reads it."""

from __future__ import annotations

import re
import urllib.request

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Page, Route, expect

from pages import (
    PATIENT_MS,
    Service,
    Told,
    add,
    browser,
    document,
    is_in_state,
    page,
    search,
    service,
    told_document,
)

__all__ = ["browser", "page", "service"]  # fixtures

LONG = "\n\n".join(f"Paragraph {number} of the first version." for number in range(600))


def upload(service: Service, name: str, content: str) -> None:
    """Somebody else adds a file."""
    request = urllib.request.Request(
        f"{service.url}api/documents?name={name}",
        data=content.encode(),
        headers={"Content-Type": "application/octet-stream"},
    )
    urllib.request.urlopen(request, timeout=20).close()


def delete(service: Service, number: str) -> None:
    """Somebody else deletes a document."""
    request = urllib.request.Request(f"{service.url}api/documents/{number}", method="DELETE")
    urllib.request.urlopen(request, timeout=20).close()


def opened(page: Page, name: str) -> str:
    """Open a document from the list; its id."""
    is_in_state(page, name, "Ready")
    number = document(page, name).get_attribute("data-id")
    assert number is not None
    document(page, name).locator(".name").click()
    expect(page.locator("#reader-text")).to_be_focused()
    return number


def test_who_reads_a_document_is_told_that_it_was_replaced_and_led_to_the_newer_one(
    page: Page, service: Service
) -> None:
    """What is here of its text stays, and nothing is offered that can no longer be had."""
    add(page, "plan.md", LONG)
    opened(page, "plan.md")
    facts = page.locator("#reader-facts").inner_text()

    upload(service, "plan.md", "The second version is short.")

    expect(page.locator("#reader-said")).to_contain_text("A newer version has replaced", timeout=PATIENT_MS)
    expect(page.locator("#reader-text")).to_contain_text("Paragraph 0 of the first version.")
    expect(page.locator("#reader-facts")).to_have_text(facts)
    for part in ("#reader-after", "#reader-download", "#find"):
        expect(page.locator(part)).to_be_hidden()
    page.get_by_role("button", name="Read the newer version").click()
    expect(page.locator("#reader-text")).to_have_text("The second version is short.")
    expect(page.locator("#reader-notice")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("#reader")).to_be_hidden()
    expect(page).to_have_url(service.url)


def test_who_reads_a_document_is_told_that_it_was_deleted(page: Page, service: Service) -> None:
    """Its text stays until the window is closed."""
    add(page, "gone.md", LONG.replace("first", "only"))
    number = opened(page, "gone.md")

    delete(service, number)

    expect(page.locator("#reader-said")).to_contain_text("no longer here", timeout=PATIENT_MS)
    expect(page.locator("#reader-text")).to_contain_text("Paragraph 0 of the only version.")
    expect(page.get_by_role("button", name="Read the newer version")).to_be_hidden()


def test_a_passage_of_a_document_that_was_replaced_leads_to_the_newer_one(
    page: Page, service: Service
) -> None:
    """Who found it before it was replaced is not left with nothing."""
    add(page, "news.md", "The tapir is at home.")
    is_in_state(page, "news.md", "Ready")
    search(page, "tapir")
    expect(page.locator("#passages .source").first).to_have_text("news.md")
    upload(service, "news.md", "The tapir has gone out.")
    expect(page.locator("#passages > li").first).to_contain_text("no longer here", timeout=PATIENT_MS)

    page.locator("#passages .source").first.click()

    expect(page.locator("#reader-title")).to_have_text("This document is no longer here")
    page.get_by_role("button", name="Read the newer version").click()
    expect(page.locator("#reader-text")).to_have_text("The tapir has gone out.")


def test_the_address_of_a_document_that_was_replaced_since_leads_to_the_newer_one(
    page: Page, service: Service
) -> None:
    """Who was sent it has never seen the one before: its name in the address tells which one is meant."""
    add(page, "sent.md", "The first is sent.")
    opened(page, "sent.md")
    expect(page).to_have_url(re.compile(r"\?document=\d+&name=sent.md$"))
    address = page.url
    page.keyboard.press("Escape")
    expect(page).to_have_url(service.url)
    upload(service, "sent.md", "The second is read.")
    expect(document(page, "sent.md")).to_have_count(1, timeout=PATIENT_MS)
    is_in_state(page, "sent.md", "Ready")

    page.goto(address)

    expect(page.locator("#reader-title")).to_have_text("This document is no longer here")
    expect(page.locator("#reader-said")).to_have_text("There is a newer document of this name.")
    page.get_by_role("button", name="Read the newer version").click()
    expect(page.locator("#reader-text")).to_have_text("The second is read.")
    page.go_back()
    page.goto(f"{service.url}?document=9999&name=none.md")
    expect(page.locator("#reader-title")).to_have_text("This document is no longer here")
    expect(page.locator("#reader-notice")).to_be_hidden()


def test_a_document_that_is_opened_too_early_is_shown_when_it_is_read(page: Page) -> None:
    """Nobody has to close and open it again."""
    told = Told(page)
    now = told_document(7, "queued")
    facts = {"reached": {}, "characters": None, "pages": None, "encoding": None, "headings": []}
    text = {"before": "", "quote": "Now it is read.", "after": "", "start": 0, "end": 15, "length": 15}

    def answer(route: Route) -> None:
        if "/excerpt" not in route.request.url:
            route.fulfill(json=now | facts)
        elif now["state"] == "ready":
            route.fulfill(json=text | {"name": "7.md", "blocks": []})
        else:
            route.fulfill(status=404, json={"detail": "There is no text."})

    page.route("**/api/documents/**", answer)
    told.tell([now])
    document(page, "7.md").locator(".name").click()
    expect(page.locator("#reader-text")).to_have_text("Its text is not read yet.")

    now = told_document(7, "ready")
    told.tell([now])

    expect(page.locator("#reader-text")).to_have_text("Now it is read.")


def test_a_document_that_the_server_did_not_answer_for_is_shown_when_it_is_back(page: Page) -> None:
    """As a search is: nobody has to close and open it again."""
    told = Told(page)
    told.tell([told_document(7)])
    text = {"before": "", "quote": "Here it is.", "after": "", "start": 0, "end": 11, "length": 11}
    facts = {"reached": {}, "characters": 11, "pages": None, "encoding": None, "headings": []}
    page.route("**/api/documents/7*", lambda route: route.abort())
    document(page, "7.md").locator(".name").click()
    expect(page.locator("#reader-text")).to_have_text("The server does not answer.")

    page.unroute("**/api/documents/7*")
    page.route("**/api/documents/7", lambda route: route.fulfill(json=told_document(7) | facts))
    page.route(
        "**/api/documents/7/excerpt?*",
        lambda route: route.fulfill(json=text | {"name": "7.md", "blocks": []}),
    )
    told.tell([told_document(7)])

    expect(page.locator("#reader-text")).to_have_text("Here it is.")


@pytest.mark.parametrize("number", ["0", "99999999999", "9" * 40])
def test_an_address_of_a_document_that_cannot_be_is_as_good_as_any_that_is_gone(
    page: Page, service: Service, number: str
) -> None:
    """Numbers that the API refuses are told in a person's words."""
    page.goto(f"{service.url}?document={number}")

    expect(page.locator("#reader-title")).to_have_text("This document is no longer here")
    expect(page.locator("#reader-text")).to_have_text("It was deleted, or a newer version has replaced it.")


def test_the_title_of_the_page_names_the_document_that_is_read(page: Page) -> None:
    """For who has several of them in tabs; when it is closed, the search is named again."""
    add(page, "title.md", "The manatee floats.")
    is_in_state(page, "title.md", "Ready")
    search(page, "manatee")
    expect(page).to_have_title("manatee · ragline")

    page.locator("#passages .source").first.click()
    expect(page).to_have_title("title.md · ragline")
    page.keyboard.press("Escape")

    expect(page).to_have_title("manatee · ragline")
