"""Checkpoints: any user's weights, from a file, the Hub or memory, as tensors by name.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from zoo import hub
from zoo.errors import CheckpointError
from zoo.pruning.plan import Source

__all__ = ["RECORD", "Checkpoint", "read_checkpoint", "read_safetensors"]

WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
PREFERRED = ("model.safetensors", "pytorch_model.bin")
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
"""What training scripts keep beside the weights; an empty object takes each one's place."""

RECORD = "pruning.json"
"""The file by which a folder is known as a pruned model's."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a dense network, by name, on the CPU, with where they came from.

    Attributes:
        state: as stored; those of a state dict or module share memory with the caller's.
        source: the reference, and the sha256 of the file.
        metadata: of a safetensors file; else empty.
    """

    state: dict[str, Tensor]
    source: Source
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}


def read_checkpoint(weights: str | Path | Mapping[str, Any] | nn.Module) -> Checkpoint:
    """The tensors in `weights`, without wrappers (`state_dict`, `model`, ...) and name prefixes.

    Args:
        weights: a path to a PyTorch (.pt, .pth, .bin, .ckpt) or .safetensors file,
            `hf:org/repo[/path/to/file][@revision]`, a state dict, or a module.

    Raises:
        CheckpointError: if a file is missing, damaged, or a pickle that would have to run code; if
            there are no tensors; if a tensor holds NaN or infinity.
        ZooError: if the Hub does not give the file.
    """
    if isinstance(weights, nn.Module):
        return Checkpoint(_tensors(weights, "The module"), Source("module"), {})
    if isinstance(weights, Mapping):
        return Checkpoint(_tensors(weights, "The state dict"), Source("state dict"), {})
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
    source = Source(reference, hashlib.sha256(data).hexdigest())
    return Checkpoint(_tensors(content, str(weights)), source, metadata)


def _locate(weights: str | Path) -> tuple[Path, str]:
    """The local file, and the reference that names it again."""
    if not str(weights).startswith("hf:"):
        return Path(weights).expanduser(), str(weights)
    repo, name, revision = hub.parse_hub_reference(str(weights).removeprefix("hf:"))
    name = name or _choose(hub.list_files(repo, revision), repo)
    at = f"@{revision}" if revision else ""
    return hub.download(repo, name, revision), f"hf:{repo}/{name}{at}"


def _choose(files: list[str], repo: str) -> str:
    """The one weights file of a repository."""
    for name in PREFERRED:
        if name in files:
            return name
    found = [name for name in files if name.endswith(SUFFIXES)]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(found) or "none"
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
    """The tensors of a safetensors file by name, just as they are stored, and its metadata.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    with _reading(path), _parsing(path), safetensors.safe_open(path, framework="pt") as file:
        # copied, because what is read is the file itself, mapped into memory
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def _parse_safetensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _parsing(path):
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})


class _Inert:
    """Takes the place of an object that is no tensor, and holds nothing of it."""

    def __new__(cls, *_: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _parse_pickle(data: bytes, path: Path) -> Any:
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
    raise CheckpointError(
        f"{path} is truncated or not a PyTorch checkpoint. Copy or download it again."
    )


def _tensors(content: Any, what: str) -> dict[str, Tensor]:
    """The innermost state dict of `content`, without name prefixes, checked to be finite."""
    content = _unwrap(content)
    found = content if isinstance(content, Mapping) else {}
    state = {str(k): v.detach().cpu() for k, v in found.items() if isinstance(v, Tensor)}
    state.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel's counter
    if not state:
        keys = ", ".join(map(str, list(found)[:5])) or type(content).__name__
        raise CheckpointError(
            f"{what} holds no tensors where weights are looked for (the top level, or one of "
            f"{', '.join(WRAPPERS)}); it has: {keys}."
        )
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{what}: {name} is not an ordinary dense tensor.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{what} holds NaN or infinity: {count} of {tensor.numel()} values of {name}. "
                "Its training diverged; use an earlier checkpoint."
            )
    return state


def _unwrap(content: Any) -> Any:
    for _ in WRAPPERS:  # bounded, because a file can make a dictionary that contains itself
        if isinstance(content, nn.Module):
            content = content.state_dict()
        if isinstance(content, Mapping):
            inner = (content.get(key) for key in WRAPPERS)
            content = next((i for i in inner if isinstance(i, (Mapping, nn.Module))), content)
    return content
