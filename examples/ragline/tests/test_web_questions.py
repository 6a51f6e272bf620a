"""The API's questions: passages piece by piece, and what is said of a question that is not taken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the extra `web` is not installed")

from fastapi.testclient import TestClient

from pipelines import KEYWORDS, add, empty_index, until_embedding
from ragline.app import alchemy
from ragline.web.application import create_web


@pytest.fixture
def client() -> Iterator[TestClient]:
    """A client of an application with an empty index."""
    empty_index()
    with TestClient(create_web(recipe=KEYWORDS), base_url="http://127.0.0.1") as client:
        yield client


def test_a_search_goes_on_where_it_ended(client: TestClient) -> None:
    """The pieces are the whole, and the last one says that it is the last."""
    for number in range(5):
        with alchemy.session() as session:
            content = f"The heron number {number}." + " It waits." * number
            until_embedding(session, add(session, content, f"file:///{number}.txt").document_id)

    whole = client.get("/api/search", params={"q": "heron"}).json()
    pieces = [
        client.get("/api/search", params={"q": "heron", "limit": 2, "skip": skip}).json()
        for skip in (0, 2, 4)
    ]

    assert len(whole["passages"]) == 5
    assert [passage for piece in pieces for passage in piece["passages"]] == whole["passages"]
    assert [piece["has_more"] for piece in (*pieces, whole)] == [True, True, False, False]
