"""The API's reading: what is code and what is a heading, where words stand, and addresses where nothing is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")

from fastapi.testclient import TestClient

from pipelines import KEYWORDS, add, empty_index, until_embedding
from ragline.app import alchemy
from ragline.web.application import create_web

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
GUIDE = "# 🦅 Kites\n\nA red\nKite; a RED   kite.\n\n```\ncode = 1\n```\n\n## Black kites\n\nredkite\n"


@pytest.fixture
def client() -> Iterator[TestClient]:
    """A client of an application with an empty index."""
    empty_index()
    with TestClient(create_web(recipe=KEYWORDS), base_url="http://127.0.0.1") as client:
        yield client


def read(name: str, content: str) -> int:
    """Add a document and read it; its id."""
    with alchemy.session() as session:
        document_id = add(session, content, f"file:///{name}").document_id
        until_embedding(session, document_id)
        session.commit()
    return document_id


def test_words_are_found_where_they_stand(client: TestClient) -> None:
    """In characters of the text, whatever their capitals and white space; no pattern is read into them."""
    path = f"/api/documents/{read('kites.md', GUIDE)}"

    found = client.get(f"{path}/hits", params={"q": " red kite"}).json()

    assert [GUIDE[start:end] for start, end in found["hits"]] == ["red\nKite", "RED   kite"]
    assert found["has_more"] is False
    assert client.get(f"{path}/hits", params={"q": "k.te"}).json()["hits"] == []
    assert client.get(f"{path}/hits", params={"q": "   "}).json()["hits"] == []
    assert client.get(f"{path}/hits").status_code == 422
    assert client.get("/api/documents/999999/hits", params={"q": "kite"}).status_code == 404


def test_so_many_hits_are_enough(client: TestClient) -> None:
    """That there are more is told."""
    found = client.get(f"/api/documents/{read('many.md', 'kite ' * 1200)}/hits?q=kite").json()

    assert len(found["hits"]) == 1000
    assert found["has_more"] is True


def test_headings_and_code_of_a_text_are_told(client: TestClient) -> None:
    """By where they begin; also of a part of the text that begins within code."""
    path = f"/api/documents/{read('kites.md', GUIDE)}"
    code = GUIDE.index("```")

    headings = client.get(path).json()["headings"]
    excerpt = client.get(f"{path}/excerpt?start={code + 4}&end={code + 8}&around=2").json()

    assert [(one["level"], one["title"], one["start"]) for one in headings] == [
        (1, "🦅 Kites", 0),
        (2, "Black kites", GUIDE.index("##")),
    ]
    assert excerpt["blocks"] == [{"start": code + 2, "end": code + 10, "kind": "code"}]


def test_a_browser_is_shown_a_page_where_nothing_is(client: TestClient) -> None:
    """With a way to the start, by the policy of all pages; others are told so in JSON, as before."""
    page = client.get("/no/such/page", headers={"Accept": BROWSER})

    assert page.status_code == 404
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert '<a class="button" href="/">' in page.text
    assert "no/such" not in page.text
    for accept in ("*/*", "application/json", ""):
        other = client.get("/no/such/page", headers={"Accept": accept})
        assert other.status_code == 404
        assert other.json() == {"detail": "Not Found"}
        assert other.headers["vary"] == page.headers["vary"] == "Accept"
    assert client.post("/", headers={"Accept": BROWSER}).status_code == 405
    assert client.get("/api/documents/999999", headers={"Accept": BROWSER}).json()["detail"]
