"""A digest of a network's structure, which shows whether stored channel groups still hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["digest", "fingerprint", "qualified_name", "structure"]

VARYING = {"num_classes", "out_features", "in_features", "pretrained_cfg", "default_cfg"}
VARYING |= {"training", "pruning"}
"""Attributes left out, as they vary within an architecture: with the classes, the image size (where
a map is flattened), the weights' tag, the mode, and the record of a pruned network."""


def fingerprint(module: nn.Module) -> str:
    """sha256 of what surgery relies on: layers, their classes and attributes, names of tensors.

    It does not depend on the number of classes, the image size or the shapes of tensors;
    `ChannelGroups.adapted` compares those.
    """
    return digest(structure(module))


def structure(module: nn.Module) -> Iterator[str]:
    """The structure of `module`, line by line; a layer under two names is described once."""
    first: dict[int, str] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        original = first.setdefault(id(layer), path)
        yield f"{path}={original}:{qualified_name(type(layer))}"
        if original == path:
            own = layer.__dict__.items()
            yield _plain({k: v for k, v in own if not k.startswith("_") and k not in VARYING})
            tensors = (*layer._parameters.items(), *layer._buffers.items())
            yield f"{[name for name, tensor in tensors if tensor is not None]}"


def _plain(value: Any) -> str:
    """Text of a value: its content if it is a plain value, else the name of its class."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_plain(item)}' for key, item in value.items())}}}"
    return qualified_name(type(value))


def qualified_name(item: Any) -> str:
    """The full name of a class or function."""
    return f"{item.__module__}.{item.__qualname__}"


def digest(lines: Iterable[str]) -> str:
    """sha256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()
