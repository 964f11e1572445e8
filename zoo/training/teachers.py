"""Teachers: the dense network that a pruned one was cut from, read from its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from zoo.common.notices import warn
from zoo.common.strides import laid_out
from zoo.errors import CheckpointError, ZooError, unknown
from zoo.models import parameter_count
from zoo.spec.plans import PruningRecord, record_of
from zoo.storage.dense import load_dense
from zoo.surgery.surgery import evaluating

__all__ = ["Teacher", "find_teacher", "source_network", "teaching"]

Teacher = nn.Module | Literal["auto", "source"] | None


def find_teacher(model: nn.Module, teacher: Teacher) -> tuple[nn.Module | None, str | None]:
    """The network that `teacher` stands for, and its name; (None, None) for none.

    `auto` is the source, if it can be read and `model` still has its classifier. A warning says if
    a recorded file cannot be read.

    Raises:
        ZooError: for `source`, as `source_network`; for an unknown word.
    """
    if teacher is None or isinstance(teacher, nn.Module):
        return teacher, None if teacher is None else type(teacher).__name__
    if teacher not in ("auto", "source"):
        raise unknown("teacher", teacher, ["auto", "source", "None", "a network"])
    if teacher == "auto" and not _as_pruned(model):
        return None, None
    try:
        return source_network(model), _record(model).source.reference
    except ZooError as error:
        if teacher == "source":
            raise
        if _record(model).source.sha256 is not None:
            warn(f"Training goes without a teacher. {error}")
        return None, None


@contextmanager
def teaching(network: nn.Module) -> Iterator[None]:
    """`network` in eval mode and channels-last inside; in its own mode and layout afterwards."""
    with laid_out(network, torch.channels_last), evaluating(network):
        yield


def source_network(model: nn.Module) -> nn.Module:
    """The dense network that a pruned one was cut from, in eval mode, on the CPU.

    Raises:
        CheckpointError: if no file is recorded, or it is missing or has changed; or if it has no
            classifier for the classes of `model`.
        ZooError: if `model` is not pruned, or the file cannot be fetched from the Hub.
    """
    record = _record(model)
    source = record.source
    if record.new_classifier:
        raise CheckpointError(
            f"The network has a new classifier of {record.num_classes} classes. "
            f"{source.reference} has none for them, so it cannot teach: give a network of these "
            "classes as teacher=, or None."
        )
    if source.sha256 is None:
        raise CheckpointError(
            f"The network was pruned from a {source.reference}, so no file with the dense weights "
            "is recorded: give the dense network itself as teacher=."
        )
    dense = load_dense(
        record.architecture,
        source.reference,
        image_size=record.size,
        ema=source.averaged is not False,
    )
    if dense.checkpoint.source.sha256 != source.sha256:
        raise CheckpointError(
            f"{source.reference} is not what the network was pruned from: its sha256 is "
            f"{dense.checkpoint.source.sha256}, recorded is {source.sha256}."
        )
    return dense.module


def _record(model: nn.Module) -> PruningRecord:
    record = record_of(model)
    if record is None:
        raise ZooError(
            f"teacher='source' is for pruned networks; this {type(model).__name__} has no record "
            "of where it came from. Give a network as teacher=, or None."
        )
    return record


def _as_pruned(model: nn.Module) -> bool:
    """Whether `model` still has the classifier that it was pruned with, of the source's classes."""
    record = record_of(model)
    count = parameter_count(model)
    if record is None or record.new_classifier:
        return False
    return count == record.plan.pruned.params
