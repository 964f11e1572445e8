"""Memory formats: change a network's temporarily, and get correct gradients in each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["UnitStrides", "laid_out"]


@contextmanager
def laid_out(network: nn.Module, layout: torch.memory_format) -> Iterator[None]:
    """Put `network` into a memory format inside the block, and restore its own afterwards."""
    own = {parameter: parameter.data for parameter in network.parameters()}
    network.to(memory_format=layout)  # type: ignore[call-overload]
    try:
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data


class UnitStrides(TorchFunctionMode):
    """Context for every forward pass that has a backward pass: correct gradients on CPUs.

    A narrow convolution with a 1x1 kernel and a stride of s > 1, such as a pruned ResNet's
    shortcut, is computed with a stride of 1 on every s-th pixel: the same function. For such a
    convolution oneDNN computes wrong gradients of the weight, or writes out of bounds, if the
    tensors are float32 and channels-last (one of them is enough, and a 1x1 weight that was ever
    channels-last still is) and the input has fewer channels than a block: 8 with AVX2, 16 with
    AVX-512. The open issue is github.com/uxlfoundation/oneDNN/issues/6035. Wider convolutions are
    correct, and faster unchanged. `scripts/evidence/gradient_grid.py` looks for other such cases.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _CONVOLUTIONS:
            return _convolution(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_BLOCK = 16
"""Input channels per group from which oneDNN is correct with every instruction set."""

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def _convolution(
    convolve: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """`convolve` on these arguments, with a stride of 1 where oneDNN's gradients may be wrong."""
    sides = weight.ndim - 2
    steps = (stride,) if isinstance(stride, int) else tuple(stride)
    unpadded = padding in (0, "valid") or (isinstance(padding, tuple) and not any(padding))
    narrow = input.device.type == "cpu" and weight.shape[1] < _BLOCK
    if narrow and unpadded and max(steps) > 1 == max(weight.shape[2:]):
        every: Any = (slice(None, None, step) for step in steps * (sides // len(steps)))
        input = input[..., *every]
        stride = 1
    return convolve(input, weight, bias, stride, padding, dilation, groups)
