"""Widths that modules keep as integers, for which no tensor of theirs speaks.

Looked for in classes of torch, timm, torchvision and the zoo alone, because what an integer of a
user's class means cannot be known:

- what `forward` slices, splits or pads by (`SHAPES`, per class): an integer of a shape operator
  that equals a channel row there;
- what the module was made for and may be rebuilt from (`INPUTS`, `OUTPUTS`, `DEPTHWISE` and
  `CHILDREN`, by attribute name): one that equals the channel row that flows in or out of the module
  or of a child;
- what timm's feature extraction and `reset_classifier` go by (`num_features`, `head_hidden_size`,
  `feature_info`): the channels that `forward_features`, the classifier and the named modules see.

An integer that equals none of its rows, or two unlike ones, is left as it is; so are records of how
the dense network was configured (`stage1_cfg`, `base_width`, `planes`, `cardinality`, ...). Layers
that have tensors to go by are left to `zoo.surgery.surgery.REPAIRS`. Whatever is set, the check
under fake tensors has the last word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx, nn

from zoo.surgery.surgery import REPAIRS, named_tensors, width_attributes
from zoo.tracing.labels import Labels, Value, is_channels
from zoo.tracing.program import Program, operator_name

__all__ = ["INPUTS", "LIBRARIES", "OUTPUTS", "attribute_labels", "counted_child"]

LIBRARIES = ("torch.nn.", "timm.", "torchvision.", "zoo.")

SHAPES: dict[str, tuple[str, ...]] = {
    "SizedOperator": ("sizes",),
    "PaddedShortcut": ("before", "after"),
    "Bottle2neck": ("width",),
    "DlaBottle2neck": ("width",),
    "Scale": ("shape",),
    "CrossStage": ("expand_chs",),
    "CrossStage3": ("expand_chs",),
    "Partial_conv3": ("dim_conv3", "dim_untouched"),
    "SHSA": ("pdim", "dim"),
    "SelectiveKernel": ("in_channels",),
    "DualPathBlock": ("num_1x1_c",),
    "InceptionDWConv2d": ("split_indexes",),
    "FocalModulation": ("input_split",),
    "GatedConvBlock": ("split_indices",),
}
"""Class name -> the attributes that its `forward` slices, splits, reshapes or pads by."""

INPUTS = (
    "in_channels",
    "in_chs",
    "in_features",
    "in_dim",
    "inplanes",
    "dim",
    "num_features",
    "num_channels",
    "normalized_shape",
    "channels",
)
OUTPUTS = ("out_channels", "out_chs", "out_features", "out_dim", "dim_out", "num_features")

DEPTHWISE = ("MobileOneBlock", "RepVggBlock", "ReparamLargeKernelConv", "RepConditionalPosEnc")
"""Classes whose `groups` are their inputs, where the two are equal, when they are rebuilt."""

INTO, OUT_OF = 0, 1
"""The sides of `Program.flows`."""

CHILDREN: dict[str, tuple[str, int]] = {
    "MlpClassifierHead.num_features": ("fc2", INTO),
    "num_features": ("fc", INTO),
    "hidden_size": ("fc", INTO),
    "inplanes": ("fc", INTO),
    "last_channel": ("classifier.1", INTO),
    "pool_dim": ("conv_head", INTO),
    "num_in_chs": ("branches.{}", OUT_OF),
    "embed_dim": ("stages.{}", OUT_OF),
    "channels": ("level{}", OUT_OF),
}
"""Attribute name, of one class or of any -> the child whose channels it counts, if there is one,
and on which side. The braces take the key of an item of a list."""

STAND_INS: dict[str, dict[str, str]] = {
    "HighResolutionNet": {
        "stem": "act1",
        "stage1": "incre_modules.0",
        "stage2": "incre_modules.1",
        "stage3": "incre_modules.2",
        "stage4": "incre_modules.3",
    },
    "MobileNetV5": {"bn1": "conv_stem"},
    "TResNet": {"": "body.conv1"},
}
"""Class name -> module named in `feature_info` -> the one that its feature comes out of."""


def attribute_labels(module: nn.Module, program: Program) -> dict[str, Labels]:
    """`<module>:<attribute>` -> the labels of the channels that the integer counts.

    Where `forward` uses one integer for several unlike rows of channels, those are fixed.
    """
    found: dict[str, Labels] = {}
    for path, layer in module.named_modules():
        if not type(layer).__module__.startswith(LIBRARIES):
            continue
        shapes = SHAPES.get(type(layer).__name__, ())
        for name, value in width_attributes(layer).items():
            base, _, item = name.partition(".")
            if base in shapes:
                rows = _shaped(program, path, base, item)
            elif named_tensors(layer) and isinstance(layer, tuple(REPAIRS)):
                continue
            else:
                rows = _counted(program, layer, path, base, item)
            rows = [row for row in rows if len(row) == value]
            if rows and _alike(program, rows):
                found[f"{path}:{name}"] = rows[0]
            elif base in shapes:
                for row in rows:
                    program.trace.fix(row, f"shares {name}={value} of {path!r} with other channels")
    return found


def counted_child(layer: nn.Module, base: str, item: str) -> tuple[str, int]:
    """The child whose channels an attribute counts, and on which side; "" for none."""
    child, side = CHILDREN.get(f"{type(layer).__name__}.{base}") or CHILDREN.get(base, ("", INTO))
    return child.format(item), side


def _shaped(program: Program, path: str, base: str, item: str) -> list[Labels]:
    """The rows that the attribute may be used for by the shape operators of its module."""
    return [
        constant.labels
        for constant in program.constants
        if constant.path == path
        and (
            constant.place in ("", base)
            or (constant.place.startswith(".") and item in ("", constant.place[1:]))
        )
    ]


def _counted(program: Program, layer: nn.Module, path: str, base: str, item: str) -> list[Labels]:
    """The rows that the attribute may count."""
    if base == "feature_info":
        return _feature(program, layer, path, item)
    if base == "num_features" and hasattr(layer, "forward_features"):
        return _featured(program, path)
    if base == "head_hidden_size" or (base == "inplanes" and hasattr(layer, "get_classifier")):
        return _classified(program, layer, path)
    child, side = counted_child(layer, base, item)
    rows = _flowing(program, _join(path, child), side) if child else []
    if base in INPUTS or (base == "groups" and type(layer).__name__ in DEPTHWISE):
        rows = rows or _flowing(program, path, INTO)
    if base in OUTPUTS:
        rows = rows or _flowing(program, path, OUT_OF)
    return rows


def _flowing(program: Program, path: str, side: int) -> list[Labels]:
    return _channels(program.flows[path][side]) if path in program.flows else []


def _featured(program: Program, path: str) -> list[Labels]:
    """What the last operator called from `forward_features` gives."""
    nodes = [
        node
        for node in program.values
        if "self.forward_features(" in (node.meta.get("stack_trace") or "") and _inside(node, path)
    ]
    return _channels(program.values[nodes[-1]]) if nodes else []


def _classified(program: Program, layer: Any, path: str) -> list[Labels]:
    """What flows into the classifier that a timm network names, or into the first of several."""
    classifier = layer.get_classifier() if hasattr(layer, "get_classifier") else None
    if isinstance(classifier, tuple):
        classifier = classifier[0]
    paths = [_join(path, name) for name, child in layer.named_modules() if child is classifier]
    return _flowing(program, paths[0], INTO) if paths else []


def _feature(program: Program, layer: Any, path: str, item: str) -> list[Labels]:
    """What flows out of the module that an entry of `feature_info` names; joined, if it is a tuple.

    An identity leaves no operator in the program; as the last feature it gives the network's.
    """
    number, _, key = item.partition(".")
    if key != "num_chs":
        return []
    name = layer.feature_info[int(number)]["module"]
    source = _join(path, STAND_INS.get(type(layer).__name__, {}).get(name, name))
    if source not in program.flows and int(number) == len(layer.feature_info) - 1:
        return _featured(program, path)
    joins = (
        value
        for node, value in program.values.items()
        if operator_name(node) == "cat"
        and not _inside(node, source)
        and all(_inside(part, source) for part in node.all_input_nodes)
    )
    joined = next(joins, None)
    return _flowing(program, source, OUT_OF) + ([] if joined is None else _channels(joined))


def _inside(node: fx.Node, path: str) -> bool:
    """Whether the node belongs to a call of the module at `path`."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return path in [at for at, *_ in stack]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _channels(value: Value) -> list[Labels]:
    return [row for row in value.labels if is_channels(row)]


def _alike(program: Program, rows: list[Labels]) -> bool:
    """Whether rows of one length are tied to each other."""
    find = np.vectorize(program.trace.find)
    first = find(rows[0])
    return all((find(row) == first).all() for row in rows[1:])
