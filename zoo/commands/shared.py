"""What several commands need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import zoo
from zoo.errors import ZooError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["INTERRUPTED", "Metric", "Network", "read_network"]

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

Metric = Literal["params", "macs", "latency"]


class Network(NamedTuple):
    """A network that was read, the pixels per side of its images, and its architecture."""

    module: nn.Module
    size: int
    arch: str


def read_network(path: str, arch: str | None, size: int | None) -> Network:
    """A pruned network from its folder, or a dense one from its checkpoint."""
    from zoo.checkpoints import read_checkpoint
    from zoo.dense import load_dense

    if Path(path).is_dir():
        model = zoo.load_pruned(path)
        record: Any = model.pruning
        return Network(model, size or record.image_size, record.architecture)
    name = arch or read_checkpoint(path).metadata.get("architecture")
    if name is None:
        raise ZooError(f"{path} does not say which architecture it belongs to; add --arch.")
    dense = load_dense(name, path, image_size=size)
    return Network(dense.module, dense.image_size, name)
