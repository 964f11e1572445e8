"""Convert a module to an ONNX model in fp32; ONNX Runtime's converters make other precisions."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.common.quiet import quiet
from zoo.deployment.parity import items
from zoo.errors import ExportError, first_line
from zoo.tracing.calls import Inputs, batch_of, call, leaves, mapped, named_leaves, tensors_of
from zoo.tracing.exporting import own_attributes

__all__ = ["PRECISIONS", "convert", "in_precision", "input_names"]

PRECISIONS = ("fp32", "fp16", "int8", "int8-symmetric")
"""The last is for TensorRT, whose int8 has no zero points; on CPUs it is the slower one."""

CALIBRATION_BATCH = 32


def convert(network: nn.Module, item: Inputs, dynamic_size: bool) -> Any:
    """The ONNX program of `network`, with a dynamic batch.

    A lone tensor is called `pixel_values` as input and `logits` as output, as other tools do it.
    Other inputs have the keys of their dict as names, or `input_0` and so on; other outputs have
    their places in the structure. An output with the name of an input, as `image`, is `image_out`;
    of several with one name, as `a_b` of {"a": {"b": ...}, "a_b": ...}, the second is `a_b_2`.

    Args:
        network: in eval mode, on the CPU.
        item: a batch of one of its inputs.
        dynamic_size: take other heights and widths as well.

    Raises:
        ExportError: if an operator has no ONNX counterpart, or `dynamic_size` is asked for and the
            network depends on the size.
    """
    pair = mapped(lambda t: torch.cat([t, t]) if t.ndim and len(t) == 1 else t, item)
    batched = [t.ndim > 0 and len(t) == 1 for t in tensors_of(item)]
    names: list[dict[int, str]] = [{0: "batch"} if own else {} for own in batched]
    batch = torch.export.Dim("batch")
    dims: list[dict[int, Any]] = [{0: batch} if own else {} for own in batched]
    if dynamic_size:
        names[0] |= {2: "height", 3: "width"}
        dims[0] |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    try:
        with quiet(), torch.no_grad(), own_attributes(network):
            found = [name for name, _ in named_leaves(call(network, item))]
            traced = torch.export.export(
                _Flat(network, pair), tensors_of(pair), dynamic_shapes=(tuple(dims),)
            )
            program = torch.onnx.export(
                traced,
                dynamo=True,
                verbose=False,
                input_names=input_names(item),
                output_names=_output_names(found, input_names(item)),
                dynamic_shapes=(tuple(names),),
            )
    except Exception as error:  # tracing runs the user's module
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise ExportError(f"The module cannot be converted to ONNX: {first_line(root)}") from error
    assert program is not None
    shape: Any = program.model.graph.inputs[0].shape
    if dynamic_size and any(isinstance(side, int) for side in shape[2:]):
        raise ExportError(
            f"The module takes only images of {tuple(shape[2:])}: something in it, as a flattened "
            f"map, depends on the size. Export without dynamic_size."
        )
    return program


def input_names(inputs: Inputs) -> list[str]:
    """The names of a file's inputs."""
    if isinstance(inputs, Mapping):
        return list(inputs)
    several = isinstance(inputs, tuple) and len(inputs) > 1
    return [f"input_{n}" for n in range(len(inputs))] if several else ["pixel_values"]


def _output_names(found: list[str], inputs: list[str]) -> list[str]:
    """`found`, with names that are inputs' or earlier outputs' changed: ONNX takes each once."""
    names: list[str] = []
    for name in found:
        own = f"{name}_out" if name in inputs else name
        taken = {*inputs, *names, *(found if own != name or name in names else ())}
        tries = chain((own,), (f"{own}_{n}" for n in count(2)))
        names.append(next(each for each in tries if each not in taken))
    return names


class _Flat(nn.Module):
    """A network that takes its input tensors as positional arguments and returns a flat tuple."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.network = network
        self.names = list(inputs) if isinstance(inputs, Mapping) else None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = tensors if self.names is None else dict(zip(self.names, tensors, strict=True))
        return leaves(call(self.network, given))


def in_precision(program: Any, precision: str, half_inputs: bool, calibration: Inputs) -> Any:
    """The program's model in `precision`, without the source paths that the exporter records.

    Args:
        program: as `convert` makes it.
        precision: one of `PRECISIONS`.
        half_inputs: make images and logits fp16 too; for fp16 only.
        calibration: inputs whose activations set the ranges of int8.

    Raises:
        ExportError: if the converter refuses the program.
    """
    from onnxscript import ir

    if half_inputs and precision != "fp16":
        raise ExportError(f"half_inputs are for fp16 files, not {precision}.")
    model = program.model
    if precision != "fp32":
        proto = ir.to_proto(model)
        try:
            with quiet():
                if precision == "fp16":
                    proto = _to_fp16(proto, half_inputs)
                else:
                    proto = _to_int8(proto, calibration, precision == "int8-symmetric")
            model = ir.from_proto(proto)
        except Exception as error:  # the converters' errors share no other base class
            raise ExportError(
                f"The program cannot be converted to {precision}: {first_line(error)}"
            ) from error
    tidy = ir.passes.common
    for step in (tidy.ClearMetadataAndDocStringPass, tidy.TopologicalSortPass,
                 tidy.RemoveUnusedOpsetsPass):  # fmt: skip
        step()(model)
    return model


def _to_fp16(model: Any, half_inputs: bool) -> Any:
    """The ModelProto `model` with fp16 weights and arithmetic; images and logits if `half_inputs`.

    Weights beyond the range of fp16 are clipped. On the CPU, ONNX Runtime computes fp16 operators
    in fp32, so only a GPU shows the error of fp16 arithmetic.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    _separate_scales(model.graph)
    half = convert_float_to_float16(model, keep_io_types=not half_inputs)
    for parts in (half.graph.node, half.graph.value_info):
        # a value that several operators take in fp32 is cast once for each, under one name
        once = dict.fromkeys(part.SerializeToString() for part in parts)
        kept = [type(parts[0]).FromString(data) for data in once]
        del parts[:]
        parts.extend(kept)
    return half


def _separate_scales(graph: Any) -> None:
    """Give each Resize of `graph` scales of its own, so that the converter leaves them in fp32.

    It rounds scales that an fp16 operator takes too, and those of which `value_info` has a type.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    for number, node in enumerate(graph.node):
        scales = node.input[2] if node.op_type == "Resize" and len(node.input) > 2 else ""
        if scales in constants and uses[scales] > 1:
            uses[scales] -= 1
            own = graph.initializer.add()
            own.CopyFrom(constants[scales])
            node.input[2] = own.name = f"{scales}_of_node_{number}"
    computed = [value for value in graph.value_info if value.name not in constants]
    del graph.value_info[:]
    graph.value_info.extend(computed)


def _to_int8(model: Any, inputs: Inputs, symmetric: bool) -> Any:
    """The ModelProto `model` statically quantised: weights per channel, activations per tensor.

    Weights take 7 bits. An x86 CPU without VNNI adds two 8-bit products in 16 bits and saturates:
    there, files with 8-bit weights compute something else than on other CPUs
    (onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "reduce_range").

    Args:
        model: in fp32.
        inputs: inputs of the model, whose activations set the ranges.
        symmetric: signed activations around zero and biases in fp32, as TensorRT needs. Otherwise
            activations are unsigned with a zero point, several times faster on x86 CPUs.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    taken = {given.name for given in model.graph.input}
    starts = iter(range(0, batch_of(inputs), CALIBRATION_BATCH))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            start = next(starts, None)
            if start is None:
                return None
            part = items(inputs, slice(start, start + CALIBRATION_BATCH))
            arrays = (tensor.numpy() for tensor in tensors_of(part))
            named = zip(input_names(part), arrays, strict=True)
            return {name: array for name, array in named if name in taken}

    with tempfile.TemporaryDirectory() as scratch:
        source, prepared, quantised = (Path(scratch, f"{step}.onnx") for step in range(3))
        onnx.save_model(model, source)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            Reader(),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            extra_options={
                "ActivationSymmetric": symmetric,
                "WeightSymmetric": True,
                "QuantizeBias": not symmetric,  # to int32, which TensorRT does not take
            },
        )
        return onnx.load(quantised)
