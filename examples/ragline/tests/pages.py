"""The page in a real browser, on a real server with a real worker, for the tests of what a person does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")
pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from ragline.states import State
from servers import Answer, Question, serving

TOKEN = "a token of the tests"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("RAGLINE_TEST_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
PATIENT_MS = 60_000


class Service:
    """`ragline serve` in a process of its own."""

    def __init__(self, home: Path, *options: str, **environment: str) -> None:
        self.home, self._options = home, options
        self._environment = {**os.environ, "RAGLINE_HOME": str(home), "COLUMNS": "300", **environment}
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, on the port that it had before if it had one."""
        command = [sys.executable, "-u", "-c", "from ragline.cli import main; main()"]
        self._process = subprocess.Popen(
            [*command, "serve", "--port", str(self.port), *self._options],
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.said = ""
        for line in self._process.stdout:
            self.said += line
            if found := re.search(r"http://[^ ]*?:(\d+)/(\S*)", line):
                self.port, self.link = int(found[1]), found[0]
                return
        raise AssertionError(f"it does not serve: {self.said}")

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}/"

    def stop(self) -> int:
        """Ask it to stop; its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(timeout=40)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code


def said_by_model(question: Question) -> Answer:
    """An answer that cites one passage that is there and one that is not."""
    asked = question.body["messages"][1]["content"]
    assert "passage" in asked
    said = 'They dance [1], and "fly to the moon and back" [9].'
    if "quote" in asked:
        said = 'It says that they "tell where  Flowers are" [1].'
    return Answer({"choices": [{"message": {"content": said}}]})


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Everything in one command, on the embedded default."""
    with serving(said_by_model) as model:
        service = Service(
            tmp_path_factory.mktemp("service"),
            "--worker",
            RAGLINE_MAX_BYTES="200000",
            RAGLINE_CHAT_URL=model.url,
            RAGLINE_CHAT_MODEL="chatty",
        )
        try:
            yield service
        finally:
            assert service.stop() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium."""
    if CHROMIUM is None:
        reason = "no chromium is installed (Debian: apt install chromium)"
        if os.environ.get("CI"):
            pytest.fail(f"{reason} (CI is set: a missing browser is a failure)", pytrace=False)
        pytest.skip(reason)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, service: Service) -> Iterator[Page]:
    """The page, opened for the first time; no script of it may fail, and no policy may be broken."""
    with browser.new_context() as context:
        page = context.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
        page.on("dialog", lambda dialog: wrong.append(f"a script said {dialog.message}"))
        page.goto(service.url)
        yield page
        assert wrong == []


def add(page: Page, name: str, content: str | bytes) -> None:
    """Choose a file."""
    data = content.encode() if isinstance(content, str) else content
    page.set_input_files("#files", [{"name": name, "mimeType": "", "buffer": data}])


def document(page: Page, name: str) -> Locator:
    """The row of a document."""
    return page.locator("#documents > li").filter(has=page.get_by_text(name, exact=True))


def is_in_state(page: Page, name: str, state: str) -> None:
    """Wait until a document is in a state."""
    expect(document(page, name).locator(".state")).to_have_text(state, timeout=PATIENT_MS)


def search(page: Page, query: str) -> None:
    """Ask for passages."""
    page.get_by_label("A question, or words").fill(query)
    page.keyboard.press("Enter")


class Told:
    """What the server tells a page, in its place: each update is told once, and the page waits for the next."""

    def __init__(self, page: Page) -> None:
        self._updates: list[str] = []
        self._asking: list[Route] = []
        address = page.url
        page.goto("about:blank")  # what is asked from here on is asked by the page that is told
        page.route("**/api/events", self._asked)
        page.goto(address)

    def tell(self, documents: Sequence[dict[str, object]] = (), **status: object) -> None:
        """Tell all there is: the documents, counted too, and the rest of the status."""
        states = [document["state"] for document in documents]
        counts = {state.value: states.count(state.value) for state in State}
        quiet: dict[str, object] = {"waiting": 0, "owed": 0, "dead": 0}
        known = {"documents": counts, "retryable": 0, "messages": quiet, "workers": [], "is_worked_on": False}
        update = {"is_whole": True, "documents": list(documents), "removed": [], "status": known | status}
        self._updates.append(f"data: {json.dumps(update)}\n\n")
        self._answer()

    def _asked(self, route: Route) -> None:
        self._asking.append(route)
        self._answer()

    def _answer(self) -> None:
        if self._asking and self._updates:
            route, said = self._asking.pop(), self._updates.pop(0)
            route.fulfill(headers={"Content-Type": "text/event-stream"}, body=said)


def told_document(number: int, state: str = "ready", **values: object) -> dict[str, object]:
    """A document as the server tells it."""
    name = f"{number}.md"
    told = {"id": number, "name": name, "uris": [f"upload:///{name}"], "size_bytes": 100, "state": state}
    unknown = {"since": None, "chunks": 0, "embedded": 0, "reason": None, "is_permanent": False}
    return told | unknown | {"is_found": state == "ready", "is_newer": False} | values


def told_passage(number: int, **values: object) -> dict[str, object]:
    """A passage as the server tells it."""
    place = {"document_id": 1, "name": "a.md", "heading": "", "pages": None, "start": 0, "end": 20}
    return (
        place
        | {"citation": "a.md", "quote": f"Passage {number}.", "score": 1.0, "also": [], "marks": []}
        | values
    )


CONTRAST = """
([selector, part]) => {
    const element = [...document.querySelectorAll(selector)].find((one) => one.offsetParent ?? one.closest("dialog[open]"));
    const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => {
        const [r, g, b] = color.slice(0, 3).map((part) => {
            const share = part / 255;
            return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const groundOf = (one) => {
        while (one && (rgb(getComputedStyle(one).backgroundColor)[3] ?? 1) === 0) one = one.parentElement;
        return getComputedStyle(one ?? document.body).backgroundColor;
    };
    const ratio = (...colors) => {
        const [less, more] = colors.map((color) => light(rgb(color))).sort((one, other) => one - other);
        return (more + 0.05) / (less + 0.05);
    };
    const grounds = [element, ...(part === "color" ? [] : [element.parentElement])].map(groundOf);
    return Math.min(...grounds.map((ground) => ratio(getComputedStyle(element)[part], ground)));
}
"""


def contrast(page: Page, selector: str, part: str = "color") -> float:
    """The contrast of an element's text with its ground (WCAG 2.1, 1.4.3), or of its border with both sides (1.4.11)."""
    value: float = page.evaluate(CONTRAST, [selector, part])
    return value
