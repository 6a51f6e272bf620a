"""The steps that `ragline status` and the page count, while a worker is at one and while one is put off."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from servers import Answer, Question, eventually, letter_vectors, serving
from test_commands import ragline
from test_deployment import running

TEXT = "The blue whale is the largest animal."


@pytest.mark.parametrize(
    ("slow", "waiting", "begun"),
    [
        pytest.param(Answer(delay_seconds=60), 0, 1, id="is at it"),
        pytest.param(Answer(status=429, headers={"Retry-After": "600"}), 1, 0, id="put off"),
    ],
)
def test_step_under_way_is_counted(tmp_path: Path, slow: Answer, waiting: int, begun: int) -> None:
    """Begun where a worker is at it, waiting where the endpoint wants it later: it is never counted as nothing."""

    def script(question: Question) -> Answer:
        return slow if TEXT in question.body["input"] else letter_vectors(question)

    whale = tmp_path / "whale.md"
    whale.write_text(TEXT)
    with serving(script) as server:
        environment = {
            "RAGLINE_EMBEDDER": "openai",
            "RAGLINE_EMBEDDINGS_URL": server.url,
            "RAGLINE_EMBEDDINGS_MODEL": "letters",
        }
        home = tmp_path / "home"
        with running("serve", "--worker", "--port", "0", RAGLINE_HOME=str(home), **environment) as served:
            assert served.stdout is not None
            url = next(found[0] for line in served.stdout if (found := re.search(r"http://\S+", line)))
            ragline(home, "ingest", "--no-wait", "--no-worker", str(whale), **environment)
            eventually(lambda: any(TEXT in asked.body["input"] for asked in server.questions), seconds=60)

            def counts() -> object:
                return httpx.get(f"{url}api/status", timeout=30).json()["messages"]

            eventually(lambda: counts() == {"waiting": waiting, "owed": begun, "dead": 0})
            told = ragline(home, "status", **environment).stdout
            server.closing.set()

    assert f"Steps: {waiting} wait, {begun} begun or about to be, 0 given up" in told
