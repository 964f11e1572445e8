"""Read any user's weights, from a file, the Hub or memory, as tensors by name.

Nothing is unpickled: `.pt` files are read with `weights_only=True`, the others are safetensors.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError
from zoo.registry import hub
from zoo.registry.weights import weights_path
from zoo.spec.plans import Source
from zoo.storage.wrappers import tensors_in

__all__ = [
    "HISTORY",
    "RECORD",
    "SAVEPOINT",
    "Checkpoint",
    "check_values",
    "read_checkpoint",
    "read_safetensors",
]

SLACK = 64 << 20
"""Bytes that a file may claim beyond four times its own."""

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
PREFERRED = ("model.safetensors", "pytorch_model.bin")
OTHERS = (".gguf", ".h5", ".json", ".keras", ".msgpack", ".npy", ".npz", ".onnx", ".pb", ".tflite")
"""Suffixes of files that other programs keep weights in."""

INDEX = ".index.json"
"""How the index of a checkpoint in several files is named, by Transformers and others."""
_IN_PARTS = (
    "Read it with the library that wrote it, and give the network or its state dict as weights."
)
INERT = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)
"""Types that training scripts store beside the weights; they are read as empty objects."""

RECORD = "pruning.json"
"""The file that marks a folder as a pruned model."""
SAVEPOINT, HISTORY = "training.pt", "history.jsonl"
"""The files that mark a folder as a training."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a dense network, by name, on the CPU, and where they came from.

    Attributes:
        state: tensors as stored; they share memory with those of a given state dict or module.
        source: the reference, and the sha256 of the file.
        metadata: of a safetensors file; else empty.
    """

    state: dict[str, Tensor]
    source: Source
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}


def read_checkpoint(
    weights: str | Path | Mapping[str, Any] | nn.Module, *, ema: bool = True
) -> Checkpoint:
    """The tensors in `weights`, without wrappers (`state_dict`, `model`, ...) and name prefixes.

    If `weights` holds current weights and their average, the average is taken, or the current
    weights if it is incomplete. A warning names both.

    Args:
        weights: a path to a PyTorch (.pt, .pth, .bin, .ckpt) or .safetensors file,
            `bundled:<architecture>/<name>`, `hf:org/repo[/path/to/file][@revision]`, a state dict,
            or a module.
        ema: take the average, as the library that wrote it does; False takes the current weights,
            without a warning.

    Raises:
        CheckpointError: if a file is missing, damaged, or a pickle that would have to run code; if
            there are no tensors, or with `ema=False` only averaged ones.
        ZooError: if the file cannot be fetched from the Hub.
    """
    if isinstance(weights, nn.Module):
        state, _ = tensors_in(weights, "The module", True)
        return Checkpoint(state, Source("module"), {})
    if isinstance(weights, Mapping):
        state, averaged = tensors_in(weights, "The state dict", ema)
        return Checkpoint(state, Source("state dict", averaged=averaged), {})
    if not isinstance(weights, (str, Path)):
        raise CheckpointError(
            f"Weights are a path, a state dict, a module or 'hf:org/repo[/file][@revision]', "
            f"not {type(weights).__name__}."
        )
    path, reference = _locate(weights)
    data = _read_bytes(path)
    if path.suffix == ".safetensors":
        content, metadata = _parse_safetensors(data, path)
    else:
        content, metadata = _parse_pickle(data, path), {}
    state, averaged = tensors_in(content, str(weights), ema)
    _check_bytes(
        sum(each.numel() * each.element_size() for each in state.values()), len(data), path
    )
    source = Source(reference, hashlib.sha256(data).hexdigest(), averaged)
    return Checkpoint(state, source, metadata)


def _locate(weights: str | Path) -> tuple[Path, str]:
    """The local file, and the full reference to it."""
    if str(weights).startswith("bundled:"):
        return weights_path(str(weights)), str(weights)
    if not str(weights).startswith("hf:"):
        path = Path(weights).expanduser().absolute()  # a teacher is found from any folder
        return path, str(path)
    reference = hub.HubReference.parse(str(weights))
    if reference.path is None:
        files, reference = hub.files_of(reference)
        reference = reference.file(_choose(files, reference.repo))
    path, pinned = hub.download(reference)
    return path, str(pinned)


def _choose(files: Sequence[str], repo: str) -> str:
    """The one weights file of a repository."""
    for name in PREFERRED:
        if name in files:
            return name
    found = [name for name in files if name.endswith(SUFFIXES)]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(found) or "none"
    if any(name.endswith(INDEX) for name in files):
        raise CheckpointError(f"{repo!r} has a checkpoint in parts: {listing}. {_IN_PARTS}")
    raise CheckpointError(
        f"{repo!r} does not have one weights file but: {listing}. Name it: hf:{repo}/<file>."
    )


def _read_bytes(path: Path) -> bytes:
    with _reading(path):
        return path.read_bytes()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        siblings = [name for name in siblings if name != path.name]  # a link to nothing
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {str(path.with_name(near[0]))!r}?" if near else ""
        raise CheckpointError(f"{path} does not exist.{hint}") from None
    except IsADirectoryError:
        pruned = (path / RECORD).exists()
        advice = "zoo.load_pruned reads pruned models" if pruned else "name the file in it"
        raise CheckpointError(f"{path} is a folder; {advice}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


@contextlib.contextmanager
def _parsing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the parser
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: {error}. Copy or download it again."
        ) from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, exactly as stored, and its metadata.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    with (
        _reading(path),
        path.open("rb"),  # whatever safe_open cannot open, it calls missing
        _parsing(path),
        safetensors.safe_open(path, framework="pt") as file,
    ):
        # copied, because the tensors are views of the file, which is mapped into memory
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def _parse_safetensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _parsing(path):
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    told = header.get("__metadata__") or {}
    return tensors, {str(name): str(value) for name, value in told.items()}


class _Inert:
    """An empty object that is read in place of one of the types in `INERT`."""

    def __new__(cls, *_: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _parse_pickle(data: bytes, path: Path) -> Any:
    _check_archive(data, path)
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in INERT]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can fail anywhere in the parser
        message = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", message)
    if code or re.search("TorchScript|unrecognized function|create new object|only build", message):
        what = f"it calls for {code[1]}" if code else "it holds more than tensors"
        raise CheckpointError(
            f"{path} is not a plain tensor checkpoint: {what}, which could run code, so it was "
            "refused and nothing in it was run. Where it is trusted, convert it to safetensors: "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
        )
    if path.name.endswith(INDEX):
        raise CheckpointError(f"{path} is the index of a checkpoint in parts. {_IN_PARTS}")
    if path.suffix.lower() in OTHERS:
        raise CheckpointError(
            f"{path} is no PyTorch checkpoint: weights are read from files that end in "
            f"{', '.join(SUFFIXES)}."
        )
    raise CheckpointError(
        f"{path} is truncated or not a PyTorch checkpoint. Copy or download it again."
    )


def _check_archive(data: bytes, path: Path) -> None:
    """Refuse an archive that unpacks to far more than it is."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            claimed = sum(part.file_size for part in archive.infolist())
    except Exception:  # no archive: of the old format, or damaged, which torch.load will tell
        return
    _check_bytes(claimed, len(data), path)


def _check_bytes(claimed: int, held: int, path: Path) -> None:
    """Refuse tensors of far more bytes than the file that they are in."""
    if claimed > SLACK + 4 * held:
        raise CheckpointError(
            f"{path} has {held:,} bytes and claims to hold {claimed:,}: it is no checkpoint."
        )


def check_values(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that no network can be used with.

    Raises:
        CheckpointError: if a tensor holds NaN or infinity, is sparse, quantized or of floats of 8
            bits, whose scale is elsewhere, or has no values (on the meta device).
    """
    for name, tensor in state.items():
        short = tensor.is_floating_point() and tensor.itemsize < 2
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or short:
            raise CheckpointError(
                f"{what}: {name} is not an ordinary dense tensor, but {tensor.dtype} "
                f"({tensor.layout}, {tensor.device})."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{what} holds NaN or infinity: {count} of {tensor.numel()} values of {name}. "
                "Its training diverged; use an earlier checkpoint."
            )
