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
import warnings
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

__all__ = [
    "HISTORY",
    "RECORD",
    "SAVEPOINT",
    "Checkpoint",
    "check_values",
    "read_checkpoint",
    "read_safetensors",
]

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
DEPTH = 5
"""Nested wrappers are opened this deep at most: a file can make a dictionary contain itself."""

AVERAGES = ("state_dict_ema", "model_ema", "ema")
"""Keys of averaged weights that stand beside those of `WRAPPERS`: in files of timm, torchvision's
training scripts and Ultralytics, all of which evaluate the average."""

CURRENT = "current_model_state"
"""Key of the weights that are no average in files of Lightning's WeightAveraging, whose average is
under `state_dict`."""

PREFIXES = ("module.", "_orig_mod.", "model.")
SLACK = 64 << 20
"""Bytes that a file may claim beyond four times its own."""

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
        state, _ = _tensors(weights, "The module", True)
        return Checkpoint(state, Source("module"), {})
    if isinstance(weights, Mapping):
        state, averaged = _tensors(weights, "The state dict", ema)
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
    state, averaged = _tensors(content, str(weights), ema)
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


def _tensors(content: Any, what: str, ema: bool) -> tuple[dict[str, Tensor], bool | None]:
    """The innermost state dict of `content` without name prefixes, and whether it is an average.

    The second is None unless current and averaged weights stand side by side.
    """
    content, averaged = _unwrap(content, what, ema)
    state = {
        name: tensor.detach() if tensor.is_meta else tensor.detach().cpu()
        for name, tensor in _named(content).items()
    }
    if not state:
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else ""
        raise CheckpointError(
            f"{what} holds no tensors where weights are looked for (the top level, or one of "
            f"{', '.join((*WRAPPERS, *AVERAGES))}); it has: {keys or type(content).__name__}."
        )
    return state, averaged


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


def _named(content: Any) -> dict[str, Tensor]:
    """The tensors at the top level of `content`, without the prefixes that all names share."""
    found = content if isinstance(content, Mapping) else {}
    state = {str(name): item for name, item in found.items() if isinstance(item, Tensor)}
    state.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel's counter
    while prefix := next(
        (p for p in PREFIXES if state and all(k.startswith(p) for k in state)), None
    ):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _unwrap(content: Any, what: str, ema: bool) -> tuple[Any, bool | None]:
    """`content` without its wrappers, and whether averaged weights were taken (see `_tensors`)."""
    averaged = None
    for _ in range(DEPTH):
        content, average, current = _opened(content)
        if average and current:
            taken = _chosen(content, average, current, what, ema)
            averaged = taken == average
            content = content[taken]
        elif average and not ema:
            raise CheckpointError(
                f"{what} holds averaged weights alone, in {average!r}; ema=True takes them."
            )
        elif average or current:
            content = content[average or current]
    return _opened(content)[0], averaged


def _opened(content: Any) -> tuple[Any, str | None, str | None]:
    """`content` (of a module, its state dict), and its keys of averaged and current weights."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        return content, None, None
    keys = [k for k, v in content.items() if isinstance(v, (Mapping, nn.Module))]
    average = next((key for key in AVERAGES if key in keys), None)
    current = next((key for key in WRAPPERS if key in keys), None)
    if average is None and current == "state_dict" and CURRENT in keys:
        return content, current, CURRENT
    return content, average, current


def _chosen(content: Mapping[str, Any], average: str, current: str, what: str, ema: bool) -> str:
    """The key of the weights to take; a warning says which unless `ema=False` decided it."""
    if not ema:
        return current
    own, averaged = (_named(_innermost(content[key])) for key in (current, average))
    lacking = [n for n in own if n not in averaged and not n.endswith("num_batches_tracked")]
    if lacking:
        warnings.warn(
            f"{what}: the weights in {current!r} were taken, because the averaged ones in "
            f"{average!r} lack {len(lacking)} tensors: {', '.join(lacking[:3])}.",
            stacklevel=3,
        )
        return current
    warnings.warn(
        f"{what}: the averaged weights in {average!r} were taken, and those in {current!r} left "
        "out; ema=False takes these.",
        stacklevel=3,
    )
    return average


def _innermost(content: Any) -> Any:
    """`content` without its wrappers; current weights are preferred to averaged ones."""
    for _ in range(DEPTH):
        content, average, current = _opened(content)
        content = content[current or average] if current or average else content
    return _opened(content)[0]
