"""Training is right for the widths that pruning makes, with any processor's instruction set."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from gradient_grid import Grid, is_wrong, run_grid
from torch import nn
from torch.nn import functional

from zoo.common.strides import UnitStrides

NARROW = Grid(
    isas=("AVX2", "none"),
    precisions=("fp32",),
    widths=(1, 3, 5, 7, 8, 12, 15, 16),
    outputs=(16, 33),
    kernels=(1, 3),
    strides=(2,),
)
OTHERS = Grid(threads=(2,), widths=(1, 3, 6, 11, 19, 40), outputs=(5, 16), kernels=(1, 3, 5, 7))


@pytest.mark.parametrize(
    "grid", [NARROW, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["narrow", "others"]
)
def test_outputs_and_gradients_of_a_step_are_those_of_float64(grid: Grid) -> None:
    rows = list(run_grid(grid))
    assert {row[0].isa for row in rows} == set(grid.isas)
    assert len(rows) > 200
    assert [row for row in rows if is_wrong(row[0], row[2])] == []


@pytest.mark.parametrize("padding", [0, 1, "valid", (0, 0), (0, 1)])
@pytest.mark.parametrize("stride", [1, 2, (3, 1), (2,)])
@pytest.mark.parametrize("kernel", [1, (1, 3), 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_function_stays_the_same(padding, stride, kernel, groups) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 8, 9, 7, dtype=torch.float64, requires_grad=True)
    layer = nn.Conv2d(8, 12, kernel, groups=groups).double()
    kept = {"stride": stride, "padding": padding, "groups": groups}
    found = []
    for mode in (nullcontext(), UnitStrides()):
        with mode:
            out = functional.conv2d(images, layer.weight, layer.bias, **kept)
        wanted = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        found.append((out, *torch.autograd.grad(out, [images, *layer.parameters()], wanted)))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
