"""Small networks out of parts and a function, and what each of them must stand when it is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import zoo
from zoo.models import parameter_count
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import Profile, Reference
from zoo.tracing.calls import Inputs, call, leaves, mapped
from zoo.tracing.contract import randomised, violation
from zoo.tracing.graph import analyse

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

Build = Callable[[], nn.Module]


class Net(nn.Module):
    """Parts, and a function from them and the images to the output."""

    def __init__(self, run: Callable[..., object], **parts: object) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> object:
        return self.run(self, *inputs)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape))


def net(
    middle: Callable[[nn.Module, Tensor], Tensor] = lambda _, x: x, out: int = 8, **parts: object
) -> Net:
    """Convolution `a` of 8 channels, `middle`, convolution `b` of 8, mean, dense `head`."""

    def run(n: nn.Module, x: Tensor) -> Tensor:
        return n.head(n.b(middle(n, n.a(x)).relu()).mean((2, 3)))

    return Net(run, a=conv(3, 8), b=conv(out, 8), head=nn.Linear(8, 4), **parts)


def attention(weights: bool = False) -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        rows = n.b(n.a(x).relu()).flatten(2).transpose(1, 2)
        rows = rows + n.mix(rows, rows, rows, need_weights=weights)[0]
        return n.head(n.up(rows).relu().mean(1))

    mix = nn.MultiheadAttention(8, 2, batch_first=True)
    parts = {"b": conv(6, 8), "up": nn.Linear(8, 12), "head": nn.Linear(12, 4)}
    return Net(run, a=conv(3, 6), mix=mix, **parts)


def halves(groups: ChannelGroups) -> Profile:
    """Half of every group, verbatim."""
    kept = {group.name: max(1, group.size // 2) for group in groups.groups}
    ratios = dict.fromkeys(kept, 0.5)
    return Profile("live", "params", 2.0, 2.0, Reference(4, 8), ratios, kept)


def double(inputs: Inputs) -> Inputs:
    return mapped(lambda t: t.double() if t.is_floating_point() else t, inputs)


def cut(build: Build, folder: Path, x: Inputs = IMAGES) -> nn.Module:
    """The network, pruned by half: it keeps the contract, can be trained, saved and reloaded."""
    x = double(x)
    module = randomised(build())
    program, groups = analyse(module, x)
    pruned = zoo.prune(module, x, profile=halves(groups))
    assert violation(module, program, groups, pruned.pruning.plan, x) < 1e-9
    assert parameter_count(pruned) == pruned.pruning.plan.pruned.params
    assert pruned.pruning.plan.pruned.params < pruned.pruning.plan.dense.params
    zoo.save(pruned, folder / "pruned")
    again = zoo.load_pruned(folder / "pruned", skeleton=build())
    pairs = zip(leaves(call(again, x)), leaves(call(pruned, x)), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    outputs = leaves(call(pruned.train(), x))
    sum(output.sum() for output in outputs if output.requires_grad).backward()
    assert all(p.grad is not None for p in pruned.parameters() if p.requires_grad)
    return pruned.eval()
