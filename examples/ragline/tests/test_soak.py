"""The soak, for a few seconds: workers are killed at random, and at the end everything adds up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.services.databases import Databases

SECONDS = float(os.environ.get("RAGLINE_TEST_SECONDS", "5"))


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
def test_a_soak_with_killed_workers_ends_with_every_document_accounted_for(tmp_path: Path, name: str) -> None:
    """Ready as written last, or failed for its own reason; no message is left, nothing is there twice."""
    databases = Databases()
    place = [] if name == "sqlite" else ["--database", databases.open(name, tmp_path).url]
    try:
        soak = subprocess.run(
            [
                sys.executable,
                str(Path(__file__).with_name("soak.py")),
                "--minutes",
                str(SECONDS / 60),
                *place,
            ],
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
    finally:
        databases.close()

    assert "Everything adds up." in soak.stdout, soak.stdout + soak.stderr[-5000:]
    assert soak.returncode == 0
