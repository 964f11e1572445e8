"""Teachers: the dense network that a pruned one came from, read again from its checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from zoo.common.strides import laid_out
from zoo.errors import CheckpointError, ZooError, unknown
from zoo.models import parameter_count
from zoo.spec.plan import PruningRecord, record_of
from zoo.storage.dense import load_dense
from zoo.surgery.surgery import evaluating

__all__ = ["Teacher", "find_teacher", "source_network", "teaching"]

Teacher = nn.Module | Literal["auto", "source"] | None


def find_teacher(model: nn.Module, teacher: Teacher) -> tuple[nn.Module | None, str | None]:
    """The network that `teacher` stands for, and what to call it; None and None for none.

    `auto` is the source where it can be read and still answers the questions that `model` is asked;
    a recorded file that cannot be is warned of.

    Raises:
        ZooError: for `source`, as `source_network`; for any other word.
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
            warnings.warn(f"No network teaches. {error}", stacklevel=3)
        return None, None


@contextmanager
def teaching(network: nn.Module) -> Iterator[None]:
    """`network` in eval mode and channels-last inside; in its own mode and layout afterwards."""
    with laid_out(network, torch.channels_last), evaluating(network):
        yield


def source_network(model: nn.Module) -> nn.Module:
    """The dense network that a pruned one was cut from, in eval mode, on the CPU.

    Raises:
        CheckpointError: if no file is recorded, it is missing, or it is not the one it was; or if
            it has no classifier of the classes of `model`.
        ZooError: if `model` is not pruned, or the Hub does not give the file.
    """
    record = _record(model)
    source = record.source
    if record.new_classifier:
        raise CheckpointError(
            f"The network has a new classifier of {record.num_classes} classes, which "
            f"{source.reference} has none of, so that it cannot teach: give a network of these "
            "classes as teacher=, or None."
        )
    if source.sha256 is None:
        raise CheckpointError(
            f"The network was pruned from a {source.reference}, and no file is recorded that the "
            "dense weights could be read from: give the dense network itself as teacher=."
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
    """Whether `model` is as it was cut: another classifier asks another question."""
    record = record_of(model)
    count = parameter_count(model)
    if record is None or record.new_classifier:
        return False
    return count == record.plan.pruned.params
