"""ragline's app in which every step of every document kills its worker process twice: at its begin and at its end.

The names of the steps that struck are files in the folder that `RAGLINE_TEST_STRUCK` names.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from letters import LetterEmbedder
from ragline import pipeline, tasks
from ragline.app import app
from ragline.tokens import EstimatedTokens

__all__ = ["app"]

STRUCK = Path(os.environ["RAGLINE_TEST_STRUCK"])


def strike(name: str) -> None:
    """Kill this process, the first time that it is asked by this name."""
    try:
        (STRUCK / name).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that dies before it reads anything, and again when it has written all, before the commit."""

    @functools.wraps(step)
    def run(session: Any, document_id: int, *args: Any, **options: Any) -> Any:
        strike(f"{step.__name__} {document_id} begins")
        result = step(session, document_id, *args, **options)
        session.flush()
        strike(f"{step.__name__} {document_id} ends")
        return result

    return run


for name in ("parse", "split", "embed"):
    setattr(pipeline, name, deadly(getattr(pipeline, name)))
tasks.load_embedder = lambda *_, **__: LetterEmbedder()  # type: ignore[assignment]
tasks.token_counter = lambda *_, **__: EstimatedTokens()
