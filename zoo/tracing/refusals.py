"""Networks that surgery can never cut: wrappers, computed weights, functions over layers, ..."""

from __future__ import annotations

import dis
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from zoo.errors import GraphError
from zoo.surgery.surgery import named_tensors

__all__ = ["check_prunable"]


def check_prunable(module: nn.Module) -> None:
    """Refuse networks that are not plain modules with parameters of their own.

    Raises:
        GraphError: naming the module, and what to prune instead.
    """
    for path, layer in module.named_modules():
        name = f"The {type(layer).__name__} {path!r}" if path else type(layer).__name__
        for applies, reason in _REFUSED:
            if applies(layer):
                raise GraphError(f"{name} {reason}.")
        for attribute, value in vars(layer).items():
            if attribute not in _COPIED and _is_shared(value, module):
                raise GraphError(
                    f"{name} has a function, its {attribute!r}, that refers to layers or weights "
                    f"of the network: a pruned copy would compute with those of the original. Take "
                    f"them from self, and bind it by types.MethodType."
                )


def _is_from(layer: nn.Module, places: tuple[str, ...]) -> bool:
    """Whether the layer's class, or one that it derives from, is defined in these places."""
    return any(kind.__module__.startswith(places) for kind in type(layer).__mro__)


_PREPARED = (
    "torch.ao.nn.qat",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.quantization.fake_quantize",
    "torch.ao.quantization.observer",
)
"""Where layers are defined that torch puts into a network to train or calibrate it for int8."""


_FLOAT = (torch.ao.nn.quantized.FloatFunctional,)
"""Layers of the package for quantised ones that compute with floating-point numbers."""


def _is_computed(layer: nn.Module) -> bool:
    """Whether torch computes a parameter of the layer from others before each call."""
    computing: list[Any] = list(layer._forward_pre_hooks.values())
    if parametrize.is_parametrized(layer):
        for steps in layer.parametrizations.values():  # type: ignore[union-attr, operator]
            computing += steps
    return any(type(step).__module__.startswith("torch.nn.utils.") for step in computing)


_REFUSED: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (
        lambda layer: isinstance(getattr(layer, "_orig_mod", None), nn.Module),
        "is compiled: prune the network inside (its _orig_mod), then compile that",
    ),
    (
        lambda layer: isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel),
        "is a wrapper: prune the network inside (its module), then wrap that",
    ),
    (
        lambda layer: isinstance(layer, torch.jit.ScriptModule),
        "is TorchScript: prune the network that it was made from",
    ),
    (
        lambda layer: _is_from(layer, ("torch.export.",)),
        "is a program of torch.export: prune the network that it was made from",
    ),
    (
        lambda layer: "quantized" in type(layer).__module__ and not isinstance(layer, _FLOAT),
        "is quantised: prune the floating-point network, then quantise that",
    ),
    (
        lambda layer: _is_from(layer, _PREPARED),
        "is prepared for quantisation: prune the floating-point network, then prepare that",
    ),
    (
        lambda layer: isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params(),
        "has no parameters yet: run the network once",
    ),
    (
        _is_computed,
        "computes its weight from other tensors (weight_norm, spectral_norm or a pruning mask): "
        "make it permanent first, with torch.nn.utils.parametrize.remove_parametrizations, "
        "remove_weight_norm, remove_spectral_norm or prune.remove",
    ),
)
"""A test for modules that cannot be pruned, and the end of the error message."""


# --- functions ------------------------------------------------------------------------------------

_COPIED = {*vars(nn.Module()), "_compiled_call_impl"}
"""Attributes without functions of the user's own; hooks may refer to any layer, to observe it."""


def _is_shared(value: Any, module: nn.Module) -> bool:
    """Whether `value` has functions that hold parts of `module`, which copies share with it."""
    if value is None or isinstance(value, int | float | str):  # most are, in hundreds of layers
        return False
    held = [item for item in _held(value) if isinstance(item, nn.Module | Tensor)]
    if not held:
        return False
    own = set(module.modules()) | set(named_tensors(module).values())
    return any(
        not own.isdisjoint(item.modules()) if isinstance(item, nn.Module) else item in own
        for item in held
    )


def _held(value: Any) -> Iterator[Any]:
    """All that plain functions in `value` hold; copy.deepcopy copies methods and partials."""
    waiting, seen = [(value, False)], set()
    for item, inside in waiting:
        parts: Iterable[Any] = ()
        if isinstance(item, types.FunctionType):
            parts = _parts(item)
        elif isinstance(item, types.MethodType):
            parts = (item.__func__, item.__self__)
        elif isinstance(item, functools.partial):
            parts = (item.func, *item.args, *item.keywords.values())
        elif isinstance(item, list | tuple | dict | set | deque):
            parts = item.values() if isinstance(item, dict) else item
        elif inside:
            yield item
        if (id(item), inside) not in seen:
            seen.add((id(item), inside))
            within = inside or isinstance(item, types.FunctionType)
            waiting += [(part, within) for part in parts]


def _parts(function: types.FunctionType) -> Iterator[Any]:
    """What a function refers to: defaults, closure, globals; functions of its own file alone."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from (cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY)
    space = function.__globals__
    for name in _global_names(function.__code__):
        value = space.get(name)
        if not isinstance(value, types.FunctionType) or value.__globals__ is space:
            yield value


_EMPTY = types.CellType()
"""A cell of a closure whose variable has no value yet."""


@functools.cache
def _global_names(code: types.CodeType) -> frozenset[str]:
    """The global names that a function's code, and functions within it, refer to."""
    own = {i.argval for i in dis.get_instructions(code) if "GLOBAL" in i.opname}
    inner = (_global_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return frozenset(own.union(*inner))
