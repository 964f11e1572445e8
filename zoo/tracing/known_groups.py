"""Channel groups from the registry or the user's cache folder, else traced."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from torch import nn

from zoo.common.cache import cache_folder
from zoo.common.documents import decode_document, encode_document, read_json, write_json
from zoo.common.sizes import Size, sides
from zoo.errors import DocumentError
from zoo.models import architecture, build_model
from zoo.models.stem import RGB
from zoo.registry.store import stored_groups
from zoo.spec.groups import ChannelGroups
from zoo.surgery.surgery import named_tensors
from zoo.tracing.calls import Inputs
from zoo.tracing.dependencies import trace_key
from zoo.tracing.fingerprint import fingerprint
from zoo.tracing.graph import analyse
from zoo.tracing.program import Program

__all__ = ["groups_of", "matching_groups", "reference_groups", "traced_groups"]


def groups_of(
    arch: str, module: nn.Module, image_size: Size, in_channels: int = RGB
) -> ChannelGroups:
    """The channel groups of `module`, of architecture `arch`: stored ones if they fit, else traced.

    Stored groups are for colour images; they are adapted to `in_channels`. The network is traced at
    an image size that they do not scale to.
    """
    stored = matching_groups(arch, module)
    if stored is None or not stored.scale_to(image_size):
        example = next(module.parameters()).new_zeros(1, in_channels, *sides(image_size))
        return traced_groups(module, example)[1]
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}
    return stored.adapted(shapes, image_size, in_channels)


def reference_groups(arch: str) -> ChannelGroups:
    """The channel groups of an architecture at its own number of classes and image size."""
    known = architecture(arch)
    return groups_of(arch, build_model(arch, known.num_classes), known.image_size)


def matching_groups(arch: str, module: nn.Module) -> ChannelGroups | None:
    """The stored groups of `arch`, if they fit the structure of `module`; else None.

    Another version of the library may build another network under the same name.
    """
    stored = stored_groups(arch)
    return stored if stored is not None and stored.fingerprint == fingerprint(module) else None


def traced_groups(module: nn.Module, inputs: Inputs) -> tuple[Program | None, ChannelGroups]:
    """As `analyse`; if the cache folder has the groups, these and None for the program.

    A damaged cache file is written anew. If the folder cannot be written, nothing is cached.
    """
    key = trace_key(module, inputs)
    path = cache_folder() / "groups" / f"{key}.json"
    found = _read(path) if key else None
    if found is not None:
        return None, found
    program, groups = analyse(module, inputs)
    if key:
        _write(path, groups)
    return program, groups


def _read(path: Path) -> ChannelGroups | None:
    try:
        return decode_document(ChannelGroups, read_json(path), str(path))
    except DocumentError:
        return None


def _write(path: Path, groups: ChannelGroups) -> None:
    with suppress(OSError):
        write_json(path, encode_document(groups, terse=True), indent=None)
