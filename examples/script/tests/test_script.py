"""The script with a real worker."""

from __future__ import annotations

from typing import Any

import pytest

from celery_alchemy import Alchemy
from script import count_words, tasks


@pytest.fixture
def alchemy() -> Alchemy:
    """What the fixtures of celery-alchemy work on."""
    return tasks.alchemy


def test_words_are_counted_though_a_worker_dies(worker_process: Any, crash_at: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The first task kills its process right before the commit, and is delivered again."""
    worker_process("script.tasks")

    with crash_at("COMMIT, before", task=tasks.count):
        assert count_words.main() == 23

    assert " 23 words" in capsys.readouterr().out
