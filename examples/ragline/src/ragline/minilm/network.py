"""MiniLM's forward pass in numpy, for machines without onnxruntime: the same vectors at half the speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ragline.minilm.files import read_weights
from ragline.minilm.graph import EPSILON, HEAD_SIZE, HEADS, HIDDEN, LAYERS

if TYPE_CHECKING:
    from ragline.minilm.files import Weights

Array = npt.NDArray[np.float32]


class NumpyNetwork:
    """Runs the network on whole batches of texts of one length; holds the weights (91 MB)."""

    def __init__(self, folder: Path) -> None:
        self._weights = _fused(read_weights(folder))

    def run(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Array:
        """Embed a batch.

        Args:
            ids: token ids, shape (texts, tokens).
            mask: 1 for a token, 0 for padding, the same shape.

        Returns:
            Unit vectors, shape (texts, 384), float32.
        """
        w = self._weights
        present = mask.astype(np.float32)
        positions = w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        hidden = w["embeddings.word_embeddings.weight"][ids] + positions
        hidden += w["embeddings.token_type_embeddings.weight"][0]
        hidden = self._normalise(hidden, "embeddings.LayerNorm")
        bias = (1 - present[:, None, None, :]) * np.float32(-10_000)
        for layer in range(LAYERS):
            hidden = self._layer(hidden, bias, f"encoder.layer.{layer}.")
        pooled = np.einsum("bth,bt->bh", hidden, present) / present.sum(axis=1, keepdims=True)
        unit: Array = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return unit

    def _linear(self, value: Array, name: str) -> Array:
        flat = value.reshape(-1, value.shape[-1]) @ self._weights[name + ".weight"].T
        flat += self._weights[name + ".bias"]
        return flat.reshape(*value.shape[:-1], -1)

    def _normalise(self, value: Array, name: str) -> Array:
        value = value - value.mean(axis=-1, keepdims=True)
        variance = np.einsum("...h,...h->...", value, value) / np.float32(HIDDEN)
        value *= (1 / np.sqrt(variance + np.float32(EPSILON)))[..., None]
        value *= self._weights[name + ".weight"]
        value += self._weights[name + ".bias"]
        return value

    def _layer(self, hidden: Array, bias: Array, name: str) -> Array:
        texts, tokens, _ = hidden.shape
        fused = self._linear(hidden, name + "attention.self.fused").reshape(
            texts, tokens, 3, HEADS, HEAD_SIZE
        )
        query, key, value = (fused[:, :, part].transpose(0, 2, 1, 3) for part in range(3))
        scores = query @ key.transpose(0, 1, 3, 2) / np.float32(HEAD_SIZE**0.5) + bias
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = (scores @ value).transpose(0, 2, 1, 3).reshape(texts, tokens, HIDDEN)
        attended = self._linear(mixed, name + "attention.output.dense")
        hidden = self._normalise(attended + hidden, name + "attention.output.LayerNorm")
        inner = _gelu(self._linear(hidden, name + "intermediate.dense"))
        return self._normalise(self._linear(inner, name + "output.dense") + hidden, name + "output.LayerNorm")


def _fused(weights: Weights) -> Weights:
    """Query, key and value of a layer as one matrix: one multiplication in place of three."""
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}.attention.self."
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{name}{part}.{kind}") for part in ("query", "key", "value")]
            weights[f"{name}fused.{kind}"] = np.concatenate(parts)
    return weights


def _gelu(value: Array) -> Array:
    """x * Phi(x), with the error function to 1.5e-7 (Source: Abramowitz and Stegun, formula 7.1.26)."""
    scaled = np.abs(value) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * scaled)
    series = t * np.float32(1.061405429) - np.float32(1.453152027)
    for factor in (1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(factor)
    error = 1 - series * t * np.exp(-scaled * scaled)
    result: Array = np.float32(0.5) * value * (1 + np.copysign(error, value))
    return result
