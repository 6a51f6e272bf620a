"""Texts to MiniLM vectors: tokens, batches of similar length, the network that this machine can run."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ragline.minilm.files import NAME
from ragline.minilm.graph import HIDDEN, graph_file
from ragline.minilm.network import NumpyNetwork
from ragline.tokens import WordPieces

READ_TOKENS = 256
"""What the model was trained to read at once, [CLS] and [SEP] among them."""
NEAR = 0.3
"""Made-up words and questions about other things come to 0.1 to 0.3 with the nearest of 1400 abstracts, and
to 0.05 to 0.33 with those of the Python documentation; questions that are answered, to 0.33 to 0.9."""
TEXTS_AT_ONCE = 4
"""On one thread larger batches are slower: they pad more and leave the cache."""


class Network(Protocol):
    """The forward pass: ids and mask of shape (texts, tokens) to unit vectors of shape (texts, 384)."""

    def run(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Embed one batch."""
        ...


class OnnxNetwork:
    """The ONNX graph in onnxruntime, on one thread: worker processes are the parallelism here."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only: the absence of a GPU is none
        self._session: Any = onnxruntime.InferenceSession(
            str(graph_file(folder)), sess_options=options, providers=["CPUExecutionProvider"]
        )

    def run(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Embed one batch."""
        vectors: npt.NDArray[np.float32] = self._session.run(
            None, {"input_ids": ids, "attention_mask": mask}
        )[0]
        return vectors


def has_onnx() -> bool:
    """Whether onnxruntime, and onnx to build its graph, are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnxruntime", "onnx"))


class MiniLM:
    """all-MiniLM-L6-v2: 384 dimensions, English, 256 tokens.

    One object serves one process; make it after the fork.
    """

    name = NAME
    dimensions = HIDDEN
    near = NEAR

    def __init__(self, folder: Path, network: Network | None = None) -> None:
        """Load tokenizer and network.

        Args:
            folder: the model's files, as `files.fetch` returns it.
            network: another forward pass than the fastest that is installed.
        """
        self.counter = WordPieces(folder / "tokenizer.json")
        self._network = network or (OnnxNetwork(folder) if has_onnx() else NumpyNetwork(folder))

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors of shape (len(texts), 384); a text beyond 254 tokens is read up to there.

        The result does not depend on how texts are batched, but for rounding in the last digits.
        """
        vectors = np.empty((len(texts), HIDDEN), dtype=np.float32)
        ids = self.counter.ids(texts, max_tokens=READ_TOKENS)
        # Texts of similar length share a batch: padding is computed like text and thrown away.
        order = sorted(range(len(texts)), key=lambda number: len(ids[number]))
        for start in range(0, len(order), TEXTS_AT_ONCE):
            numbers = order[start : start + TEXTS_AT_ONCE]
            width = len(ids[numbers[-1]])
            block = np.zeros((len(numbers), width), dtype=np.int64)
            mask = np.zeros_like(block)
            for row, number in enumerate(numbers):
                block[row, : len(ids[number])] = ids[number]
                mask[row, : len(ids[number])] = 1
            vectors[numbers] = self._network.run(block, mask)
        return vectors
