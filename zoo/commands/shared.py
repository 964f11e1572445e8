"""Types and functions that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tyro.constructors import PrimitiveConstructorSpec

import zoo
from zoo.common.sizes import Size, parsed_size, spelled
from zoo.errors import ZooError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "INTERRUPTED",
    "SEED",
    "SIZE",
    "Network",
    "as_flags",
    "printable",
    "read_network",
]

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

SIZE = PrimitiveConstructorSpec(
    nargs=1,
    metavar="PIXELS|HxW",
    instance_from_str=lambda given: parsed_size("--size", given[0]),
    is_instance=lambda value: value is None or isinstance(value, int | tuple),
    str_from_instance=lambda size: [str(size) if size is None else spelled(size)],
)
"""How flags parse an image size."""


def _parsed_seed(text: str) -> int:
    seed = int(text)
    if not -(2**63) <= seed < 2**64:
        raise ZooError(f"--seed must be of 64 bits, from -2**63 to 2**64 - 1; got {seed}.")
    return seed


SEED = PrimitiveConstructorSpec(
    nargs=1,
    metavar="INT",
    instance_from_str=lambda given: _parsed_seed(given[0]),
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda seed: [str(seed)],
)
"""How flags parse a seed: as one that PyTorch's generators take."""

_NAMES = {
    **{name: name for name in ("align", "cf", "data", "floor", "keep", "metric", "profile", "refit",
                               "rewind", "seed", "weights", "init", "arch", "criterion", "size",
                               "precision", "teacher")},
    "num_classes": "classes",
    "image_size": "size",
}  # fmt: skip
"""Argument of the library -> flag."""

_ARGUMENT = re.compile(
    rf"(?<![\w.=,/-])({'|'.join(_NAMES)})=(True\b|'[^']*'|\d[\d.]*\d|\d)?(?![\w/-]|\.\w)"
)
"""An argument and its value, but no part of a path, as of `runs/lr=0.1,seed=3/base.pt`."""


def as_flags(message: str) -> str:
    """A message of the library in the words of the command line: `--cf 4` instead of `cf=4`."""

    def flag(found: re.Match[str]) -> str:
        value = (found[2] or "").strip("'")
        told = "" if value in ("", "True") else f" {value}"
        told = " " if message[found.end() :].startswith("{") else told
        return f"--{_NAMES[found[1]]}{told}"

    return _ARGUMENT.sub(flag, message)


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


def printable(text: str) -> str:
    """The text without characters that a terminal obeys, which a document may hold."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
