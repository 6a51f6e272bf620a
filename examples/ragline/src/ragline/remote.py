"""Texts to vectors by an OpenAI-compatible `/embeddings`, each answer checked before a vector is kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ragline.endpoints import Endpoint, ask, open_client
from ragline.errors import EndpointError
from ragline.tokens import EstimatedTokens

if TYPE_CHECKING:
    import httpx

Vector = npt.NDArray[np.float32]

TEXTS_AT_ONCE = 64
"""Texts of one request: a quarter of the tokens that OpenAI allows in one, at 254 tokens each."""


class RemoteEmbedder:
    """An endpoint's embeddings, made to length one.

    One object serves one process.
    """

    counter = EstimatedTokens()
    # Each model has another measure: of some of them, texts that share nothing have a cosine of 0.7.
    near = -1.0

    def __init__(self, endpoint: Endpoint, dimensions: int) -> None:
        """Name the endpoint and the dimensions that every vector must have."""
        self.name = remote_name(endpoint, dimensions)
        self.dimensions = dimensions
        self._endpoint = endpoint

    @cached_property
    def _client(self) -> httpx.Client:
        return open_client(self._endpoint)

    def embed(self, texts: Sequence[str]) -> Vector:
        """Unit vectors of shape (len(texts), dimensions), in the order of the texts.

        Raises:
            EndpointBusyError: the same call may succeed later.
            EndpointError: the endpoint refuses, or its answer is not one vector of the right length a text.
        """
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[start : start + TEXTS_AT_ONCE]
            for at, vector in enumerate(_embed(self._client, self._endpoint, some), start=start):
                if len(vector) != self.dimensions:
                    raise EndpointError(
                        f"{self._endpoint.host} gives vectors of {len(vector)} dimensions for"
                        f" {self._endpoint.model!r}, but this index holds {self.dimensions}."
                    )
                vectors[at] = vector
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.all(np.isfinite(lengths)) or not np.all(lengths > 0):
            raise EndpointError(f"{self._endpoint.host} gives vectors without a length.")
        unit: Vector = vectors / lengths
        return unit


def remote_name(endpoint: Endpoint, dimensions: int) -> str:
    """The name of an endpoint's embedder: server, model and dimensions, in at most 64 characters."""
    return f"{endpoint.identity}:{dimensions}"


def named_dimensions(name: str, endpoint: Endpoint) -> int | None:
    """The dimensions of an embedder's name, if it is one of this endpoint."""
    identity, _, dimensions = name.rpartition(":")
    return int(dimensions) if identity == endpoint.identity and dimensions.isdecimal() else None


def find_dimensions(endpoint: Endpoint) -> int:
    """How long the endpoint's vectors are: what the settings ask for, or what it gives for one word.

    Raises:
        EndpointError: it cannot be asked, or gives no vector.
    """
    if endpoint.dimensions is not None:
        return endpoint.dimensions
    with open_client(endpoint) as client:
        return len(_embed(client, endpoint, ["dimensions"])[0])


def _embed(client: httpx.Client, endpoint: Endpoint, texts: Sequence[str]) -> list[Vector]:
    question: dict[str, Any] = {"input": list(texts), "encoding_format": "float"}
    if endpoint.dimensions is not None:
        question["dimensions"] = endpoint.dimensions
    answer = ask(client, endpoint, "embeddings", question)
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list) or len(entries) != len(texts):
        number = len(entries) if isinstance(entries, list) else "no"
        raise EndpointError(f"{endpoint.host} gives {number} vectors for {len(texts)} texts.")
    # The order is told by `index`; servers that leave it out keep the order of the texts.
    placed = dict(_placed(endpoint, at, entry) for at, entry in enumerate(entries))
    if placed.keys() != set(range(len(texts))):
        raise EndpointError(f"{endpoint.host} does not say which vector belongs to which text.")
    return [placed[at] for at in range(len(texts))]


def _placed(endpoint: Endpoint, at: int, entry: Any) -> tuple[int, Vector]:
    if isinstance(entry, dict) and isinstance(entry.get("index", at), int):
        try:
            vector = np.asarray(entry.get("embedding"))
        except ValueError:  # lists of different lengths in one
            vector = np.empty(0)
        # No conversion: what is not all numbers becomes strings, objects or another shape, and is refused.
        if vector.dtype.kind in "fi" and vector.ndim == 1 and len(vector):
            return entry.get("index", at), vector.astype(np.float32)
    raise EndpointError(f"{endpoint.host} gives something that is not a vector of numbers.")
