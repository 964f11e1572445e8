"""Forward hooks: those that only observe a network are left out of its traces and trials.

They may print, count or read numbers, which fake tensors do not have. Those that take part in what
the network computes stay.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.common.quiet import quiet
from zoo.common.seeding import seeded
from zoo.surgery.surgery import named_tensors, resized
from zoo.tracing.calls import Inputs, call, leaves, mapped, tensors_of
from zoo.tracing.contract import random_tensors
from zoo.tracing.refusals import check_prunable

__all__ = ["has_hooks", "without_observers"]

Hooks = MutableMapping[int, Callable[..., Any]]


def has_hooks(module: nn.Module) -> bool:
    """Whether a layer has a forward hook or a forward pre-hook."""
    return any(_hooks(module))


def without_observers(module: nn.Module, inputs: Inputs) -> nn.Module:
    """`module`, or a copy on the same storage without the hooks that only observe.

    A hook observes if it returns nothing, and if without all such hooks the network, with random
    weights, computes the same: on other inputs, so that what hooks kept from the first ones shows.

    Raises:
        GraphError: if `module` cannot be pruned or copied.
    """
    if not has_hooks(module):
        return module
    check_prunable(module)  # functions that hold a layer cannot be told from the copy
    observing = _observing(module, inputs)
    if not observing:
        return module
    bare = resized(module, named_tensors(module))
    _remove(bare, observing)
    return bare


def _hooks(module: nn.Module) -> list[Hooks]:
    """The hooks of every layer before and after its forward, by the number of their handle."""
    pairs = ((layer._forward_pre_hooks, layer._forward_hooks) for layer in module.modules())
    return [hooks for pair in pairs for hooks in pair]


def _remove(module: nn.Module, places: set[tuple[int, int]]) -> None:
    hooks = _hooks(module)
    for at, number in places:
        hooks[at].pop(number, None)


def _observing(module: nn.Module, inputs: Inputs) -> set[tuple[int, int]]:
    """Where the hooks that only observe are, in `_hooks`."""
    if not any(tensor.is_floating_point() for tensor in tensors_of(inputs)):
        return set()
    noise = random_tensors(module, seed=1)
    tensors = {
        name: noise[name].to(tensor) if name in noise else tensor.detach().clone()
        for name, tensor in named_tensors(module).items()
    }
    probe = resized(module, tensors).eval()
    places: set[tuple[int, int]] = set()
    changing: set[tuple[int, int]] = set()
    for at, hooks in enumerate(_hooks(probe)):
        for number, hook in hooks.items():
            places.add((at, number))
            hooks[number] = _noted(hook, (at, number), changing)
    others = mapped(_shifted, inputs)
    try:
        _outputs(probe, inputs)
        silent = places - changing
        if not silent:
            return set()
        whole = [dict(hooks) for hooks in _hooks(probe)]
        _remove(probe, silent)
        without = _outputs(probe, others)
        for hooks, before in zip(_hooks(probe), whole, strict=True):
            hooks.clear()
            hooks.update(before)
        expected = _outputs(probe, others)
        same = len(without) == len(expected) and all(map(torch.equal, without, expected))
        return silent if same and any(bool(output.any()) for output in expected) else set()
    except Exception:  # whatever the network or a hook raises
        return set()


def _noted(
    hook: Callable[..., Any], place: tuple[int, int], changing: set[tuple[int, int]]
) -> Callable[..., Any]:
    """`hook`, which adds `place` to `changing` when it returns something."""

    def noted(*args: Any, **named: Any) -> Any:
        result = hook(*args, **named)
        if result is not None:
            changing.add(place)
        return result

    return noted


def _shifted(tensor: Tensor) -> Tensor:
    """Other values of the same shape, if they are floating-point."""
    if not tensor.is_floating_point():
        return tensor
    ramp = torch.linspace(-1, 1, tensor.numel(), device=tensor.device)
    return tensor + ramp.view(tensor.shape).to(tensor.dtype)


def _outputs(network: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    with quiet(), seeded(0), torch.no_grad():
        return leaves(call(network, mapped(torch.clone, inputs)))
