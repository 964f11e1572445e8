"""Tracing of networks in eval mode by `torch.export`, as programs of ATen operators."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
import sysconfig
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from zoo.common.quiet import quiet
from zoo.errors import GraphError, ZooError, first_line
from zoo.surgery.surgery import evaluating, is_record
from zoo.tracing.calls import Inputs, arguments, batch_of, call, checked_inputs, described, leaves
from zoo.tracing.refusals import check_prunable

__all__ = ["GRADIENTS", "checked_classes", "export", "export_module", "own_attributes"]

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
        with evaluating(module), quiet(), own_attributes(module):
            return torch.export.export(module, args, kwargs, **options)
    except Exception as error:
        raise GraphError(
            f"torch.export cannot trace {type(module).__name__}: {first_line(error)}"
            f"{_failing_line(error)}"
        ) from error


@contextlib.contextmanager
def own_attributes(module: nn.Module) -> Iterator[None]:
    """Afterwards the layers have the attributes that they had: torch.export leaves copies of them.

    Their lists, dicts and sets hold again what they held; attributes set meanwhile are gone.
    """
    standard = vars(nn.Module()).keys()
    before = {
        layer: {name: value for name, value in vars(layer).items() if name not in standard}
        for layer in module.modules()
    }
    contents = _contents(before.values())
    try:
        yield
    finally:
        for layer, own in before.items():
            for name in vars(layer).keys() - standard - own.keys():
                del vars(layer)[name]
            vars(layer).update(own)
        for held, items in contents:
            now = _items(held)
            if len(now) == len(items) and all(map(operator.is_, now, items)):
                continue
            held.clear()
            if isinstance(held, dict):
                held.update(zip(items[::2], items[1::2], strict=True))
            else:
                (held.update if isinstance(held, set) else held.extend)(items)


def _contents(values: Iterable[Any]) -> list[tuple[Any, list[Any]]]:
    """All lists, dicts and sets in nested containers and records, each with its `_items`."""
    found: dict[int, tuple[Any, list[Any]]] = {}
    waiting = list(values)
    for value in waiting:
        if isinstance(value, list | dict | set | deque) and id(value) not in found:
            found[id(value)] = value, _items(value)
            waiting += found[id(value)][1]
        elif isinstance(value, tuple):
            waiting += value
        elif is_record(value):
            waiting.append(vars(value))
    return list(found.values())


def _items(held: Any) -> list[Any]:
    """The items of a container; of a dict, each key with its value after it."""
    pairs = itertools.chain.from_iterable(held.items()) if isinstance(held, dict) else held
    return list(pairs)


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
