"""Savepoints: the whole state of a training on disk after every epoch, and its history."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.common.documents import replacing, write_text
from zoo.data.batches import DeviceLoader
from zoo.errors import ZooError
from zoo.spec.plans import record_of
from zoo.storage.checkpoints import HISTORY, SAVEPOINT
from zoo.tracing.fingerprint import digest
from zoo.training.recipes import Recipe

__all__ = ["check_folder", "discard", "identify", "read_savepoint", "write_savepoint"]


FORMAT = 2
"""Version of the state in a savepoint; other versions cannot be resumed."""


def identify(
    recipe: Recipe,
    seed: int,
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Any,
    held: Any,
    processes: int,
) -> dict[str, Any]:
    """What a resumed training must have in common with its savepoint, as plain values.

    The weights of `model` change in training, so it is identified by its shapes and, if it is
    pruned, by the channels that were kept.
    """
    tensors = [f"{name}: {tuple(tensor.shape)}" for name, tensor in model.state_dict().items()]
    record = record_of(model)
    kept = [] if record is None else [json.dumps(record.plan.kept)]
    return {
        "format": FORMAT,
        **vars(recipe),
        "seed": seed,
        "network": digest([*tensors, *kept]),
        "teacher": None if teacher is None else _weights_digest(teacher),
        "training data": _described(batches),
        "validation data": None if held is None else _described(held),
        "number of processes": processes,
    }


def _weights_digest(network: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        state.update(name.encode())
        state.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _described(batches: Any) -> str:
    """An image set's name and digest; the length of other data, which may be random each time."""
    if isinstance(batches, DeviceLoader):
        return f"{batches.data.name} ({batches.data.digest()})"
    return f"{len(batches)} batches of {type(batches.dataset).__name__}"


def check_folder(folder: Path) -> None:
    """Make `folder`, and check before the first epoch that savepoints can be written to it.

    Raises:
        ZooError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ZooError(f"Cannot write to {folder}: {error}.") from error


def write_savepoint(
    folder: Path, identity: Mapping[str, Any], state: Mapping[str, Any], history: Sequence[Any]
) -> None:
    """Replace the history.jsonl in `folder`, one line per epoch, and then the savepoint.

    Args:
        folder: made if it does not exist.
        identity: plain values; what a resumed training must have in common with this one.
        state: tensors and plain values.
        history: dataclasses.

    Raises:
        ZooError: if they cannot be written; the old savepoint is left as it was.
    """
    lines = [json.dumps(vars(record)) + "\n" for record in history]
    content = io.BytesIO()
    torch.save({"identity": dict(identity), "state": dict(state)}, content)
    try:
        for name in (SAVEPOINT, HISTORY):
            for left_by_a_kill in folder.glob(f".*.{name}"):
                left_by_a_kill.unlink()
        write_text(folder / HISTORY, "".join(lines))
        with replacing(folder / SAVEPOINT) as partial:
            partial.write_bytes(content.getbuffer())
    except OSError as error:
        raise ZooError(
            f"Cannot write to {folder}: {error}. The savepoint before this one is kept."
        ) from error


def read_savepoint(
    folder: Path, identity: Mapping[str, Any], *, resume: bool
) -> dict[str, Any] | None:
    """The state in `folder`, or None if no epoch was finished yet. Nothing is unpickled.

    Raises:
        ZooError: if there is one but `resume` is False, if it is damaged, or if it is of another
            training; the message names what differs.
    """
    path = folder / SAVEPOINT
    if not path.exists():
        return None
    if not resume:
        raise ZooError(
            f"{path} is an unfinished training, or the state of a finished one: continue it with "
            "resume=True (--resume), remove it, or name another folder."
        )
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise ZooError(f"{path} cannot be read: {error}.") from None
    try:
        found = torch.load(content, map_location="cpu", weights_only=True)
        theirs: dict[str, Any] = found["identity"]
        state: dict[str, Any] = found["state"]
    except Exception as error:  # a damaged file can fail anywhere in the parser
        raise ZooError(
            f"{path} is damaged or not a savepoint ({type(error).__name__}): remove it to start "
            "again."
        ) from None
    if theirs.get("format") != FORMAT:
        raise ZooError(
            f"{path} was written by another version of prunezoo, whose savepoints have another "
            f"form: remove it to start again."
        )
    for name in dict.fromkeys([*identity, *theirs]):
        there, here = theirs.get(name), identity.get(name)
        if there != here:
            raise ZooError(
                f"{path} is of another training: its {name} is {there!r}, here it is {here!r}. "
                f"Resume with the same {name}, or name another folder."
            )
    return state


def discard(folder: Path) -> None:
    """Remove the savepoint of a finished training, whose weights are safe; the history stays."""
    (folder / SAVEPOINT).unlink(missing_ok=True)
