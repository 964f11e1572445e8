"""Forward hooks: those that observe are left out of traces and trials, the others take part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from odd import IMAGES, Net, conv, net
from torch import Tensor, nn

import zoo
from zoo.errors import GraphError
from zoo.tracing.contract import randomised, violation
from zoo.tracing.graph import analyse
from zoo.tracing.hooks import without_observers

Hook = Callable[..., object]


def hooks_of(module: nn.Module) -> int:
    return sum(len(n._forward_hooks) + len(n._forward_pre_hooks) for n in module.modules())


def returning_nothing(act: Callable[[Tensor], object]) -> Hook:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        act(inputs[0] if output is None else output)

    return hook


OBSERVERS: dict[str, Callable[[list[object]], Hook]] = {
    "a number": lambda seen: lambda _m, _i, output: seen.append(output.mean().item()),
    "an array": lambda seen: lambda _m, _i, output: seen.append(output.numpy()),
    "a branch": lambda seen: lambda _m, _i, output: seen.append(1) if output.sum() > 0 else None,
    "the tensor": lambda seen: lambda _m, _i, output: seen.append(output),
    "a digest": lambda seen: lambda _m, _i, output: seen.append(hash(str(output.tolist()))),
}
"""What a hook does with an output; it returns nothing."""


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("name", OBSERVERS)
def test_hooks_that_observe_see_tensors_alone(name: str, rewrite: bool) -> None:
    seen: list[object] = []
    module = net()
    module.a.register_forward_hook(OBSERVERS[name](seen))
    pruned = zoo.prune(module, IMAGES, cf=1.5, rewrite=rewrite)
    assert pruned.pruning.plan.got == zoo.prune(net(), IMAGES, cf=1.5).pruning.plan.got
    assert all(type(item) is Tensor for item in seen if isinstance(item, Tensor))
    assert hooks_of(module) == 1
    assert hooks_of(pruned) == (0 if rewrite else 1)


def test_the_hooks_of_the_pruned_network_see_its_channels() -> None:
    shapes: list[torch.Size] = []
    module = net()
    module.a.register_forward_hook(lambda _m, _i, output: shapes.append(output.shape))
    pruned = zoo.prune(module, IMAGES, cf=1.5)
    shapes.clear()
    pruned(IMAGES)
    assert [shape[1] for shape in shapes] == [pruned.a.out_channels]


def doubled(module: nn.Module, _: list[object]) -> None:
    module.a.register_forward_hook(lambda _m, _i, output: output * 2)


def doubled_before(module: nn.Module, _: list[object]) -> None:
    module.b.register_forward_pre_hook(lambda _m, given: (given[0] * 2,))


def doubled_in_place(module: nn.Module, _: list[object]) -> None:
    module.a.register_forward_hook(returning_nothing(lambda output: output.mul_(2)))


def carried(module: nn.Module, kept: list[object]) -> None:
    """What the first layer gives is added by the last one's hook."""
    module.a.register_forward_hook(lambda _m, _i, output: kept.append(output.mean()))
    module.head.register_forward_hook(lambda _m, _i, output: output + kept[-1])


ACTIVE: dict[str, tuple[Callable[[nn.Module, list[object]], None], int]] = {
    "returns another output": (doubled, 1),
    "returns another input": (doubled_before, 1),
    "writes into the output": (doubled_in_place, 1),
    "keeps a number for another hook": (carried, 2),
}
"""Hooks that take part in what a network computes, and how many they are."""


@pytest.mark.parametrize("name", ACTIVE)
def test_hooks_that_take_part_stay(name: str) -> None:
    register, count = ACTIVE[name]
    module = randomised(net())
    register(module, [])
    images = IMAGES.double()
    assert hooks_of(without_observers(module, images)) == count


def test_those_that_observe_are_told_from_those_beside_them() -> None:
    module = randomised(net())
    doubled(module, [])
    module.a.register_forward_hook(returning_nothing(lambda output: output.mean().item()))
    module.b.register_forward_pre_hook(returning_nothing(lambda given: given.mean().item()))
    module.b.register_forward_hook(lambda _m, _i, output: output + 1)
    images = IMAGES.double()
    bare = without_observers(module, images)
    assert [hooks_of(layer) for layer in (bare.a, bare.b, bare)] == [1, 1, 2]
    assert hooks_of(module) == 4
    assert torch.equal(bare(images), module(images))
    assert bare.a.weight.data_ptr() == module.a.weight.data_ptr()
    program, groups = analyse(module, images)
    plan = zoo.prune(module, images, cf=1.5).pruning.plan
    assert violation(module, program, groups, plan, images) <= 1e-9


def test_a_network_whose_forward_reads_what_a_hook_keeps_keeps_the_hook() -> None:
    kept: dict[str, Tensor] = {}

    def run(n: nn.Module, x: Tensor) -> Tensor:
        y = n.b(n.a(x).relu()).relu()
        return n.head((y + kept["a"]).mean((2, 3)))

    module = Net(run, a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 4))
    module.a.register_forward_hook(lambda _m, _i, output: kept.update(a=output))
    assert without_observers(module, IMAGES) is module
    pruned = zoo.prune(module, IMAGES, cf=1.5)
    assert pruned.a.out_channels == pruned.b.out_channels < 8


def test_a_hook_that_no_pruned_network_can_have_is_blamed() -> None:
    module, mean = net(), torch.zeros(8)
    module.a.register_forward_hook(returning_nothing(lambda o: mean.add_(o.mean((0, 2, 3)))))
    with pytest.raises(GraphError, match="If a hook does that, remove it first"):
        zoo.prune(module, IMAGES, cf=1.5)
