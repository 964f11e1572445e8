"""Tracing of networks in eval mode by `torch.export`, as programs of ATen operators.

`check_prunable` refuses networks that surgery can never cut (wrappers, computed weights, ...).
"""

from __future__ import annotations

import contextlib
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from zoo.common.quiet import quiet
from zoo.errors import GraphError, ZooError, first_line
from zoo.surgery.surgery import evaluating
from zoo.tracing.calls import Inputs, arguments, batch_of, call, checked_inputs, described, leaves

__all__ = ["GRADIENTS", "check_prunable", "checked_classes", "export", "export_module"]

GRADIENTS = "gradients"
"""Key in a node's `meta`: whether gradients are on, if the network switches them there."""

_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def export(module: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """The ATen program of `module` in eval mode, with its outputs flattened by `leaves`.

    Raises:
        GraphError: if it cannot be traced, with torch's reason and the failing line of the
            module's code.
    """
    with _flat_outputs(module):
        exported = _exported(module, inputs)
    _inline_regions(exported.graph_module)
    return exported


def export_module(module: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """The ATen program of `module` in eval mode as a module, for any batch size from two.

    Raises:
        GraphError: as `export`, and for outputs other than tuples, lists and dicts of tensors.
    """
    args, kwargs = arguments(module, inputs)
    count = batch_of(inputs)

    def batched(value: Any) -> Any:
        own = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
        return {0: torch.export.Dim.AUTO} if own else None

    given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    exported = _exported(module, inputs, dynamic_shapes=tree_map(batched, given))
    with quiet():
        return exported.module()


def _exported(module: nn.Module, inputs: Inputs, **options: Any) -> torch.export.ExportedProgram:
    args, kwargs = arguments(module, inputs)
    try:
        with evaluating(module), quiet():
            return torch.export.export(module, args, kwargs, **options)
    except Exception as error:
        raise GraphError(
            f"torch.export cannot trace {type(module).__name__}: {first_line(error)}"
            f"{_failing_line(error)}"
        ) from error


@contextlib.contextmanager
def _flat_outputs(module: nn.Module) -> Iterator[None]:
    """Inside, `module` returns a flat tuple of tensors: torch.export knows no dataclasses."""
    hook = module.register_forward_hook(lambda _module, _inputs, output: leaves(output))
    try:
        yield
    finally:
        hook.remove()


def _failing_line(error: BaseException) -> str:
    """File, number and text of the last line of user code before `error`; "" if unknown."""
    others = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    standard = sysconfig.get_path("stdlib")
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(others)
        and ("site-packages" in frame.filename or not frame.filename.startswith(standard))
    ]
    return f" ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""


def _inline_regions(program: fx.GraphModule) -> None:
    """Inline the subgraphs that run with autocast or gradients switched, and mark their nodes."""
    for region in list(program.graph.nodes):
        if getattr(region.target, "__name__", "") not in _REGIONS:
            continue
        at = next(n for n, a in enumerate(region.args) if getattr(a, "op", "") == "get_attr")
        inner = getattr(program, region.args[at].target)
        _inline_regions(inner)
        given = [node for node in inner.graph.nodes if node.op == "placeholder"]
        copies = dict(zip(given, region.args[at + 1 :], strict=True))
        with program.graph.inserting_before(region):
            results: Any = program.graph.graph_copy(inner.graph, copies)
        if region.target.__name__ == "wrap_with_set_grad_enabled":
            for node in copies.keys() - set(given):
                copies[node].meta = {GRADIENTS: region.args[0], **copies[node].meta}
        for part in list(region.users):  # a region returns a tuple
            part.replace_all_uses_with(results[part.args[1]])
            program.graph.erase_node(part)
        program.graph.erase_node(region)


def check_prunable(module: nn.Module) -> None:
    """Refuse networks that are not plain modules with parameters of their own.

    Raises:
        GraphError: naming the module, and what to prune instead.
    """
    for path, layer in module.named_modules():
        for applies, reason in _REFUSED:
            if applies(layer):
                name = f"The {type(layer).__name__} {path!r}" if path else type(layer).__name__
                raise GraphError(f"{name} {reason}.")


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
        lambda layer: "quantized" in type(layer).__module__,
        "is quantised: prune the floating-point network, then quantise that",
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


def checked_classes(module: nn.Module, example_input: Inputs) -> int:
    """The number of classes of a live network, after a check that it runs on these inputs.

    0 if its output is not a single tensor of logits (N, classes, ...).
    """
    if not isinstance(module, nn.Module):
        raise ZooError(
            f"Expected a network (an nn.Module), got {type(module).__name__}; zoo.load takes "
            f"checkpoints."
        )
    kind = type(module).__name__
    check_prunable(module)
    inputs = checked_inputs(example_input)
    try:
        with evaluating(module), torch.no_grad():
            output = call(module, inputs)
    except Exception as error:  # whatever the network raises
        reason = first_line(error)
        flat = isinstance(inputs, Tensor) and inputs.ndim == 3
        advice = " (Pass one image as a batch of one: x[None].)" if flat else ""
        raise GraphError(
            f"{kind} does not run on the example input of shape {described(inputs)}: {reason}"
            f"{advice}"
        ) from error
    if not leaves(output):
        raise GraphError(f"{kind} returns {type(output).__name__}, which contains no tensors.")
    return output.shape[1] if isinstance(output, Tensor) and output.ndim > 1 else 0
