"""Channel groups: what is cut together. Plain frozen data, no torch.

A *unit* is one channel and everything that must go with it: its positions in every `Slot` of its
`Group`. `ChannelGroups` is all that is known of an architecture for pruning it; it is derived
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

    Unit j owns the positions start + stride · j … start + stride · j + block - 1: `block` is more
    than one where a map was flattened, `start` where tensors were concatenated. Where the units lie
    irregularly (beside the zero channels of a padded shortcut), `at` gives each one's first.
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
    them, over which filter criteria are summed. `output_dims` are the dimensions of these along
    which one filter lies by another: 1 for transposed convolutions, say; all 0 where it is empty.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    filters: tuple[str, ...] = ()
    output_dims: tuple[int, ...] = ()

    @cached_property
    def filter_slots(self) -> tuple[Slot, ...]:
        """The slots that are filters: a weight may have others, of the channels that it reads."""
        dims = self.output_dims or (0,) * len(self.filters)
        outputs = set(zip(self.filters, dims, strict=True))
        return tuple(slot for slot in self.slots if (slot.tensor, slot.dim) in outputs)


@dataclass(frozen=True)
class InputShape:
    """One tensor that a network is called with.

    Attributes:
        shape: of the example; where the first input's batch is its first dimension too, any batch
            may take that place.
        name: in a dict of inputs; "" where they are given in order.
        dtype: as torch names it.
    """

    shape: tuple[int, ...]
    name: str = ""
    dtype: str = "float32"

    def __str__(self) -> str:
        """One item's, such as 3x32x96, or `mask 1x32x96`."""
        sides = "x".join(map(str, self.shape[1:])) or "1"
        return f"{self.name} {sides}".lstrip()


@dataclass(frozen=True)
class ChannelGroups:
    """The channel groups of one network, with what its costs depend on.

    Attributes:
        groups: in the order in which the network first computes them.
        shapes: of every parameter and buffer.
        buffers: names among `shapes` that are not parameters.
        positions: of every convolution and dense weight, the output positions of one image; the
            MACs of the operator are the weight's elements times this.
        image_size: pixels per side that `positions` was counted at; the last dimension of the first
            input, where `inputs` say more.
        fixed_macs: multiply-accumulates of one image between activations (attention), which no
            width changes.
        unprunable: module name -> why its channels stay whole.
        attributes: `<module>:<attribute>` -> value, of every integer of a module that repeats a
            width no tensor of its own has. Slots treat it as a tensor of that length.
        fingerprint: of the structure they were derived from, where they are stored; they hold for
            no other.
        inputs: what the network is called with; none where that is one batch of square images.
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
        """Of one dimension of a tensor, or the value of an attribute."""
        return self.attributes[tensor] if tensor in self.attributes else self.shapes[tensor][dim]

    def adapted(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        image_size: Size | None = None,
        in_channels: int = 3,
    ) -> ChannelGroups:
        """The same groups for a network with other tensor `shapes` or another image size.

        The number of classes and, where a map is flattened, the positions per channel may differ.
        Those of a network of square images; `in_channels` are told of others.

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
        """Whether `adapted` counts positions exactly: all maps of convolutions have whole sides.

        Elsewhere some networks round up, and some down.
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

    One position is that of a map pooled to it, as in squeeze and excitation, at any size.
    """
    if count == 1:
        return 1
    side = math.isqrt(count)
    if side * side != count:
        return math.ceil(count * height * width / reference / reference)
    return math.ceil(side * height / reference) * math.ceil(side * width / reference)
