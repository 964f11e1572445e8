"""MACs of operators that no rule counts, and which operators work once for every item of a batch.

Convolutions and matrix products count, elementwise operators do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["is_per_item", "macs_of", "macs_of_call"]

COPIES = {"expand", "expand_as", "repeat", "tile", "repeat_interleave"}
"""Operators that make a tensor for every item of the batch from one for all."""
KNOWN = {"aten", "prims", "prim", "torchvision"}
"""Namespaces of operators that have no MACs unless they are counted here."""


def macs_of(node: fx.Node) -> int | None:
    """MACs of a node of a traced program for the whole batch; None if they cannot be told."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    inputs: Any = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), inputs
    )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        return 0  # it makes a tensor from numbers
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    formula = FORMULAS.get(target.overloadpacket.__name__)
    try:
        macs = macs_of_call(target, *args, **kwargs) if formula is None else formula(*args)
    except Exception:  # an operator that does not run without numbers, as `nonzero`
        macs = 0
    return macs if macs or target.namespace in KNOWN else None


def macs_of_call(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """MACs of all convolutions and matrix products in a call with tensors on the meta device."""
    with torch.no_grad(), _Counter() as counter:
        operator(*args, **kwargs)
    return counter.flops // 2


class _Counter(TorchDispatchMode):
    """Adds the FLOPs of torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and name not in FORMULAS:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        elif name in FORMULAS:
            self.flops += 2 * FORMULAS[name](*args)
        return result


# --- what torch does not count --------------------------------------------------------------------


def _recurrent(x: Tensor, *rest: Any) -> int:
    """RNN, GRU, LSTM: at every step of every item, each matrix is applied once."""
    weights = [part for part in rest if isinstance(part, list | tuple)][-1]
    return x.shape[:-1].numel() * sum(t.numel() for t in weights if t.ndim == 2)


def _deformable(x: Tensor, weight: Tensor, offset: Tensor, *rest: Any) -> int:
    """The offsets (N, ..., height, width) have the size of the output."""
    del x, rest
    return weight.numel() * len(offset) * offset.shape[-2:].numel()


def _bilinear(x: Tensor, y: Tensor, weight: Tensor, *rest: Any) -> int:
    del y, rest
    return x.shape[:-1].numel() * weight.numel()


def _along_time(x: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> int:
    """`conv_tbc`: (time, batch, channels) by (kernel, inputs, outputs)."""
    del bias
    return weight.numel() * x.shape[1] * (len(x) + 2 * pad - len(weight) + 1)


FORMULAS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("rnn_tanh", "rnn_relu", "gru", "lstm"), _recurrent),
    "mkldnn_rnn_layer": lambda x, *weights: _recurrent(x, weights[:2]),
    "deform_conv2d": _deformable,
    "bilinear": _bilinear,
    "conv_tbc": _along_time,
    "addbmm": lambda _, x, y, **__: x.numel() * y.shape[-1],
    "addmv": lambda _, matrix, *__: matrix.numel(),
    "mv": lambda matrix, *_: matrix.numel(),
    "dot": lambda x, *_: x.numel(),
}
"""Operator -> its MACs from its arguments."""


# --- per item, or once ----------------------------------------------------------------------------


def is_per_item(node: fx.Node, batch: int, per_item: set[fx.Node]) -> bool:
    """Whether what an operator computes grows with the batch: it depends on an image, or on copies
    of a constant, one for each.

    Args:
        node: the operator.
        batch: images in the traced batch.
        per_item: the earlier nodes of which this holds.
    """
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    inputs = [] if name.startswith("new_") else node.all_input_nodes
    if any(source in per_item for source in inputs):
        return True
    value = node.meta.get("val")
    if batch == 1 or not isinstance(value, Tensor):
        return False
    if not inputs:  # zeros(batch, ...)
        return value.ndim > 1 and batch in value.shape
    if name not in COPIES:
        return False
    old = inputs[0].meta["val"]
    if value.ndim < old.ndim:  # repeat_interleave without a dimension
        return value.numel() == batch * old.numel()
    sizes = (1,) * (value.ndim - old.ndim) + tuple(old.shape)
    return any(new == batch * size for new, size in zip(value.shape, sizes, strict=True))
