"""Write a dense network as a checkpoint and a pruned model as a folder; read the folder back.

Everything is written to a temporary place beside its target, or in the folder that is there
already, and moved once it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from zoo.common.documents import (
    encode_document,
    replacing,
    write_json,
    write_text,
)
from zoo.errors import CheckpointError, ZooError, first_line
from zoo.models import architecture, build_model, parameter_count
from zoo.models.stem import transform_input, transforms_input
from zoo.spec.cost import cost_model
from zoo.spec.plans import PruningRecord, kept_positions, record_of
from zoo.storage.checkpoints import HISTORY, RECORD, SAVEPOINT, read_safetensors
from zoo.storage.dense import Uninitialised
from zoo.storage.readme import images_of, readme
from zoo.storage.wrappers import plain_name, unwrapped
from zoo.surgery.surgery import named_tensors, resize, resized
from zoo.tracing.calls import example_for
from zoo.tracing.known_groups import groups_of, matching_groups
from zoo.tracing.rewriting import rewritten

__all__ = [
    "MODEL",
    "README",
    "check_place",
    "read_model",
    "save_checkpoint",
    "skeleton_of",
    "write_model",
]

MODEL, README = "model.safetensors", "README.md"
SCRATCH = ".prunezoo-"
"""Prefix of the folder, inside one that exists, that a model is written to first."""


# --- writing --------------------------------------------------------------------------------------


def save_checkpoint(model: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the state dict of a dense network as safetensors, with `metadata`, atomically.

    Raises:
        ZooError: if the file cannot be written; an old one is left as it was.
    """
    path = Path(path)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    with _writing(path), replacing(path) as partial:
        _save_tensors(state, partial, metadata)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    separate = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    safetensors.torch.save_file(separate, path, dict(metadata))
    path.chmod(0o644)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort it, so that equal files are equal in bytes: safetensors' order is random (issue 584)."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ZooError(f"Cannot write {target}: {error}. The old content is unchanged.") from error


def write_model(model: nn.Module, folder: str | Path) -> None:
    """Write a pruned model as a folder: model.safetensors, pruning.json and README.md.

    An older model in the folder is replaced; the folder and other files there stay. Wrappers
    (compiled, parallel) are removed. If the classifier was replaced by one for another number of
    classes, the record is updated. The new files are read back before they replace the old.

    Raises:
        CheckpointError: if `model` is not pruned, or was changed since in any other way, or if
            `folder` holds other things.
        ZooError: if the folder cannot be written; the old one is left as it was.
    """
    model = unwrapped(model)
    record = record_of(model)
    if record is None:
        parts = dict(model.named_modules())
        inside = [name for name, part in parts.items() if record_of(part) is not None]
        if inside:
            raise CheckpointError(
                f"This {type(model).__name__} is not pruned, but its part {inside[0]!r} is: give "
                f"that part (.{inside[0]}) to zoo.save."
            )
        raise CheckpointError(
            f"This {type(model).__name__} is not pruned, so there is no record to reload it by: "
            "prune it with zoo.load or zoo.prune, or write its weights with "
            "torch.save(model.state_dict(), ...), which weights= of zoo.load reads."
        )
    tensors = {plain_name(name): tensor for name, tensor in named_tensors(model).items()}
    record = _with_its_classifier(record, tensors)
    folder = Path(folder)
    place = folder.resolve()
    with _writing(folder):
        check_place(place)
        # a folder that exists may be a mount, a shell's working folder, or hold an open log
        exists = place.exists()
        where, prefix = (place, SCRATCH) if exists else (place.parent, f".{place.name}.")
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=where) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            _save_tensors(tensors, new / MODEL, _untold(model))
            write_json(new / RECORD, encode_document(record))
            _read_back(new, model, record)
            write_text(new / README, readme(record))
            if exists:
                _replace(new, place, old=Path(scratch, "old"))
            else:
                new.rename(place)
        for left_by_a_kill in place.glob(f"{SCRATCH}*"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)


def _with_its_classifier(record: PruningRecord, tensors: Mapping[str, Tensor]) -> PruningRecord:
    """The record, with its classes and costs updated if the classifier was replaced since."""
    if not record.architecture:
        return record
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        classes, _ = architecture(record.architecture).infer(shapes)
    except CheckpointError:
        return record
    if classes == record.num_classes:
        return record
    record = replace(record, num_classes=classes, new_classifier=True)
    plan = record.plan
    groups = groups_of(record.architecture, skeleton_of(record), record.size, record.in_channels)
    costs, widths = cost_model(groups), [len(plan.kept[name]) for name in groups.names]
    dense = replace(costs.dense, latency=plan.dense.latency)
    pruned = replace(costs(widths), latency=plan.pruned.latency)
    got = plan.got if plan.metric == "latency" else costs.factor(widths, plan.metric)
    return replace(record, plan=replace(plan, dense=dense, pruned=pruned, got=got))


def _read_back(folder: Path, model: nn.Module, record: PruningRecord) -> None:
    """Refuse files that `read_model` could not read; without an architecture, count parameters.

    Raises:
        CheckpointError: naming what differs from the network that was pruned.
    """
    advice = "Write its weights with torch.save(model.state_dict(), ...) or put the layer back."
    if record.architecture:
        try:
            read_model(folder)
        except CheckpointError as error:
            changed = str(error).partition(f"{RECORD}: ")[2] or str(error)
            raise CheckpointError(
                f"The network is no longer the one that was pruned, and could not be read again: "
                f"{changed} {advice}"
            ) from None
        return
    count = parameter_count(model)
    if count != record.plan.pruned.params:
        raise CheckpointError(
            f"The network is no longer the one that was pruned: {count:,} parameters, the plan has "
            f"{record.plan.pruned.params:,}. {advice}"
        )


def check_place(place: Path) -> None:
    """Refuse a place that a pruned model cannot be written to.

    Raises:
        CheckpointError: for a file, or a folder that holds things but no model and no training.
    """
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place} is a file; a pruned model needs a folder.")
    # a training writes its history there, its trackers may write any files, and a kill leaves some
    ours = any(list(place.glob(name)) for name in (RECORD, SAVEPOINT, HISTORY, f"{SCRATCH}*"))
    if place.exists() and not ours and any(place.iterdir()):
        raise CheckpointError(
            f"{place} is not empty and holds no pruned model; name another folder, or empty it."
        )


def _replace(new: Path, place: Path, old: Path) -> None:
    """Move the files in `new` into the folder `place`; if that fails, put the old ones back.

    Weights do not say which record they belong to. So a record that changes goes before the old
    weights do and comes after the new ones: a kill in between leaves none, which `read_model`
    names. Where the record stays the same, as in fine-tuning, a kill leaves a network, old or new.
    """
    names = (README, MODEL, RECORD)
    old.mkdir()
    for name in names:
        if (place / name).exists():
            shutil.copy2(place / name, old / name)
    try:
        if (old / RECORD).exists() and (old / RECORD).read_bytes() != (new / RECORD).read_bytes():
            (place / RECORD).unlink()
        for name in names:
            os.replace(new / name, place / name)
    except BaseException:
        for name in names:
            if (old / name).exists():
                os.replace(old / name, place / name)
            else:
                (place / name).unlink(missing_ok=True)
        raise


def _untold(model: nn.Module) -> dict[str, str]:
    """What neither a tensor nor the record shows."""
    facts = {"memory_format": _layout(model)}
    transforms = transforms_input(model)
    return facts if transforms is None else {**facts, "transform_input": str(transforms)}


def _layout(model: nn.Module) -> str:
    """The memory format of the convolutions, on which the last bits of their outputs depend."""
    weights = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
    last = bool(weights) and all(
        w.is_contiguous(memory_format=torch.channels_last) for w in weights
    )
    return "channels_last" if last else "contiguous_format"


# --- reading back ---------------------------------------------------------------------------------


def read_model(folder: str | Path, *, skeleton: nn.Module | None = None) -> nn.Module:
    """The pruned model in `folder`, in eval mode on the CPU.

    Nothing is traced, unpickled or downloaded.

    Args:
        folder: one that `write_model` wrote.
        skeleton: the dense network, if its architecture is not registered; it is not edited.

    Raises:
        CheckpointError: if a file is missing or damaged, or the tensors do not fit the record.
        DocumentError: if pruning.json has an unknown key or another schema version.
    """
    if not isinstance(folder, str | Path):
        raise CheckpointError(f"A pruned network is read from a folder's path, not {folder!r}.")
    folder = Path(folder).expanduser()
    for name in (RECORD, MODEL):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no pruned model: {name} is missing.")
    record = PruningRecord.read(folder / RECORD)
    tensors, metadata = read_safetensors(folder / MODEL)
    if record.architecture:
        skeleton = _built(record, folder)
    elif skeleton is None:
        raise CheckpointError(
            f"{folder} holds a network of no registered architecture: give the dense network that "
            "it was pruned from as skeleton=."
        )
    if record.rewritten:
        zeros = example_for(skeleton, record.image_size, record.plan.inputs, torch.zeros)
        skeleton = rewritten(skeleton, zeros)
    _check(tensors, skeleton, record, folder)
    if record.architecture:  # the skeleton was built here, so it may be edited
        resize(model := skeleton, tensors, record.plan.attributes)
        # folders from before it was written are of networks without it
        transform_input(model, metadata.get("transform_input") == "True")
    else:
        model = resized(skeleton, tensors, record.plan.attributes)
    if metadata.get("memory_format") == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.pruning = record  # type: ignore[assignment]
    return model.eval()


def _built(record: PruningRecord, folder: Path) -> nn.Module:
    """The skeleton of a record that may claim anything."""
    try:
        return skeleton_of(record)
    except ZooError:
        raise
    except Exception as error:  # torch's errors for impossible sizes share no base class
        raise CheckpointError(
            f"{folder / RECORD}: {record.architecture} cannot be built for {record.num_classes} "
            f"classes of images of {images_of(record)}: {first_line(error)}"
        ) from None


def skeleton_of(record: PruningRecord) -> nn.Module:
    """The dense network of the record's architecture, with meaningless weights."""
    with Uninitialised():
        return build_model(
            record.architecture,
            record.num_classes,
            image_size=record.size,
            in_channels=record.in_channels,
        )


def _check(
    tensors: Mapping[str, Tensor], skeleton: nn.Module, record: PruningRecord, folder: Path
) -> None:
    """Refuse tensors that are not those of `skeleton` at the widths of the record's plan."""
    where = f"{folder}: {MODEL} does not belong to {RECORD}:"
    expected = named_tensors(skeleton)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    odd = sorted(set(shapes) ^ set(tensors))
    if odd:
        kind = "missing" if odd[0] in shapes else "unexpected"
        raise CheckpointError(f"{where} {len(odd)} tensors differ; {odd[0]} is {kind}.")
    for name, tensor in expected.items():
        if tensor.is_floating_point() and not tensors[name].is_floating_point():  # of any precision
            raise CheckpointError(f"{where} {name} holds {tensors[name].dtype}, no floats.")
    groups = matching_groups(record.architecture, skeleton) if record.architecture else None
    if groups is not None:
        if set(groups.names) != set(record.plan.kept):
            raise CheckpointError(f"{where} its channel groups are not {record.architecture}'s.")
        for group in groups.groups:
            kept = record.plan.kept[group.name]
            if not kept or list(kept) != sorted({*kept} & {*range(group.size)}):
                raise CheckpointError(
                    f"{where} the channels of {group.name!r} that are kept are not some of its "
                    f"{group.size}, in order."
                )
        for name, dims in kept_positions(groups.adapted(shapes), record.plan.kept).items():
            if name in shapes:
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
