"""Integer attributes of modules that repeat a width which no tensor of the module shows.

Only classes of torch, timm, torchvision and the zoo are searched, because what an integer of a
user's class means cannot be known. An integer counts channels if it equals the length of one of its
rows (labels of one dimension):

- `SHAPES` (per class): `forward` slices, splits or pads by it. Its rows are those of the module's
  shape operators.
- `INPUTS`, `OUTPUTS`, `DEPTHWISE`, `CHILDREN` (by attribute name): the module was constructed with
  it and may be rebuilt from it. Its rows flow in or out of the module or a child.
- `num_features`, `head_hidden_size`, `feature_info`: timm's feature extraction and
  `reset_classifier` read it. Its rows leave `forward_features` or the named modules, or enter the
  classifier.

An integer that equals none of its rows, or two that are not tied, is not changed; nor are records
of the dense configuration (`stage1_cfg`, `base_width`, `planes`, `cardinality`, ...). Layers with
tensors are left to `zoo.surgery.surgery.REPAIRS`. The check under fake tensors has the last word.
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
"""Classes that are rebuilt from `groups`: it counts their input channels, if it equals them."""

INTO, OUT_OF = 0, 1
"""Indices of input and output in an item of `Program.flows`."""

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
"""`<class>.<attribute>`, or the attribute of any class -> the child whose channels it counts, and
whether at its input or output. `{}` stands for the index of an item, if the attribute is a list."""

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
"""Class name -> module named in `feature_info` -> the module whose output that feature is."""


def attribute_labels(module: nn.Module, program: Program) -> dict[str, Labels]:
    """`<module>:<attribute>` -> the labels of the channels that the integer counts.

    Where `forward` uses one integer for several rows that are not tied, these rows are fixed.
    """
    found: dict[str, Labels] = {}
    for path, layer in module.named_modules():
        if not type(layer).__module__.startswith(LIBRARIES):
            continue
        shapes = SHAPES.get(type(layer).__name__, ())
        for name, value in width_attributes(layer).items():
            base, _, item = name.partition(".")
            if base in shapes:
                rows = _rows_of_shape_operators(program, path, base, item)
            elif named_tensors(layer) and isinstance(layer, tuple(REPAIRS)):
                continue
            else:
                rows = _rows_that_may_be_counted(program, layer, path, base, item)
            rows = [row for row in rows if len(row) == value]
            if rows and _are_tied(program, rows):
                found[f"{path}:{name}"] = rows[0]
            elif base in shapes:
                for row in rows:
                    program.trace.fix(row, f"shares {name}={value} of {path!r} with other channels")
    return found


def counted_child(layer: nn.Module, base: str, item: str) -> tuple[str, int]:
    """The child whose channels an attribute counts ("" for none), and `INTO` or `OUT_OF`."""
    child, side = CHILDREN.get(f"{type(layer).__name__}.{base}") or CHILDREN.get(base, ("", INTO))
    return child.format(item), side


def _rows_of_shape_operators(program: Program, path: str, base: str, item: str) -> list[Labels]:
    """The rows that shape operators of the module may slice, split or pad by the attribute."""
    return [
        constant.labels
        for constant in program.constants
        if constant.path == path
        and (
            constant.place in ("", base)
            or (constant.place.startswith(".") and item in ("", constant.place[1:]))
        )
    ]


def _rows_that_may_be_counted(
    program: Program, layer: nn.Module, path: str, base: str, item: str
) -> list[Labels]:
    """The rows that the attribute may count."""
    if base == "feature_info":
        return _rows_of_feature_info(program, layer, path, item)
    if base == "num_features" and hasattr(layer, "forward_features"):
        return _rows_of_features(program, path)
    if base == "head_hidden_size" or (base == "inplanes" and hasattr(layer, "get_classifier")):
        return _rows_into_classifier(program, layer, path)
    child, side = counted_child(layer, base, item)
    rows = _flowing(program, _join(path, child), side) if child else []
    if base in INPUTS or (base == "groups" and type(layer).__name__ in DEPTHWISE):
        rows = rows or _flowing(program, path, INTO)
    if base in OUTPUTS:
        rows = rows or _flowing(program, path, OUT_OF)
    return rows


def _flowing(program: Program, path: str, side: int) -> list[Labels]:
    return _channels(program.flows[path][side]) if path in program.flows else []


def _rows_of_features(program: Program, path: str) -> list[Labels]:
    """The rows of the last operator that `forward_features` calls."""
    nodes = [
        node
        for node in program.values
        if "self.forward_features(" in (node.meta.get("stack_trace") or "") and _inside(node, path)
    ]
    return _channels(program.values[nodes[-1]]) if nodes else []


def _rows_into_classifier(program: Program, layer: Any, path: str) -> list[Labels]:
    """The rows that enter the classifier of a timm network, or the first of several."""
    classifier = layer.get_classifier() if hasattr(layer, "get_classifier") else None
    if isinstance(classifier, tuple):
        classifier = classifier[0]
    paths = [_join(path, name) for name, child in layer.named_modules() if child is classifier]
    return _flowing(program, paths[0], INTO) if paths else []


def _rows_of_feature_info(program: Program, layer: Any, path: str, item: str) -> list[Labels]:
    """The rows that leave the module named by an entry of `feature_info`.

    If that module returns a tuple, its concatenation counts too. An identity leaves no operator in
    the program; if it is the last feature, the output of `forward_features` is taken.
    """
    number, _, key = item.partition(".")
    if key != "num_chs":
        return []
    name = layer.feature_info[int(number)]["module"]
    source = _join(path, STAND_INS.get(type(layer).__name__, {}).get(name, name))
    if source not in program.flows and int(number) == len(layer.feature_info) - 1:
        return _rows_of_features(program, path)
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


def _are_tied(program: Program, rows: list[Labels]) -> bool:
    """Whether rows of one length are tied to each other."""
    find = np.vectorize(program.trace.find)
    first = find(rows[0])
    return all((find(row) == first).all() for row in rows[1:])
