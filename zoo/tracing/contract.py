"""The contract of surgery: a pruned network computes what the masked dense network computes.

The masked dense network is run operator by operator from its traced program, with zeros in every
position that the plan removes. Operators that reduce or convolve over channels (`CHANNEL_WISE`:
layer normalisation, channel means, ...) get the kept channels only, as after surgery; all others
get the full width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_structure

from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan, kept_positions
from zoo.surgery import surgery
from zoo.surgery.masking import masked
from zoo.surgery.surgery import named_tensors
from zoo.tracing.calls import Inputs, arguments, call, leaves, mapped, tensors_of
from zoo.tracing.check import removed_roots
from zoo.tracing.exporting import GRADIENTS
from zoo.tracing.labels import Labels, Value, is_channels
from zoo.tracing.operators import CHANNEL_WISE
from zoo.tracing.program import Program, operator_name

__all__ = ["difference", "masked_forward", "random_tensors", "randomised", "violation"]


def randomised(module: nn.Module, seed: int = 1) -> nn.Module:
    """`module` itself, in float64 and eval mode, with random parameters and buffers."""
    tensors = named_tensors(module)
    with torch.no_grad():
        for name, noise in random_tensors(module, seed).items():
            tensors[name].copy_(noise)
    return module.double().eval()


def random_tensors(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random float32 values for every floating-point parameter and buffer, by name.

    Initial values would hide errors: last scales are zero, layer scales tiny, statistics all equal.
    """
    generator = torch.Generator().manual_seed(seed)
    random = {}
    for name, tensor in named_tensors(module).items():
        if tensor.is_floating_point():
            noise = torch.rand(min(tensor.numel(), PERIOD), generator=generator) - 0.5
            if name.endswith("running_var"):
                noise = noise.abs() + 0.5
            elif tensor.ndim > 1:
                noise *= (12 / tensor[0].numel()) ** 0.5
            times = -(-tensor.numel() // PERIOD)
            random[name] = noise.repeat(times)[: tensor.numel()].view(tensor.shape)
    return random


PERIOD = 1_048_573
"""How many random values large tensors repeat: a prime, so that no two rows are equal.

Drawing all values would take longer than tracing VGG.
"""


def violation(
    module: nn.Module, program: Program, groups: ChannelGroups, plan: Plan, inputs: Inputs
) -> float:
    """The largest relative difference between the pruned and the masked dense network.

    It is relative to each tensor's largest value, over all outputs and the gradients of the
    floating-point inputs and remaining parameters, for a loss that weights all output elements
    differently. It is infinite for outputs of another structure, or if the dense ones are all zero.

    Args:
        module: the dense network, in eval mode.
        program, groups: what `analyse` returned for it.
        plan: any plan for the groups.
        inputs: of the shapes that were traced.
    """
    zeroed = masked(module, groups, plan)
    forward = masked_forward(program, groups, plan, zeroed)
    pruned = surgery.apply(module, groups, plan).eval()
    outputs, given, expected = _differentiated(forward, zeroed, inputs)
    got_outputs, got_given, got = _differentiated(partial(call, pruned), pruned, inputs)
    with torch.no_grad():
        structures = [tree_structure(call(network, inputs)) for network in (zeroed, pruned)]
    same = structures[0] == structures[1] and len(got_outputs) == len(outputs)
    if not same or not any(output.any() for output in outputs):
        return float("inf")
    pairs = zip((*got_outputs, *got_given), (*outputs, *given), strict=True)
    worst = max(difference(mine, theirs) for mine, theirs in pairs)
    kept = kept_positions(groups, plan.kept)
    largest = max((g.abs().max().item() for g in expected.values() if g.numel()), default=0.0)
    for name, gradient in expected.items():
        for dim, index in kept.get(name, {}).items():
            gradient = gradient.index_select(dim, torch.from_numpy(index))
        worst = max(worst, difference(got[name], gradient, 1e-6 * largest))
    return worst


def _differentiated(
    forward: Callable[[Inputs], Any], module: nn.Module, inputs: Inputs
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """The outputs, and the gradients of the inputs and of the parameters of `module`."""

    def fresh(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_(tensor.is_floating_point())

    own = mapped(fresh, inputs)
    outputs = leaves(forward(own))
    loss = sum(_weighted_sum(output) for output in outputs if output.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
    given = [tensor.grad for tensor in tensors_of(own) if tensor.grad is not None]
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return [output.detach() for output in outputs], given, gradients


def _weighted_sum(output: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return (output * weights.view_as(output)).sum()


def difference(got: Tensor, expected: Tensor, smallest: float = 0.0) -> float:
    """The largest absolute difference, relative to the largest value of `expected`.

    The divisor is at least `smallest`. Infinite for another shape, and where `got` is not finite.
    """
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.double(), expected.double()  # positions and masks too
    scale = max(smallest, expected.abs().max().item())
    worst = (got - expected).abs().max().item()
    if scale == 0:
        return 0.0 if worst == 0 else float("inf")
    return worst / scale if np.isfinite(worst) else float("inf")


def masked_forward(
    program: Program, groups: ChannelGroups, plan: Plan, zeroed: nn.Module
) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """A function that runs the dense program with the tensors of `zeroed`, the masked network.

    It returns the output's tensors as `zoo.tracing.calls.leaves` does.
    """
    removed = removed_roots(program, groups, plan)
    find = program.trace.find

    def kept(row: Labels) -> Tensor:
        return torch.tensor(
            [n for n, label in enumerate(row.tolist()) if find(label) not in removed]
        )

    def forward(inputs: Inputs) -> tuple[Tensor, ...]:
        environment: dict[fx.Node, Any] = _inputs(program, zeroed, inputs)
        outputs: Any = ()
        for node in program.exported.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), environment.__getitem__)
                with _gradient_mode(node):
                    if _is_restricted(node, program.values):
                        environment[node] = _restricted(node, args, kwargs, program.values, kept)
                    else:
                        environment[node] = node.target(*args, **kwargs)
            elif node.op == "get_attr":
                environment[node] = getattr(program.exported.graph_module, node.target)
            elif node.op == "output":
                outputs = fx.map_arg(node.args[0], environment.__getitem__)
        return leaves(outputs)

    return forward


def _gradient_mode(node: fx.Node) -> AbstractContextManager[Any]:
    """Switches gradients on or off as the network does for this node."""
    switched = node.meta.get(GRADIENTS)
    return nullcontext() if switched is None else torch.set_grad_enabled(switched)


def _inputs(program: Program, module: nn.Module, inputs: Inputs) -> dict[fx.Node, Any]:
    tensors = named_tensors(module)
    nodes = [node for node in program.exported.graph.nodes if node.op == "placeholder"]
    specs = program.exported.graph_signature.input_specs
    constants = program.exported.constants
    _, named = arguments(module, inputs)
    given = iter(named.values() if named else tensors_of(inputs))
    return {
        node: tensors[spec.target]
        if spec.target in tensors
        else next(given)
        if spec.target is None
        else constants[spec.target]
        for node, spec in zip(nodes, specs, strict=True)
    }


def _is_restricted(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    name = operator_name(node)
    if name not in CHANNEL_WISE:
        return False
    x = values[node.all_input_nodes[0]]
    if name in ("max", "min") and len(node.all_input_nodes) > 1:  # elementwise, of two tensors
        return False
    if name.startswith("conv"):  # may run along channels, as in efficient channel attention
        return any(is_channels(row) for row in x.labels[2:])
    if name == "batch_norm":  # weight standardisation: by the weights' own mean and variance
        return bool(node.args[5])
    return any(is_channels(row) for row in x.labels)


def _restricted(
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[fx.Node, Any],
    kept: Callable[[Labels], Tensor],
) -> Tensor | tuple[Tensor, ...]:
    """The operator's result on the kept channels, with zeros in the removed ones."""

    def select(of: Any, tensor: Any) -> Any:
        if isinstance(of, fx.Node) and isinstance(values[of], Value):
            for dim, row in enumerate(values[of].labels):
                if is_channels(row):
                    tensor = tensor.index_select(dim, kept(row))
        return tensor

    cut = [select(of, arg) for of, arg in zip(node.args, args, strict=True)]
    named = {key: select(node.kwargs[key], value) for key, value in kwargs.items()}
    if operator_name(node) in ("layer_norm", "rms_norm"):
        cut[1] = list(cut[0].shape[-len(cut[1]) :])
    result = node.target(*cut, **named)  # type: ignore[operator]
    if isinstance(result, Tensor):
        return _scattered(result, values[node], kept)
    parts = zip(result, values[node], strict=True)
    return tuple(part if of is None else _scattered(part, of, kept) for part, of in parts)


def _scattered(result: Tensor, value: Value, kept: Callable[[Labels], Tensor]) -> Tensor:
    """`result` scattered to the dense width, with zeros in the removed positions."""
    for dim, row in enumerate(value.labels):
        if is_channels(row):
            shape = (*result.shape[:dim], value.shape[dim], *result.shape[dim + 1 :])
            result = result.new_zeros(shape).index_copy(dim, kept(row), result)
    return result
