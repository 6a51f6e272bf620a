"""Embeddings from an OpenAI-compatible endpoint: real HTTP, and all that such a server does wrong."""

from __future__ import annotations

import datetime as dt
import json
import pickle
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import LetterEmbedder
from pipelines import long_text
from ragline import tasks
from ragline.embedders import available_embedder, load_embedder
from ragline.endpoints import Endpoint, retry_after_seconds
from ragline.errors import (
    ConfigurationError,
    EndpointBusyError,
    EndpointError,
    ModelUnavailableError,
)
from ragline.recipes import recipe_for
from ragline.remote import TEXTS_AT_ONCE, RemoteEmbedder, find_dimensions, remote_name
from ragline.settings import settings_from
from servers import Answer, Question, Script, in_turn, letter_vectors, serving
from test_commands import ragline

CACHE = Path("/nowhere")


def embed(script: Script, *texts: str, timeout_seconds: float = 5.0) -> np.ndarray:
    """Embed texts at a server with that script, which is to give 26 dimensions."""
    with serving(script) as server:
        endpoint = Endpoint(server.url, "letters", timeout_seconds=timeout_seconds)
        return RemoteEmbedder(endpoint, 26).embed(texts)


def test_vectors_come_back_at_length_one_in_the_order_of_the_texts() -> None:
    """The server lists them in another order and at other lengths."""
    texts = ("zebra zebra", "whale", "a")

    vectors = embed(letter_vectors, *texts)

    np.testing.assert_allclose(vectors, LetterEmbedder().embed(texts), atol=1e-5)


def test_many_texts_are_asked_for_in_batches_with_model_and_key() -> None:
    """No request is larger than servers take, and each says who asks for what."""
    texts = [f"text {number}" for number in range(TEXTS_AT_ONCE + 1)]
    with serving(letter_vectors) as server:
        endpoint = Endpoint(f"{server.url}/", "letters", key="secret")
        vectors = RemoteEmbedder(endpoint, 26).embed(texts)

    assert vectors.shape == (len(texts), 26)
    assert [len(question.body["input"]) for question in server.questions] == [TEXTS_AT_ONCE, 1]
    for question in server.questions:
        assert question.path == "/v1/embeddings"
        assert question.body["model"] == "letters"
        assert question.headers["Authorization"] == "Bearer secret"


GOOD = [0.5] * 26


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(raw=b"<html>Not found</html>"), "not JSON"),
        (Answer([]), "no vectors for 2 texts"),
        (Answer({"data": [{"embedding": GOOD}]}), "1 vectors for 2 texts"),
        (Answer({"data": [{"embedding": GOOD}, {"embedding": "base64=="}]}), "not a vector of numbers"),
        (
            Answer({"data": [{"embedding": GOOD}, {"embedding": [*GOOD[:25], "1"]}]}),
            "not a vector of numbers",
        ),
        (Answer({"data": [{"embedding": GOOD}, {"embedding": [[1], [1, 2]]}]}), "not a vector of numbers"),
        (Answer({"data": [{"embedding": GOOD}, {"embedding": [10**400] * 26}]}), "not a vector of numbers"),
        (Answer({"data": [{"embedding": GOOD}, None]}), "not a vector of numbers"),
        (Answer({"data": [{"embedding": GOOD, "index": 0}, {"embedding": GOOD, "index": 0}]}), "belongs"),
        (Answer({"data": [{"embedding": GOOD}, {"embedding": [0.5] * 25}]}), "25 dimensions"),
        (Answer({"data": [{"embedding": GOOD}, {"embedding": [0.0] * 26}]}), "without a length"),
        (Answer({"data": [{"embedding": GOOD}, {"embedding": [float("nan")] * 26}]}), "without a length"),
        (Answer({"error": {"message": "no such model"}}, status=404), "status 404: no such model"),
        (Answer({"error": "no such model"}, status=400), "status 400: no such model"),
        (Answer({"error": {"message": "bad key secret"}}, status=401), "does not accept the key"),
        (Answer(status=308, headers={"Location": "http://127.0.0.1:1/"}), "points elsewhere"),
    ],
)
def test_an_answer_that_cannot_be_used_says_what_is_wrong_with_it(answer: Answer, said: str) -> None:
    """It is no vector of an index, and the same call would not do better later."""
    with pytest.raises(EndpointError, match=said) as caught:
        embed(in_turn(answer), "one", "two")

    assert not isinstance(caught.value, EndpointBusyError)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_told_from_one_that_refuses(status: int) -> None:
    """The error carries what Retry-After asks for, also from one process to another."""
    with pytest.raises(EndpointBusyError) as caught:
        embed(in_turn(Answer({"error": {"message": "slow down"}}, status, {"Retry-After": "7"})), "text")

    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.retry_after_seconds) == (
        str(caught.value),
        7.0,
    )
    assert "slow down" in str(copy)


@pytest.mark.parametrize(
    "answer",
    [Answer({}, delay_seconds=30), Answer(raw=b"{" + b" " * 1000 + b"}", drips=True)],
    ids=["silent", "drips"],
)
def test_an_answer_that_takes_too_long_is_given_up(answer: Answer) -> None:
    """Also when bytes keep coming, each in time."""
    with pytest.raises(EndpointBusyError, match=r"within 0\.3 seconds"):
        embed(in_turn(answer), "text", timeout_seconds=0.3)


def test_a_server_that_is_not_there_is_busy() -> None:
    """It may come back; the error names it without what else the URL holds."""
    with serving(letter_vectors) as server:
        url = server.url.replace("//", "//user:password@")

    with pytest.raises(EndpointBusyError, match="cannot be reached") as caught:
        RemoteEmbedder(Endpoint(url, "letters"), 26).embed(["text"])

    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("1e9", 3600.0),
        ("Sun, 01 Nov 2026 12:00:30 GMT", 30.0),
        ("Sun, 01 Nov 2026 11:00:00 GMT", 0.0),
        ("soon", None),
        ("nan", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_read_in_both_of_its_forms(value: str | None, seconds: float | None) -> None:
    """Seconds or a date (RFC 9110, 10.2.3), within reason; nonsense is no advice."""
    now = dt.datetime(2026, 11, 1, 12, tzinfo=dt.timezone.utc)

    assert retry_after_seconds(value, now) == seconds


def test_pauses_are_as_long_as_asked_for_and_not_all_the_same() -> None:
    """Batches that were refused at once do not come back at once; without advice pauses grow, up to a limit."""
    asked = {tasks.pause_seconds(30.0, 0) for _ in range(20)}

    assert len(asked) > 10
    assert 30 <= min(asked) <= max(asked) <= 45
    assert tasks.pause_seconds(None, 3) >= 8
    assert tasks.pause_seconds(None, 50) <= 900


def test_the_recipe_names_server_model_and_dimensions() -> None:
    """With another of them the same bytes are another document, processed again when they are added again."""
    endpoint = Endpoint("http://one/v1", "letters" * 9)
    others = [replace(endpoint, url="http://two/v1"), replace(endpoint, model="letters")]

    names = {
        remote_name(endpoint, 26),
        remote_name(endpoint, 27),
        *(remote_name(other, 26) for other in others),
    }

    assert len(names) == 4
    assert all(len(name) <= 64 for name in names)
    assert recipe_for(remote_name(endpoint, 26)).splitter.split(":")[1] == "estimate"
    assert remote_name(replace(endpoint, key="other"), 26) == remote_name(endpoint, 26)


def test_a_document_gets_no_vectors_of_another_endpoint() -> None:
    """A worker whose settings give another model than the document wants refuses the work."""
    endpoint = Endpoint("http://one/v1", "letters")
    name = remote_name(endpoint, 26)

    right = load_embedder(name, CACHE, endpoint)

    assert right is not None
    assert (right.name, right.dimensions) == (name, 26)
    for wrong in (None, Endpoint("http://one/v1", "words")):
        with pytest.raises(ModelUnavailableError, match="settings of this machine"):
            load_embedder(name, CACHE, wrong)


def test_dimensions_are_asked_for_or_found_out() -> None:
    """Set, they are part of every request and nothing is asked before; not set, one word tells them."""
    with serving(letter_vectors) as server:
        endpoint = Endpoint(server.url, "letters")
        assert find_dimensions(endpoint) == 26
        assert available_embedder("auto", CACHE, endpoint) == (remote_name(endpoint, 26), None)
        asked = len(server.questions)
        fixed = replace(endpoint, dimensions=26)

        assert find_dimensions(fixed) == 26
        assert len(server.questions) == asked
        RemoteEmbedder(fixed, 26).embed(["text"])
        assert server.questions[-1].body["dimensions"] == 26

    with pytest.raises(ModelUnavailableError, match="RAGLINE_EMBEDDINGS_DIMENSIONS"):
        available_embedder("openai", CACHE, endpoint)


def test_settings_of_endpoints_are_read_and_checked() -> None:
    """A half of one, or an address that is none, is named; the key is in no text."""
    environment = {
        "RAGLINE_EMBEDDINGS_URL": "http://host/v1",
        "RAGLINE_EMBEDDINGS_MODEL": "m",
        "RAGLINE_EMBEDDINGS_KEY": "secret",
        "RAGLINE_EMBEDDINGS_DIMENSIONS": "512",
        "RAGLINE_EMBEDDINGS_SECONDS": "9",
    }

    settings = settings_from(environment)

    assert settings.embeddings == Endpoint("http://host/v1", "m", "secret", 512, 9)
    assert settings.chat is None
    assert "secret" not in repr(settings)
    for wrong in (
        {"RAGLINE_CHAT_URL": "http://host"},
        {"RAGLINE_CHAT_URL": "ftp://host", "RAGLINE_CHAT_MODEL": "m"},
        {"RAGLINE_EMBEDDER": "openai"},
    ):
        with pytest.raises(ConfigurationError, match="RAGLINE_"):
            settings_from(wrong)


def test_a_busy_endpoint_delays_documents_and_holds_no_transaction(tmp_path: Path) -> None:
    """From files to answers with a real worker: refused with Retry-After, tried again, found by its vectors.

    While the endpoint thinks, another connection can take the database's write lock at once.
    """
    home, folder = tmp_path / "home", tmp_path / "documents"
    folder.mkdir()
    (folder / "whale.md").write_text(long_text("whale", 40))
    refusals = [Answer(status=429, headers={"Retry-After": "1"}), Answer(status=503)]

    def script(question: Question) -> Answer:
        if len(question.body["input"]) > 1:
            with sqlite3.connect(home / "ragline.db", timeout=0, isolation_level=None) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
            if refusals:
                return refusals.pop(0)
        return letter_vectors(question)

    with serving(script) as server:
        environment = {
            "RAGLINE_EMBEDDER": "auto",
            "RAGLINE_EMBEDDINGS_URL": server.url,
            "RAGLINE_EMBEDDINGS_MODEL": "letters",
        }
        ingested = ragline(home, "ingest", str(folder), **environment)
        status = json.loads(ragline(home, "status", "--json", **environment).stdout)
        found = ragline(home, "search", "whale", "--mode", "vector", "--json", **environment)

    assert ingested.returncode == 0, ingested.stdout + ingested.stderr + (home / "worker.log").read_text()
    assert refusals == []
    assert status["documents"]["ready"] == 1
    assert status["embedded"] == status["chunks"] > 1
    assert status["search"] == "keywords and vectors"
    assert "whale" in json.loads(found.stdout)[0]["quote"]
