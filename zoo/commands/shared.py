"""Types and functions that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tyro.constructors import PrimitiveConstructorSpec

import zoo
from zoo.common.sizes import Size, parsed_size, spelled
from zoo.errors import ZooError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["INTERRUPTED", "SIZE", "Metric", "Network", "read_network"]

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

Metric = Literal["params", "macs", "latency"]

SIZE = PrimitiveConstructorSpec(
    nargs=1,
    metavar="PIXELS|HxW",
    instance_from_str=lambda given: parsed_size("--size", given[0]),
    is_instance=lambda value: value is None or isinstance(value, int | tuple),
    str_from_instance=lambda size: [str(size) if size is None else spelled(size)],
)
"""How flags parse an image size."""


class Network(NamedTuple):
    """A network that was read, the size of its images, and its architecture."""

    module: nn.Module
    size: Size
    arch: str


def read_network(path: str, arch: str | None, size: Size | None) -> Network:
    """A pruned network from its folder, or a dense one from its checkpoint."""
    from zoo.storage.checkpoints import read_checkpoint
    from zoo.storage.dense import load_dense

    if Path(path).is_dir():
        model = zoo.load_pruned(path)
        record: Any = model.pruning
        return Network(model, size or record.size, record.architecture)
    name = arch or read_checkpoint(path).metadata.get("architecture")
    if name is None:
        raise ZooError(f"{path} does not say which architecture it belongs to; add --arch.")
    dense = load_dense(name, path, image_size=size)
    return Network(dense.module, dense.image_size, name)
