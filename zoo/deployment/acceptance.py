"""Accept or refuse a written ONNX file: compare its outputs with those of its network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from zoo.deployment.options import ExportOptions
from zoo.deployment.parity import (
    TOLERANCES,
    Comparison,
    Outputs,
    by_batches,
    compare_outputs,
    items,
    outputs_of,
)
from zoo.deployment.program import input_names
from zoo.deployment.providers import CPU, open_session
from zoo.deployment.samples import Sample
from zoo.errors import ExportError, first_line
from zoo.tracing.calls import Inputs, batch_of, mapped, tensors_of

__all__ = ["check_file"]

HALF_IMAGES = 4


def check_file(
    file: Path,
    network: nn.Module,
    reference: Outputs,
    sample: Sample,
    precision: str,
    options: ExportOptions,
) -> Comparison:
    """Compare the written `file` with its `network` in ONNX Runtime on the CPU.

    An fp16 file's network is also run in fp16, and one with `dynamic_size` at twice the size.

    Raises:
        ExportError: if they differ by more than the tolerance.
    """
    tolerance = TOLERANCES[precision.partition("-")[0]]
    if options.min_agreement is not None:
        tolerance = replace(tolerance, agreement=options.min_agreement)
    run = _runner(file)
    got = by_batches(run, sample.inputs)
    result = compare_outputs(reference, got, tolerance.tie, sample.labels)
    if not tolerance.allows(result):
        raise ExportError(
            f"{result} on {batch_of(sample.inputs)} images ({sample.origin}); allowed are "
            f"{tolerance}. {file.name} was not written."
        )
    if precision == "fp16":
        some = items(sample.inputs, slice(HALF_IMAGES))
        other = compare_outputs(
            outputs_of(network, some), _half_outputs(network, some), tolerance.tie
        )
        # where no agreement is asked, as for a benchmark, the values may vanish, but not overflow
        if tolerance.agreement > 0 and not tolerance.allows(other):
            raise ExportError(
                f"With all of its arithmetic in fp16 the module's outputs change: {other}; "
                f"allowed are {tolerance}."
            )
    if options.dynamic_size:
        larger = mapped(
            lambda images: nn.functional.interpolate(images[:4], scale_factor=2.0), sample.inputs
        )
        try:
            other = compare_outputs(
                outputs_of(network, larger), by_batches(run, larger), tolerance.tie
            )
        except ExportError as error:
            raise ExportError(f"{error} Export without dynamic_size.") from error
        # top classes are not compared: the network may never have seen images of this size
        if not other.relative_difference <= tolerance.difference:
            sides = tuple(tensors_of(larger)[0].shape[2:])
            raise ExportError(f"{other} on images of {sides}. Export without dynamic_size.")
    return result


def _runner(file: Path) -> Callable[[Inputs], Outputs]:
    """A function that runs `file` in ONNX Runtime on the CPU, on inputs as the network takes them.

    The function raises an ExportError if ONNX Runtime fails.
    """
    session = open_session(file, [CPU], None, False)
    halves = {given.name: given.type == "tensor(float16)" for given in session.get_inputs()}

    def run(inputs: Inputs) -> Outputs:
        named = zip(input_names(inputs), tensors_of(inputs), strict=True)
        arrays = {
            name: (tensor.half() if halves[name] else tensor).numpy()
            for name, tensor in named
            if name in halves
        }
        try:
            return tuple(torch.from_numpy(array) for array in session.run(None, arrays))
        except Exception as error:  # its errors share no other base class
            reason = first_line(error)
            raise ExportError(f"ONNX Runtime failed on {file.name}: {reason}") from error

    return run


def _half_outputs(network: nn.Module, inputs: Inputs) -> Outputs:
    """The outputs of the network with all arithmetic in fp16, as on a GPU.

    On the CPU, ONNX Runtime computes a file's fp16 operators in fp32, which does not overflow.
    """
    half, halved = mapped(_half, inputs), copy.deepcopy(network).half()
    try:
        return outputs_of(halved, half)
    except ExportError:
        pass  # it may hold tensors that are no buffers, or make fp32 ones
    try:
        with _AllHalf():
            return outputs_of(halved, half)
    except ExportError as error:
        raise ExportError(f"The module cannot compute in fp16. {error}") from error


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


class _AllHalf(TorchDispatchMode):
    """Gives every operator fp16 in place of other floating-point numbers."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        return func(*tree_map_only(Tensor, _half, args), **tree_map_only(Tensor, _half, kwargs))
