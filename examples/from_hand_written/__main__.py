"""Shows the bugs, and that they are gone: ``python -m from_hand_written`` runs the tests with their names."""

import sys
from pathlib import Path

import pytest

sys.exit(pytest.main(["-v", "--no-header", str(Path(__file__).parent)]))
