"""Which embedder a document is processed with, and the object that does it in this process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ragline.endpoints import Endpoint
from ragline.errors import EndpointError, ModelUnavailableError
from ragline.minilm.files import NAME as MINILM
from ragline.minilm.files import fetch, is_fetched, model_folder
from ragline.states import NO_EMBEDDER
from ragline.tokens import EstimatedTokens, TokenCounter

if TYPE_CHECKING:  # imported late: most commands name an embedder at most
    import numpy as np
    import numpy.typing as npt


class Embedder(Protocol):
    """Texts to vectors of length one."""

    @property
    def name(self) -> str:
        """Names model and weights: vectors of two names are never compared."""
        ...

    @property
    def dimensions(self) -> int:
        """The length of its vectors."""
        ...

    @property
    def near(self) -> float:
        """A text whose vector is less similar to a query's, as a cosine, is about something else."""
        ...

    @property
    def counter(self) -> TokenCounter:
        """How it counts tokens."""
        ...

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of shape (len(texts), dimensions)."""
        ...


def available_embedder(wanted: str, cache: Path, endpoint: Endpoint | None = None) -> tuple[str, str | None]:
    """The name of the embedder to use, fetching its model if it is not there.

    Args:
        wanted: "auto", "minilm", "openai" or "none", from the settings.
        cache: where models are kept.
        endpoint: the OpenAI-compatible endpoint of the settings; with "auto" it is preferred.

    Returns:
        The embedder's name, and why it is not the wanted one, or None.

    Raises:
        ModelUnavailableError: the wanted one was asked for by name, or by its endpoint, and cannot be had.
    """
    if wanted == NO_EMBEDDER:
        return NO_EMBEDDER, None
    if endpoint is not None and wanted != "minilm":
        from ragline.remote import find_dimensions, remote_name

        try:
            return remote_name(endpoint, find_dimensions(endpoint)), None
        except EndpointError as error:
            raise ModelUnavailableError(
                f"The embedding endpoint gives no vectors: {error}"
                " With RAGLINE_EMBEDDINGS_DIMENSIONS set it is only asked when there is something to embed."
            ) from error
    try:
        fetch(cache)
    except ModelUnavailableError as error:
        if wanted != "auto":
            raise
        return NO_EMBEDDER, str(error)
    return MINILM, None


@functools.cache
def load_embedder(name: str, cache: Path, endpoint: Endpoint | None = None) -> Embedder | None:
    """The embedder of that name, loaded once a process; None for `NO_EMBEDDER`.

    Raises:
        ModelUnavailableError: this machine does not have it. Another must not stand in for it: vectors of two
            models in one index are worse than none.
    """
    if name == NO_EMBEDDER:
        return None
    if endpoint is not None:
        from ragline.remote import RemoteEmbedder, named_dimensions

        dimensions = named_dimensions(name, endpoint)
        if dimensions is not None:
            return RemoteEmbedder(endpoint, dimensions)
    if name != MINILM:
        raise ModelUnavailableError(
            f"The documents want the embedder {name!r}, which the settings of this machine do not give."
        )
    if not is_fetched(cache):
        raise ModelUnavailableError(
            f"The model is not in {cache}: run `ragline model fetch` on this machine."
        )
    from ragline.minilm.embedder import MiniLM

    return MiniLM(model_folder(cache))


def token_counter(name: str, cache: Path, endpoint: Endpoint | None = None) -> TokenCounter:
    """How that embedder counts tokens."""
    embedder = load_embedder(name, cache, endpoint)
    return EstimatedTokens() if embedder is None else embedder.counter
