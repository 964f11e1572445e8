"""What several commands need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import zoo
from zoo.errors import ZooError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["INTERRUPTED", "Metric", "read_network"]

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

Metric = Literal["params", "macs", "latency"]


def read_network(path: str, arch: str | None, size: int | None) -> tuple[nn.Module, int]:
    """A pruned network's folder or a dense checkpoint as (module, image size)."""
    from zoo.checkpoints import load_dense, read_checkpoint

    if Path(path).is_dir():
        model = zoo.load_pruned(path)
        record: Any = model.pruning
        return model, size or record.image_size
    name = arch or read_checkpoint(path).metadata.get("architecture")
    if name is None:
        raise ZooError(f"{path} does not say which architecture it belongs to; add --arch.")
    model, _, _, own = load_dense(name, path, image_size=size)
    return model, own
