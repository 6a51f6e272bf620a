"""An embedder for tests that needs no model; workers of tests import it too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ragline.tokens import EstimatedTokens


class LetterEmbedder:
    """An embedder for tests: how often each letter of the alphabet occurs, at length one."""

    name = "letters"
    dimensions = 26
    near = -1.0
    counter = EstimatedTokens()

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors of shape (texts, 26)."""
        counts = np.array(
            [[text.lower().count(chr(97 + at)) + 1e-3 for at in range(26)] for text in texts], "f4"
        )
        unit: npt.NDArray[np.float32] = counts / np.linalg.norm(counts, axis=1, keepdims=True)
        return unit
