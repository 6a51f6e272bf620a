"""The API: what it takes and gives, whom it refuses, and that nothing of a document is trusted."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import threading
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from conftest import empty_tables
from pipelines import KEYWORDS, counter_of
from ragline import asking, pipeline
from ragline.app import alchemy, create_tables, settings
from ragline.endpoints import Endpoint
from ragline.errors import ConfigurationError, TooLargeError
from ragline.settings import settings_from
from ragline.tables import Document, Original
from ragline.web import guard, live
from ragline.web.application import create_web
from ragline.web.models import Update
from ragline.web.serving import Server, is_loopback
from ragline.web.uploads import MAX_NAME_CHARACTERS, harmless_path, received
from servers import Answer, eventually, in_turn, serving

TOKEN = "a token of the tests"
HERE = "http://127.0.0.1:8000"


def fresh(*, token: str | None = None) -> TestClient:
    """A client of a new application, as a browser on this machine."""
    return TestClient(create_web(recipe=KEYWORDS, token=token), base_url=HERE)


@pytest.fixture(autouse=True)
def _empty() -> None:
    """An empty index."""
    create_tables(alchemy)
    empty_tables(alchemy.engine)
    with alchemy.begin() as session:
        for table in alchemy.metadata.sorted_tables:
            session.execute(table.delete())


@pytest.fixture
def client() -> Iterator[TestClient]:
    """A client of an application without a token."""
    with fresh() as client:
        yield client


def upload(client: TestClient, name: str, content: str | bytes, **headers: str) -> dict[str, Any]:
    """Upload a document, which must be taken."""
    response = client.post("/api/documents", params={"name": name}, content=content, headers=headers)
    assert response.status_code == 201, response.text
    body: dict[str, Any] = response.json()
    return body


def process(document_id: int) -> None:
    """Do what the worker would."""
    steps = (
        pipeline.admit,
        pipeline.parse,
        lambda session, document_id: pipeline.split(session, document_id, counter_of, batch_chunks=3),
    )
    for step in steps:
        with alchemy.begin() as session:
            step(session, document_id)


def rows(session: Session, table: type[object]) -> int:
    """How many rows a table has."""
    return session.scalar(select(func.count()).select_from(table)) or 0


# --- documents ---------------------------------------------------------------------------------------------


def test_an_upload_is_queued_searched_read_and_deleted(client: TestClient) -> None:
    """Its first task is owed from the same transaction; its passages quote exactly; deleted, it is gone."""
    added = upload(client, "notes/bees.md", "# Bees\n\nBees dance to tell where flowers are.\n")
    document_id = added["document"]["id"]
    owed = client.get("/api/status").json()
    process(document_id)

    assert (added["outcome"], added["document"]["state"]) == ("added", "queued")
    assert added["document"]["uris"] == ["upload:///notes/bees.md"]
    assert owed["documents"]["queued"] == owed["messages"]["waiting"] == 1
    results = client.get("/api/search", params={"q": "where do bees dance?"}).json()
    (passage,) = results["passages"]
    words = [
        passage["quote"][start - passage["start"] : end - passage["start"]] for start, end in passage["marks"]
    ]
    assert words == ["Bees", "Bees", "dance"]
    place = {"start": passage["start"], "end": passage["end"]}
    excerpt = client.get(f"/api/documents/{document_id}/excerpt", params=place).json()
    assert excerpt["quote"] == passage["quote"]
    assert (excerpt["is_start"], excerpt["is_end"]) == (True, True)
    detail = client.get(f"/api/documents/{document_id}").json()
    assert list(detail["reached"]) == ["queued", "parsing", "splitting", "embedding", "ready"]
    assert (detail["characters"], detail["is_found"]) == (46, True)

    assert client.delete(f"/api/documents/{document_id}").status_code == 204
    assert client.get(f"/api/documents/{document_id}").status_code == 404
    assert client.get("/api/search", params={"q": "bees"}).json()["passages"] == []


def test_a_passage_is_shown_with_the_text_around_it(client: TestClient) -> None:
    """As much of it as a person needs, cut exactly, in characters; beyond the end there is nothing."""
    content = "".join(f"Sentence {number} über Wale. " for number in range(400))
    document_id = upload(client, "a.md", content)["document"]["id"]
    path = f"/api/documents/{document_id}/excerpt"
    early = client.get(path, params={"start": 0, "end": 9})
    process(document_id)

    middle = client.get(path, params={"start": 5000, "end": 5100}).json()
    beyond = client.get(path, params={"start": 10**8, "end": 10**9}).json()

    assert early.status_code == 404
    assert middle["quote"] == content[5000:5100]
    assert middle["before"] == content[5000 - len(middle["before"]) : 5000]
    assert middle["after"] == content[5100 : 5100 + len(middle["after"])]
    assert (middle["is_start"], middle["is_end"]) == (False, False)
    assert beyond["quote"] == ""
    on = client.get(path, params={"start": middle["end"], "end": middle["end"] + 500, "around": 0}).json()
    assert (on["quote"], on["before"], on["after"]) == (content[middle["end"] :][:500], "", "")
    assert (middle["start"], middle["length"]) == (5000 - len(middle["before"]), len(content))


def test_the_same_upload_twice_is_one_document_and_new_bytes_replace_it(client: TestClient) -> None:
    """As at the command line."""
    first = upload(client, "a.md", "one")
    process(first["document"]["id"])

    assert upload(client, "a.md", "one")["outcome"] == "unchanged"
    assert upload(client, "b.md", "one")["outcome"] == "duplicate"
    assert upload(client, "a.md", "two")["outcome"] == "replaced"


def test_documents_are_paused_resumed_cancelled_and_retried(client: TestClient) -> None:
    """Each answers with the document as it is now; what cannot be done now is told with a reason."""
    document_id = upload(client, "a.md", "some text")["document"]["id"]

    def act(action: str) -> tuple[int, str]:
        response = client.post(f"/api/documents/{document_id}/{action}")
        return response.status_code, response.json().get("state") or response.json()["detail"]

    assert act("pause") == (200, "paused")
    assert act("pause") == (409, "a.md is paused: it cannot be paused now.")
    assert act("resume") == (200, "queued")
    assert act("cancel") == (200, "cancelled")
    assert act("retry") == (200, "queued")
    for action in ("pause", "resume", "cancel", "retry"):
        assert client.post(f"/api/documents/999999/{action}").status_code == 404
    assert client.delete("/api/documents/999999").status_code == 404


def test_all_failed_documents_that_may_succeed_are_retried_at_once(client: TestClient) -> None:
    """Those that failed for good are left alone."""
    ids = [upload(client, f"{name}.md", name)["document"]["id"] for name in ("one", "two", "three")]
    with alchemy.begin() as session:
        for document_id, error in zip(ids, (OSError("gone"), OSError("away"), None), strict=True):
            if error is not None:
                pipeline.fail(session, error, document_id)

    assert client.post("/api/documents/retry-failed").json() == {"ids": ids[:2]}
    assert client.post("/api/documents/retry-failed").json() == {"ids": []}


def test_documents_are_listed_page_by_page(client: TestClient) -> None:
    """The newest first, each once, and by state."""
    ids = [upload(client, f"{number}.md", f"text {number}")["document"]["id"] for number in range(5)]
    client.post(f"/api/documents/{ids[0]}/pause")

    listed, before = [], None
    while True:
        query = {"limit": 2} | ({} if before is None else {"before": before})
        page = client.get("/api/documents", params=query).json()
        listed += [document["id"] for document in page["documents"]]
        before = page["before"]
        if before is None:
            break

    assert listed == ids[::-1]
    (paused,) = client.get("/api/documents", params={"state": "paused"}).json()["documents"]
    assert paused["id"] == ids[0]


def test_documents_are_listed_by_name_size_and_age(client: TestClient) -> None:
    """Those with each word in their name or folder, in pages that are skipped; no sign in it is special."""
    for name, content in (("b/%b.md", "x" * 30), ("b/a.md", "x" * 20), ("c/C 1.md", "x" * 10)):
        upload(client, name, content)

    def listed(**query: object) -> list[str]:
        page = client.get("/api/documents", params=query).json()
        return [document["name"] for document in page["documents"]]

    assert listed(order="name") == ["%b.md", "a.md", "C 1.md"]
    assert listed(order="largest") == listed(order="oldest") == ["%b.md", "a.md", "C 1.md"]
    assert listed(order="name", skip=1, limit=1) == ["a.md"]
    assert listed(called="%") == ["%b.md"]
    assert listed(called="c 1") == listed(called="c/C 1") == ["C 1.md"]
    assert listed(called="b/") == ["a.md", "%b.md"]
    assert listed(called="MD  b/ ") == ["a.md", "%b.md"]
    assert client.get("/api/documents", params={"limit": 2}).json()["has_more"]
    assert not client.get("/api/documents", params={"limit": 2, "skip": 1}).json()["has_more"]


def test_the_bytes_of_a_document_are_saved_and_never_shown(client: TestClient) -> None:
    """As they were, under their name, and not as a page of this address; a document without any has none."""
    content = b"<script>alert(1)</script> caf\xe9"
    document_id = upload(client, "a/\u00fc'; x.html", content)["document"]["id"]

    response = client.get(f"/api/documents/{document_id}/original")

    assert response.content == content
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"] == "attachment; filename*=UTF-8''%C3%BC%27%3B%20x.html"
    assert client.get("/api/documents/999999/original").status_code == 404


# --- what people upload ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name", "status", "said"),
    [
        (b"", "a.txt", 422, "empty"),
        (b" \n\t ", "a.txt", 422, "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a.txt", 415, "PNG picture"),
        (b"\x7fELF" + bytes(99), "report.pdf", 415, "a program"),
        (b"PK\x03\x04broken", "a.docx", 422, "broken"),
        (b"plain text", "a.pdf", 422, "not of that format"),
        (bytes(range(256)) * 9, "a.md", 415, "binary data"),
    ],
)
def test_what_no_parser_reads_is_refused_with_the_reason(
    client: TestClient, content: bytes, name: str, status: int, said: str
) -> None:
    """It is judged by its bytes, whatever it is called, and nothing of it is kept."""
    response = client.post("/api/documents", params={"name": name}, content=content)

    assert response.status_code == status
    assert said in response.json()["detail"]
    with alchemy.session() as session:
        assert rows(session, Document) == rows(session, Original) == 0


def test_an_upload_that_is_too_large_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest that is not is taken."""
    monkeypatch.setattr("ragline.web.routes.settings", Limited(20_000))

    refused = client.post("/api/documents", params={"name": "a.md"}, content=b"x" * 20_001)
    largest = client.post("/api/documents", params={"name": "a.md"}, content=b"x" * 20_000)

    assert (refused.status_code, largest.status_code) == (413, 201)
    assert "limit of 20 kB" in refused.json()["detail"]


@pytest.mark.parametrize(("declared_bytes", "pieces"), [(10**9, 0), (None, 3), (5, 3)])
def test_no_more_of_an_upload_is_read_than_is_allowed(declared_bytes: int | None, pieces: int) -> None:
    """Nothing where it says that it is too large; and no more than the limit where it says nothing, or lies."""
    read: list[int] = []

    async def endless() -> AsyncIterator[bytes]:
        for number in itertools.count():
            read.append(number)
            yield b"x" * 1000

    async def take() -> None:
        async with received(endless(), "a.md", declared_bytes=declared_bytes, max_bytes=2500):
            raise AssertionError("it was taken")

    with pytest.raises(TooLargeError):
        asyncio.run(take())

    assert len(read) == pieces


class Limited:
    """Settings with another limit."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("../../../etc/passwd", "etc/passwd"),
        ("..\\..\\windows\\win.ini", "windows/win.ini"),
        ("/etc/passwd", "etc/passwd"),
        ("a/./b//c.md", "a/b/c.md"),
        ("nul\x00byte.md", "nulbyte.md"),
        ("line\r\nbreak.md", "linebreak.md"),
        ("gnp.\u202egpj.md", "gnp.gpj.md"),
        ("..", "unnamed"),
        ("\u200b", "unnamed"),
        ("x" * 400 + ".md", "x" * 252 + ".md"),
        ("<img src=x onerror=alert(1)>.md", "<img src=x onerror=alert(1)>.md"),
    ],
)
def test_hostile_file_names_become_harmless_ones(client: TestClient, name: str, path: str) -> None:
    """No way up or out, no invisible marks; what is left is shown as it is, and is never a path here."""
    document = upload(client, name, f"text of {name!r}")["document"]

    assert harmless_path(name) == path
    assert document["name"] == path.rpartition("/")[2]
    assert "/.." not in document["uris"][0]


@given(st.text(max_size=2000))
def test_no_name_escapes(name: str) -> None:
    """Whatever is sent: a relative path of visible parts, short enough for the database."""
    path = harmless_path(name)

    assert path
    assert len(path) <= MAX_NAME_CHARACTERS
    assert all(unicodedata.category(sign)[0] != "C" for sign in path)
    assert not {"", ".", ".."} & set(path.split("/"))
    assert harmless_path(path) == path


def test_markup_in_documents_and_names_is_plain_text_to_the_api(client: TestClient) -> None:
    """It comes back as JSON that no browser takes for a page."""
    script = "<script>alert(1)</script>"
    document_id = upload(client, f"{script}.txt", f"a whale {script} swims")["document"]["id"]
    process(document_id)

    response = client.get("/api/search", params={"q": "whale"})

    assert response.json()["passages"][0]["quote"] == f"a whale {script} swims"
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"


# --- questions ---------------------------------------------------------------------------------------------


def test_questions_are_answered_with_checked_citations(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model the settings are named; a busy one says when to come back; an answer has its parts."""
    process(upload(client, "bees.md", "Bees dance to tell where flowers are.")["document"]["id"])
    question = {"question": "what do bees do?"}
    said = {"choices": [{"message": {"content": "They dance [1], and sing [2]."}}]}
    answers = in_turn(Answer(status=429, headers={"Retry-After": "7"}), Answer(status=400), Answer(said))

    unset = client.post("/api/ask", json=question)
    with serving(answers) as server:
        endpoint = Endpoint(server.url, "chatty")
        monkeypatch.setattr(asking.answer, "__kwdefaults__", {"endpoint": endpoint, "limit": 8})
        busy, refused, answered = (client.post("/api/ask", json=question) for _ in range(3))

    assert unset.status_code == 501
    assert "RAGLINE_CHAT_URL" in unset.json()["detail"]
    assert (busy.status_code, busy.headers["retry-after"]) == (503, "7")
    assert refused.status_code == 502
    parts = answered.json()["parts"]
    assert [(part["text"], part["citation"]) for part in parts] == [
        ("They dance ", None),
        ("[1]", 1),
        (", and sing.", None),
    ]
    assert "[2]" in answered.json()["notes"][0]


@pytest.mark.parametrize("query", [{}, {"q": ""}, {"q": "x", "limit": 0}, {"q": "x", "mode": "best"}])
def test_a_question_that_makes_no_sense_is_refused(client: TestClient, query: dict[str, object]) -> None:
    """With FastAPI's own description of what is wrong."""
    assert client.get("/api/search", params=query).status_code == 422


# --- who may ask -------------------------------------------------------------------------------------------

PATHS = (
    "/api/documents",
    "/api/status",
    "/api/events",
    "/api/search?q=x",
    "/api/openapi.json",
    "/api/limits",
)


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_told(path: str) -> None:
    """Neither without one, nor with a wrong one in any place."""
    wrong = [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer ü"},
        {"Cookie": f"{guard.COOKIE}={TOKEN}"},
        {"Cookie": f"{guard.COOKIE}={guard.cookie_value('another token')}"},
        {"Cookie": f"{guard.COOKIE}=; other=1"},
    ]
    with fresh(token=TOKEN) as client:
        for headers in wrong:
            encoded = {name: value.encode() for name, value in headers.items()}
            assert client.get(path, headers=encoded).status_code == 401
        assert client.post("/api/documents", params={"name": "a.md"}, content="x").status_code == 401
        assert client.delete("/api/documents/1").status_code == 401


def test_the_token_is_taken_from_header_link_and_login() -> None:
    """The link puts it into a cookie that scripts and other sites do not get, and away from the address."""
    with fresh(token=TOKEN) as client:
        by_header = client.get("/api/status", headers={"Authorization": f"Bearer {TOKEN}"})
        link = client.get("/", params={"token": TOKEN}, follow_redirects=False)
        by_cookie = client.get("/api/status")
        among = {"Cookie": f'other="a b; {guard.COOKIE}={guard.cookie_value(TOKEN)}; more'}
        assert client.get("/api/limits", headers=among).status_code == 200
    with fresh(token=TOKEN) as client:
        wrong = client.post("/api/login", json={"token": "wrong"})
        wrong_link = client.get("/", params={"token": "wrong"}, follow_redirects=False)
        right = client.post("/api/login", json={"token": TOKEN})
        by_login = client.get("/api/status")

    assert by_header.status_code == by_cookie.status_code == by_login.status_code == 200
    assert (link.status_code, link.headers["location"]) == (303, "/")
    for attribute in ("HttpOnly", "SameSite=strict"):
        assert attribute in link.headers["set-cookie"]
    assert TOKEN not in link.headers["set-cookie"]
    assert (wrong.status_code, right.status_code) == (401, 204)
    assert "set-cookie" not in wrong_link.headers


def test_the_page_is_shown_without_a_token_so_that_it_can_ask_for_one() -> None:
    """It holds nothing of the documents."""
    with fresh(token=TOKEN) as client:
        assert client.get("/").status_code == client.get("/main.js").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_sites_change_nothing(client: TestClient, headers: dict[str, str]) -> None:
    """A visitor's browser sends such requests on behalf of any page that it shows."""
    document_id = upload(client, "a.md", "some text")["document"]["id"]

    upload_refused = client.post("/api/documents", params={"name": "b.md"}, content="x", headers=headers)
    delete_refused = client.delete(f"/api/documents/{document_id}", headers=headers)

    assert (upload_refused.status_code, delete_refused.status_code) == (403, 403)
    own = {"Origin": HERE, "Sec-Fetch-Site": "same-origin"}
    assert client.delete(f"/api/documents/{document_id}", headers=own).status_code == 204


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""])
def test_without_a_token_only_loopback_names_are_served(client: TestClient, host: str) -> None:
    """A site whose name points at 127.0.0.1 (DNS rebinding) is told apart by the name."""
    assert client.get("/api/status", headers={"Host": host}).status_code == 403
    for good in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]", "[::1]:8000"):
        assert client.get("/api/limits", headers={"Host": good}).status_code == 200


def test_a_large_body_that_is_no_upload_is_refused(client: TestClient) -> None:
    """Also one in pieces, which does not say how long it is."""
    large = json.dumps({"token": "x" * guard.MAX_BODY_BYTES})

    assert client.post("/api/login", content=large).status_code == 413
    assert client.post("/api/login", content=iter([b"{}"])).status_code == 413


def test_every_response_forbids_what_the_page_does_not_need(client: TestClient) -> None:
    """No script, style or frame but the page's own; errors are no exception."""
    for path in ("/", "/main.js", "/api/limits", "/api/documents/999999", "/nothing"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["referrer-policy"] == "no-referrer"
    assert client.get("/api/limits").headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["/../application.py", "/%2e%2e/application.py", "/..%2fapplication.py", "/static/"]
)
def test_the_pages_files_are_all_that_is_served(client: TestClient, path: str) -> None:
    """No path leads out of their folder."""
    assert client.get(path).status_code == 404


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    """Neither a script, nor a style, nor a font; and no script or style stands in the page itself."""
    page = client.get("/").text
    for file in (
        "style.css",
        "main.js",
        "api.js",
        "documents.js",
        "uploads.js",
        "questions.js",
        "elements.js",
        "address.js",
        "passages.js",
        "reader.js",
        "shelf.js",
    ):
        source = client.get(f"/{file}").text
        assert "http:" not in source
        assert "https:" not in source
        assert "innerHTML" not in source
    assert "<style" not in page
    assert " style=" not in page
    assert "<script>" not in page


def test_the_api_is_described(client: TestClient) -> None:
    """Every operation has a description, and every answer in JSON a model."""
    described = client.get("/api/openapi.json").json()

    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (method, path)
            for status, response in operation["responses"].items():
                for content in response.get("content", {}).values():
                    assert content.get("schema") or content.get("itemSchema"), (method, path, status)


def test_a_token_that_can_be_guessed_is_refused() -> None:
    """And none is told by the settings."""
    with pytest.raises(ConfigurationError, match="RAGLINE_TOKEN"):
        settings_from({"RAGLINE_TOKEN": "short"})
    assert TOKEN not in repr(settings_from({"RAGLINE_TOKEN": TOKEN}))


@pytest.mark.parametrize(
    ("host", "is_one"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_loopback_addresses_are_known(host: str, is_one: bool) -> None:
    """Any other address makes a token necessary."""
    assert is_loopback(host) == is_one


# --- what is seen live -------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks in quick succession, and no survey."""
    monkeypatch.setattr(live, "WORKING_SECONDS", 0.01)
    monkeypatch.setattr(live, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(live, "_count_messages", lambda: None)
    monkeypatch.setattr(live, "_ask_workers", list)


@pytest.mark.usefixtures("quick")
def test_watching_begins_with_all_there_is_and_goes_on_with_what_changes(client: TestClient) -> None:
    """Who comes back begins with all there is again; between two looks no connection is held."""
    first = upload(client, "a.md", "one")["document"]["id"]
    second = upload(client, "b.md", "two")["document"]["id"]

    async def watch() -> None:
        watched = live.Live()
        pages = watched.watch()
        whole = await anext(pages)
        assert whole.is_whole
        assert [document.id for document in whole.documents] == [second, first]
        assert alchemy.engine.pool.checkedout() == 0
        await asyncio.to_thread(process, first)
        changed = await anext(pages)
        while not changed.documents:
            changed = await anext(pages)
        assert not changed.is_whole
        assert [(document.id, document.state.value) for document in changed.documents] == [(first, "ready")]
        assert changed.status.documents["ready"] == 1
        await asyncio.to_thread(client.delete, f"/api/documents/{second}")
        gone = await anext(pages)
        assert (gone.removed, gone.documents) == ([second], [])
        await pages.aclose()
        again = await anext(watched.watch())
        assert again.is_whole
        assert [document.id for document in again.documents] == [first]

    asyncio.run(watch())


@pytest.mark.usefixtures("quick")
def test_documents_that_make_room_for_newer_ones_are_not_told_as_deleted(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest are watched; who has seen an older one keeps it."""
    monkeypatch.setattr(live, "WATCHED_DOCUMENTS", 2)
    ids = [upload(client, f"{number}.md", f"text {number}")["document"]["id"] for number in range(2)]

    async def watch() -> None:
        pages = live.Live().watch()
        await anext(pages)
        added = await asyncio.to_thread(upload, client, "new.md", "new")
        update = await anext(pages)
        assert [document.id for document in update.documents] == [added["document"]["id"]]
        assert update.removed == []
        await asyncio.to_thread(client.delete, f"/api/documents/{ids[1]}")
        assert (await anext(pages)).removed == [ids[1]]

    asyncio.run(watch())


@pytest.mark.usefixtures("quick")
def test_a_page_that_goes_leaves_nothing_behind(client: TestClient) -> None:
    """However many watch: each look is shared, and none is made when all have gone."""
    upload(client, "a.md", "one")
    looks: list[object] = []
    look = live._look

    async def watch() -> None:
        watched = live.Live()
        live._look = lambda before: looks.append(before) or look(before)
        pages = [watched.watch() for _ in range(10)]
        await asyncio.gather(*(anext(page) for page in pages))
        assert len(looks) <= 2
        assert watched.watchers == 10
        for page in pages:
            await page.aclose()
        assert watched.watchers == 0
        before = len(looks)
        await asyncio.sleep(0.1)
        assert len(looks) == before
        assert alchemy.engine.pool.checkedout() == 0

    try:
        asyncio.run(watch())
    finally:
        live._look = look


@pytest.mark.usefixtures("quick")
def test_watching_ends_when_the_server_stops_or_the_database_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page then connects again by itself; the server waits for none."""

    async def watch() -> None:
        watched = live.Live()
        pages = watched.watch()
        await anext(pages)
        watched.close()
        with pytest.raises(StopAsyncIteration):
            await anext(pages)

        def broken(_: object) -> object:
            with alchemy.session() as session:
                return session.execute(text("SELECT nothing FROM nowhere"))

        monkeypatch.setattr(live, "_look", broken)
        with pytest.raises(StopAsyncIteration):
            await anext(live.Live().watch())

    asyncio.run(watch())


def test_limits_are_told_before_anything_is_sent(client: TestClient) -> None:
    """The page refuses by itself what the server would."""
    limits = client.get("/api/limits").json()

    assert limits["max_bytes"] == settings.max_bytes
    assert ".pdf" in limits["extensions"]


@contextmanager
def on_a_port(web: FastAPI) -> Iterator[tuple[Server, str]]:
    """Serve an application over real HTTP; give the server and its address."""
    config = uvicorn.Config(web, port=0, log_level="warning", timeout_graceful_shutdown=60)
    socket = config.bind_socket()
    server = Server(config, web.state.live)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{socket.getsockname()[1]}"
    server.handle_exit(signal.SIGTERM, None)
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.mark.usefixtures("quick")
def test_a_page_that_goes_while_it_is_told_something_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and not when its generator is collected: FastAPI leaves it where it waits for the connection."""
    kept: list[object] = []

    async def talk(self: live.Live) -> AsyncGenerator[Update, None]:
        self.watchers += 1
        try:
            while True:
                yield Update(is_whole=False, documents=[], removed=[], status=self.status())
        finally:
            self.watchers -= 1

    def watch(self: live.Live) -> object:
        kept.append(talk(self))
        return kept[-1]

    monkeypatch.setattr(live.Live, "watch", watch)
    web = create_web(recipe=KEYWORDS)

    with on_a_port(web) as (_, url), httpx.Client(base_url=url, timeout=20) as pages:
        for _ in range(3):
            with pages.stream("GET", "/api/events") as events:
                assert next(events.iter_lines()).startswith("data: ")
        eventually(lambda: web.state.live.watchers == 0)
    assert len(kept) == 3


@pytest.mark.usefixtures("quick")
def test_connections_that_end_and_servers_that_stop_wait_for_nobody(client: TestClient) -> None:
    """Over real HTTP: a page that is closed is forgotten, and one that is open does not keep the server up."""
    upload(client, "a.md", "one")
    web = create_web(recipe=KEYWORDS)

    with on_a_port(web) as (server, url), httpx.Client(base_url=url, timeout=20) as pages:
        for _ in range(3):
            with pages.stream("GET", "/api/events") as events:
                lines = events.iter_lines()
                assert next(lines).startswith("data: ")
                assert web.state.live.watchers >= 1
        eventually(lambda: web.state.live.watchers == 0)
        with pages.stream("GET", "/api/events") as events:
            lines = events.iter_lines()
            next(lines)
            server.handle_exit(signal.SIGTERM, None)
            assert list(lines)[-1] == ""

    assert alchemy.engine.pool.checkedout() == 0
