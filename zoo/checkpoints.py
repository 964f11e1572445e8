"""Checkpoints: any user's weights as a dense network, and a pruned model as a folder and back.

Nothing is unpickled: `.pt` files are read with `weights_only=True`, everything else is safetensors
or JSON. Everything is written beside its place first and moved there whole.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo import hub
from zoo.documents import SCHEMA_VERSION, decode, encode, read_json, write_json, write_text
from zoo.errors import CheckpointError, DocumentError, ZooError
from zoo.models import ARCHITECTURES, Architecture, architecture, build_model
from zoo.pruning.plan import PruningRecord, Source
from zoo.pruning.surgery import kept_positions, named_tensors, resized
from zoo.registry import stored_groups

__all__ = [
    "Checkpoint",
    "load_dense",
    "read_checkpoint",
    "read_model",
    "save_checkpoint",
    "write_model",
]

WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "net")
PREFIXES = ("module.", "_orig_mod.")
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

MODEL, RECORD, README = "model.safetensors", "pruning.json", "README.md"


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


# --- reading --------------------------------------------------------------------------------------


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
    try:
        return path.read_bytes()
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


def _parse_safetensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception as error:  # a damaged file can fail anywhere in the parser
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: {error}. Copy or download it again."
        ) from None
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


# --- dense networks -------------------------------------------------------------------------------


def load_dense(
    arch: str, weights: str | Path | Mapping[str, Any] | nn.Module, *, image_size: int | None = None
) -> tuple[nn.Module, Checkpoint, int, int]:
    """(module, checkpoint, num_classes, image_size): the dense network that `weights` belong to.

    The module is in eval mode, on the CPU, shares nothing with `weights`, and has the data types of
    a fresh network: half-precision weights become float32.

    Args:
        arch: an architecture's name.
        weights: as for `read_checkpoint`.
        image_size: in pixels. Taken from the classifier where that depends on it; otherwise this,
            or the checkpoint's own metadata, or the architecture's reference.

    Raises:
        CheckpointError: as `read_checkpoint`, or if the tensors do not fit `arch`: how many and
            which are missing, unexpected or misshapen, and the architecture that they do fit.
    """
    known = architecture(arch)
    checkpoint = read_checkpoint(weights)
    stated = checkpoint.metadata.get("image_size")
    if stated is not None and not stated.isdecimal():
        raise CheckpointError(f"The checkpoint's metadata give the image size as {stated!r}.")
    try:
        preferred = image_size or (int(stated) if stated else None)
        module, classes, size = _fitting(known, checkpoint.shapes, preferred)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.source.reference} does not fit {arch!r}. {error}"
            f"{_suggestion(arch, checkpoint.shapes)}"
        ) from None
    if image_size and image_size != size:
        raise CheckpointError(
            f"The classifier in {checkpoint.source.reference} is for images of {size} pixels, "
            f"not {image_size}."
        )
    module.load_state_dict(checkpoint.state, strict=False)
    return module.eval(), checkpoint, classes, size


def _fitting(
    known: Architecture, shapes: Mapping[str, tuple[int, ...]], image_size: int | None
) -> tuple[nn.Module, int, int]:
    """A network (uninitialised), its classes and image size, for tensors of these `shapes`."""
    problems = []
    with _Uninitialised():
        try:
            classes, size = known.infer(shapes)
        except CheckpointError as error:
            problems.append(str(error))
            classes, size = known.num_classes, known.image_size
        if image_size and known.flatten_stride is None:
            size = image_size
        module = build_model(known.name, classes, image_size=size)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = {
        "missing": [
            name
            for name in expected
            if name not in shapes and not name.endswith("num_batches_tracked")
        ],
        "unexpected": [name for name in shapes if name not in expected],
        "misshapen": [
            f"{name} (expected {expected[name]}, got {shapes[name]})"
            for name in expected
            if shapes.get(name, expected[name]) != expected[name]
        ],
    }
    for kind, names in wrong.items():
        if names:
            more = ", ..." if len(names) > 3 else ""
            problems.append(f"{len(names)} {kind}: {', '.join(names[:3])}{more}.")
    if problems:
        raise CheckpointError(" ".join(problems))
    return module, classes, size


def _suggestion(arch: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    for name, other in ARCHITECTURES.items():
        if name != arch:
            try:
                _fitting(other, shapes, None)
            except ZooError:
                continue
            return f" The checkpoint fits {name!r}."
    return ""


class _Uninitialised(TorchFunctionMode):
    """Networks built inside skip their random initial values, which are about to be replaced.

    Unlike on the meta device, buffers that no checkpoint holds are as their module computes them.
    """

    RANDOM = (
        *("uniform_", "normal_", "trunc_normal_", "orthogonal_", "xavier_uniform_"),
        *("xavier_normal_", "kaiming_uniform_", "kaiming_normal_"),
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in self.RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# --- writing --------------------------------------------------------------------------------------


def save_checkpoint(model: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the state dict of a dense network as safetensors, with `metadata`, atomically.

    Raises:
        ZooError: if the file cannot be written; an old one is left as it was.
    """
    path = Path(path)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            _save_tensors(state, Path(scratch, path.name), metadata)
            os.replace(Path(scratch, path.name), path)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    separate = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    safetensors.torch.save_file(separate, path, dict(metadata))
    path.chmod(0o644)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ZooError(f"Cannot write {target}: {error}. What was there is unchanged.") from error


def write_model(model: nn.Module, folder: str | Path) -> None:
    """Write a pruned model as a folder: model.safetensors, pruning.json and README.md.

    An older model in the folder is replaced whole; other files there are kept.

    Raises:
        CheckpointError: if `model` is not pruned, or `folder` holds something else.
        ZooError: if the folder cannot be written; the old one is left as it was.
    """
    record = getattr(model, "pruning", None)
    if not isinstance(record, PruningRecord):
        raise CheckpointError(
            f"This {type(model).__name__} is not pruned, so there is no record to reload it by: "
            "prune it with zoo.load or zoo.prune, or write its weights with save_checkpoint."
        )
    folder = Path(folder)
    place = folder.resolve()
    with _writing(folder):
        _refuse_foreign(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as scratch:
            new = Path(scratch, place.name)
            if place.exists():
                shutil.copytree(
                    place,
                    new,
                    symlinks=True,
                    ignore=lambda at, _: (MODEL, RECORD, README) if Path(at) == place else (),
                )
            else:
                new.mkdir()
            _save_tensors(named_tensors(model), new / MODEL, {"memory_format": _layout(model)})
            write_json(new / RECORD, {"schema_version": SCHEMA_VERSION, **encode(record)})
            write_text(new / README, _readme(record))
            _swap(new, place, aside=place.with_name(f"{Path(scratch).name}.old"))


def _refuse_foreign(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place} is a file; a pruned model needs a folder.")
    if place.exists() and any(place.iterdir()) and not (place / RECORD).exists():
        raise CheckpointError(
            f"{place} is not empty and holds no pruned model; name another folder, or empty it."
        )


def _swap(new: Path, place: Path, aside: Path) -> None:
    """Put the folder `new` in the place of the one there, which comes back if that fails."""
    try:
        if place.exists():
            place.rename(aside)
        new.rename(place)
    except BaseException:
        if aside.exists() and not place.exists():
            aside.rename(place)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _layout(model: nn.Module) -> str:
    """The memory format of the convolutions, on which the last bits of their outputs depend."""
    weights = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
    last = bool(weights) and all(
        w.is_contiguous(memory_format=torch.channels_last) for w in weights
    )
    return "channels_last" if last else "contiguous_format"


def _readme(record: PruningRecord) -> str:
    plan, size, name = record.plan, record.image_size, record.architecture
    params, macs = (
        f"| {getattr(plan.dense, m):,} | {getattr(plan.pruned, m):,} "
        f"| {getattr(plan.dense, m) / getattr(plan.pruned, m):.2f}x |"
        for m in ("params", "macs")
    )
    digest = f" (sha256 {record.source.sha256})" if record.source.sha256 else ""
    argument = "" if name else ", skeleton=dense_network"
    return f"""# {name or "A network"}, channel-pruned

| | dense | pruned | compression factor |
|---|---|---|---|
| parameters {params}
| MACs at 3x{size}x{size} {macs}

- Asked for {plan.asked:g}x {plan.metric} with the profile `{plan.profile}`: got {plan.got:.3f}x.
- Channels chosen by `{plan.criterion}`, seed {plan.seed}; weights: {record.init}.
- Classes: {record.num_classes}.
- Pruned from: {record.source.reference}{digest}.

```python
import zoo

model = zoo.load_pruned("path/to/this/folder"{argument})
```
"""


# --- reading back ---------------------------------------------------------------------------------


def read_model(folder: str | Path, *, skeleton: nn.Module | None = None) -> nn.Module:
    """The pruned model in `folder`, in eval mode on the CPU: no tracing, no pickle, no network.

    Args:
        folder: as `write_model` left it.
        skeleton: the dense network, for a model of no registered architecture; not edited.

    Raises:
        CheckpointError: if a file is missing or damaged, or the two do not belong together.
        DocumentError: if pruning.json has an unknown key or another schema version.
    """
    folder = Path(folder)
    for name in (RECORD, MODEL):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no pruned model: {name} is missing.")
    record = _read_record(folder / RECORD)
    tensors, metadata = _parse_safetensors(_read_bytes(folder / MODEL), folder / MODEL)
    if record.architecture:
        with _Uninitialised():
            skeleton = build_model(
                record.architecture, record.num_classes, image_size=record.image_size
            )
    elif skeleton is None:
        raise CheckpointError(
            f"{folder} holds a network of no registered architecture: give the dense network that "
            "it was pruned from as skeleton=."
        )
    _check(tensors, skeleton, record, folder)
    model = resized(skeleton, tensors)
    if metadata.get("memory_format") == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.pruning = record  # type: ignore[assignment]
    return model.eval()


def _read_record(path: Path) -> PruningRecord:
    raw = read_json(path)
    version = raw.pop("schema_version", None) if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise DocumentError(
            f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}."
        )
    return decode(PruningRecord, raw, str(path))


def _check(
    tensors: Mapping[str, Tensor], skeleton: nn.Module, record: PruningRecord, folder: Path
) -> None:
    """Refuse tensors that are not those of `skeleton` at the widths of the record's plan."""
    where = f"{folder}: {MODEL} does not belong to {RECORD}:"
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(skeleton).items()}
    odd = sorted(set(shapes) ^ set(tensors))
    if odd:
        kind = "missing" if odd[0] in shapes else "unexpected"
        raise CheckpointError(f"{where} {len(odd)} tensors differ; {odd[0]} is {kind}.")
    groups = stored_groups(record.architecture) if record.architecture else None
    if groups is not None:
        if set(groups.names) != set(record.plan.kept):
            raise CheckpointError(f"{where} its channel groups are not {record.architecture}'s.")
        for name, dims in kept_positions(groups.adapted(shapes), record.plan).items():
            lengths = {dim: len(positions) for dim, positions in dims.items()}
            shapes[name] = tuple(lengths.get(dim, n) for dim, n in enumerate(shapes[name]))
        for name, shape in shapes.items():
            got = tuple(tensors[name].shape)
            if got != shape:
                raise CheckpointError(f"{where} {name} has shape {got}, the plan makes it {shape}.")
    dense = dict(skeleton.named_parameters())
    for kind, found, cost in (
        ("dense", dense, record.plan.dense),
        ("pruned", {name: tensors[name] for name in dense}, record.plan.pruned),
    ):
        count = sum(tensor.numel() for tensor in found.values())
        if count != cost.params:
            raise CheckpointError(
                f"{where} {count:,} {kind} parameters, the plan has {cost.params:,}."
            )
