"""Channel groups: what is cut together. Plain frozen data, no torch.

A *unit* is one channel and everything that must go with it: its positions in every `Slot` of its
`Group`. `ChannelGroups` holds all that pruning needs to know of an architecture. It is derived
once by `zoo.tracing.graph` and stored in the registry as `groups.json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from zoo.common.sizes import Size, sides
from zoo.errors import GraphError

__all__ = ["ChannelGroups", "Group", "InputShape", "Slot"]


@dataclass(frozen=True)
class Slot:
    """One dimension, or a part of it, of one parameter, buffer or width attribute.

    Unit j owns the positions start + stride · j … start + stride · j + block - 1. `block` exceeds 1
    where a map was flattened, `start` exceeds 0 where tensors were concatenated. Where units lie
    irregularly (beside the zero channels of a padded shortcut), `at` gives the first of each.
    """

    tensor: str
    dim: int
    start: int = 0
    stride: int = 1
    block: int = 1
    at: tuple[int, ...] = ()

    def positions(self, unit: int) -> range:
        """The positions along `dim` that belong to `unit`."""
        first = self.at[unit] if self.at else self.start + self.stride * unit
        return range(first, first + self.block)


@dataclass(frozen=True)
class Group:
    """An ordered set of `size` units with the same slots, pruned by one keep ratio.

    `name` is the module that first produces the channels; `filters` are the weights that produce
    them, over which filter criteria are summed. `output_dims` are the output dimensions of these
    weights, such as 1 for transposed convolutions; empty means 0 for all.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    filters: tuple[str, ...] = ()
    output_dims: tuple[int, ...] = ()

    @cached_property
    def filter_slots(self) -> tuple[Slot, ...]:
        """The slots that are filters; a weight may also have slots of the channels it reads."""
        dims = self.output_dims or (0,) * len(self.filters)
        outputs = set(zip(self.filters, dims, strict=True))
        return tuple(slot for slot in self.slots if (slot.tensor, slot.dim) in outputs)


@dataclass(frozen=True)
class InputShape:
    """One tensor that a network is called with.

    Attributes:
        shape: of the example. A first dimension that equals the first input's batch size stands for
            any batch size.
        name: key in a dict of inputs; "" for positional inputs.
        dtype: as torch names it.
    """

    shape: tuple[int, ...]
    name: str = ""
    dtype: str = "float32"

    def __str__(self) -> str:
        """The shape of one item, such as 3x32x96, after the name if any: `mask 1x32x96`."""
        sides = "x".join(map(str, self.shape[1:])) or "1"
        return f"{self.name} {sides}".lstrip()


@dataclass(frozen=True)
class ChannelGroups:
    """The channel groups of one network, with what its costs depend on.

    Attributes:
        groups: in the order in which the network first computes them.
        shapes: of every parameter and buffer.
        buffers: names among `shapes` that are not parameters.
        positions: name of every convolution and dense weight -> output positions per image; the
            MACs of the operator are the weight's elements times this.
        image_size: pixels per side that `positions` was counted at; the last dimension of the first
            input if `inputs` is not empty.
        fixed_macs: MACs per image that no width changes: of products of two activations (attention)
            and of operators without a rule (recurrent layers).
        unprunable: module name -> why its channels stay whole.
        attributes: `<module>:<attribute>` -> value, for every integer of a module that repeats a
            width that none of its own tensors has. Slots treat it as a tensor of that length.
        fingerprint: hash of the structure that stored groups were derived from; they hold for no
            other.
        inputs: what the network is called with; empty for one batch of square images.
    """

    groups: tuple[Group, ...]
    shapes: dict[str, tuple[int, ...]]
    buffers: tuple[str, ...]
    positions: dict[str, int]
    image_size: int
    unprunable: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    fingerprint: str = field(default="", compare=False)
    fixed_macs: int = 0
    inputs: tuple[InputShape, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self.groups)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(group.size for group in self.groups)

    def length(self, tensor: str, dim: int) -> int:
        """The length of one dimension of a tensor, or the value of an attribute."""
        return self.attributes[tensor] if tensor in self.attributes else self.shapes[tensor][dim]

    def adapted(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        image_size: Size | None = None,
        in_channels: int = 3,
    ) -> ChannelGroups:
        """The same groups for a network with other tensor `shapes` or another image size.

        The number of classes and, where a map is flattened, the positions per channel may differ.
        These groups must be of square images; `in_channels` is recorded only for oblong ones.

        Raises:
            GraphError: if a tensor is missing or its shape cannot belong to these groups.
        """
        missing = sorted(set(self.shapes) - set(shapes))
        if missing:
            raise GraphError(f"The network lacks the tensor {missing[0]!r} that its groups name.")
        groups = tuple(self._adapt_group(group, shapes) for group in self.groups)
        height, width = sides(image_size or self.image_size)
        positions = {
            name: count
            if len(self.shapes[name]) < 4
            else _rescale(count, height, width, self.image_size)
            for name, count in self.positions.items()
        }
        oblong = InputShape((1, in_channels, height, width))
        return replace(
            self,
            groups=groups,
            shapes={name: tuple(shapes[name]) for name in self.shapes},
            positions=positions,
            image_size=width,
            inputs=() if height == width else (oblong,),
        )

    def scale_to(self, image_size: Size) -> bool:
        """Whether `adapted` counts positions exactly: all convolutions' maps scale to whole sides.

        Otherwise some networks round up, and some down.
        """
        maps = {n for name, n in self.positions.items() if len(self.shapes[name]) >= 4 and n > 1}
        return all(
            math.isqrt(count) ** 2 == count and math.isqrt(count) * side % self.image_size == 0
            for count in maps
            for side in sides(image_size)
        )

    def _adapt_group(self, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> Group:
        slots = []
        for slot in group.slots:
            old = self.length(slot.tensor, slot.dim)
            new = old if slot.tensor in self.attributes else shapes[slot.tensor][slot.dim]
            if old == new:
                slots.append(slot)
            elif slot.block * group.size == old and new % group.size == 0:
                block = new // group.size
                slots.append(replace(slot, block=block, stride=block))
            else:
                raise GraphError(
                    f"{slot.tensor} has {new} positions in dimension {slot.dim}; group "
                    f"{group.name!r} expects {old}."
                )
        return replace(group, slots=tuple(slots))


def _rescale(count: int, height: int, width: int, reference: int) -> int:
    """Output positions at another image size; exact where every stride rounds up.

    A count of 1 is a map pooled to one position, as in squeeze and excitation, at any size.
    """
    if count == 1:
        return 1
    side = math.isqrt(count)
    if side * side != count:
        return math.ceil(count * height * width / reference / reference)
    return math.ceil(side * height / reference) * math.ceil(side * width / reference)
