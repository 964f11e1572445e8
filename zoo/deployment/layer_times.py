"""Times of single layers, and of whole networks, in ONNX Runtime: the clock of a `Runtime`.

A layer is a file of its own: the convolution with a bias and a ReLU or ReLU6, because batch norm
and these are fused into it in an exported file. On the CPU its time is what ONNX Runtime's profiler
says of its operators, without those that change the layout of a tensor: in a whole network these
are at its ends alone. Other providers work asynchronously; there one layer's time is what each of
several equal and independent ones adds to a call.

What else runs on the machine only makes calls slower, so the fastest quarter of them counts. A call
on one thread of the CPU is also timed by what the thread computed, which others hardly disturb.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.common.documents import encode
from zoo.deployment.files import write_files
from zoo.deployment.options import Runtime
from zoo.deployment.padding import BLOCK
from zoo.deployment.parity import cpu_copy, items
from zoo.deployment.program import convert, in_precision, input_names
from zoo.deployment.providers import CPU, GPUS, SHORT, onnxruntime_module, open_session
from zoo.errors import ZooError, unknown
from zoo.planning.latency import device_name, remembered
from zoo.planning.layer_calls import LayerCall
from zoo.spec.cost import Conditions
from zoo.spec.groups import ChannelGroups
from zoo.tracing.calls import Inputs, mapped, tensors_of

__all__ = ["RuntimeClock"]

COPIES = 8
"""Equal layers in one file, where the profiler does not tell a layer's time."""

REORDERING = ("ReorderInput", "ReorderOutput", "Transpose")
"""Operators that change a layout."""

WARMUP, REPEATS, SECONDS = 2, 30, 0.05
"""Calls of a layer: at most so many, and after five no longer than that."""

NETWORK_REPEATS, NETWORK_SECONDS = 30, 20.0
"""Calls of whole networks."""

STEPS = (32, 16, 8, 4)
"""Steps that are looked for."""

FULL = 64
TRIED = (FULL // 2, 34, 36, 38, *range(40, FULL, 4), FULL - 2, FULL)
"""Channels of the convolution that steps are looked for in."""

SAME, LESS = 0.93, 0.97
"""Shares of a time: at least the first counts as no faster, at most the second as faster."""


class RuntimeClock:
    """The clock of a `Runtime`, for `zoo.planning.latency.latency_table`.

    Attributes:
        shares: keep ratios at which whole networks are timed.

    Raises:
        ZooError: for a precision that the provider has no use for.
        ExportError: for a provider that is unknown or cannot be used here.
    """

    shares: tuple[float, ...] = (0.5, 0.25)

    def __init__(self, runtime: Runtime) -> None:
        if not isinstance(runtime, Runtime):
            raise ZooError(f"runtime must be a zoo.Runtime, got {type(runtime).__name__}.")
        self.runtime = runtime
        self.provider = SHORT.get(runtime.provider, runtime.provider)
        if "ExecutionProvider" not in self.provider:
            raise unknown("ONNX Runtime provider", runtime.provider, SHORT)
        if self.provider == CPU and runtime.precision == "fp16":
            raise ZooError(
                "Latency in fp16 is measured on a GPU: on CPUs ONNX Runtime computes fp16 files in "
                "fp32. Ask for precision='fp32'."
            )
        self._one_thread = self.provider == CPU and runtime.threads == 1
        self._now = time.thread_time if self._one_thread else time.perf_counter
        self._wall(_probe(1, 1, 1), 1)  # a provider that is not there shows at once

    @cached_property
    def step(self) -> int:
        """The multiple of channels that is worth keeping: layers between two take no less time.

        It is a multiple of the one that exported files are padded to.
        """
        of = {"tried": TRIED, "steps": STEPS, **encode(self._conditions(1), terse=True)}
        (found,) = remembered(of, lambda: [float(self._measured_step())])
        return math.lcm(int(found), BLOCK)

    def conditions(self, groups: ChannelGroups) -> Conditions:
        """What the times of a network with these groups depend on."""
        own = self._conditions(self.step)
        return replace(own, image_size=groups.image_size, inputs=groups.inputs)

    def _conditions(self, step: int) -> Conditions:
        return Conditions(
            device=device_name(torch.device("cuda" if self.provider in GPUS else "cpu")),
            torch=torch.__version__,
            threads=self.runtime.threads or os.cpu_count() or 1,
            dtype={"fp32": "float32", "fp16": "float16"}[self.runtime.precision],
            batch=self.runtime.batch,
            image_size=0,
            runtime=f"ONNX Runtime {onnxruntime_module().__version__}",
            provider=self.provider,
            step=step,
        )

    def layers(self, calls: Sequence[LayerCall]) -> list[float]:
        """Milliseconds of each call, one after the other."""
        return [self._layer(call) for call in calls]

    def networks(self, networks: Sequence[nn.Module], inputs: Inputs) -> list[float]:
        """Milliseconds of one call of each network's file, which take turns."""
        inputs = mapped(lambda t: t.to("cpu", copy=True), inputs)
        inputs = mapped(lambda t: t.float() if t.is_floating_point() else t, inputs)
        arrays = [tensor.numpy() for tensor in tensors_of(inputs)]
        feeds = dict(zip(input_names(inputs), arrays, strict=True))
        with tempfile.TemporaryDirectory() as scratch:
            runs = []
            for number, network in enumerate(networks):
                path = Path(scratch, f"{number}.onnx")
                program = convert(cpu_copy(network), items(inputs, slice(1)), False)
                file = in_precision(program, self.runtime.precision, False, inputs)
                write_files(file, path.parent, path)
                runs.append(self._runner(path, feeds))
            taken = _by_turns(runs, self._now, NETWORK_REPEATS, NETWORK_SECONDS)
        return [_fastest(own) for own in taken]

    # --- one layer --------------------------------------------------------------------------------

    def _layer(self, call: LayerCall) -> float:
        if self.provider == CPU:
            return self._profiled(call)
        one, several = (self._wall(call, copies) for copies in (1, 1 + COPIES))
        return max(0.0, several - one) / COPIES

    def _profiled(self, call: LayerCall) -> float:
        """Milliseconds of the layer's own operators, by the profiler."""
        with tempfile.TemporaryDirectory() as scratch:
            path, feeds = self._written(call, 1, Path(scratch))
            session = open_session(
                path, [CPU], self.runtime.threads, False, profile=Path(scratch, "profile")
            )
            (calls,) = _by_turns([lambda: session.run(None, feeds)], self._now)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _layer_time(events, calls if self._one_thread else None)

    def _wall(self, call: LayerCall, copies: int) -> float:
        """Milliseconds of a call of a file with several such layers."""
        with tempfile.TemporaryDirectory() as scratch:
            run = self._runner(*self._written(call, copies, Path(scratch)))
            return _fastest(_by_turns([run], self._now)[0])

    def _written(self, call: LayerCall, copies: int, folder: Path) -> tuple[Path, dict[str, Any]]:
        """The file of the layers, and its inputs."""
        kind = np.float16 if self.runtime.precision == "fp16" else np.float32
        path = folder / "layer.onnx"
        path.write_bytes(_model(call, copies, kind))
        images = np.full(_images(call), 0.5, kind)
        return path, {f"images_{number}": images for number in range(copies)}

    def _runner(self, path: Path, feeds: dict[str, Any]) -> Callable[[], object]:
        """A function that runs the file; on a GPU its inputs and outputs stay there."""
        session = open_session(path, [self.provider], self.runtime.threads, False)
        if self.provider not in GPUS:
            return lambda: session.run(None, feeds)
        device = torch.cuda.current_device()
        binding = session.io_binding()
        for name, array in feeds.items():
            given = onnxruntime_module().OrtValue.ortvalue_from_numpy(array, "cuda", device)
            binding.bind_ortvalue_input(name, given)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cuda", device)
        return lambda: session.run_with_iobinding(binding)

    # --- steps ------------------------------------------------------------------------------------

    def _measured_step(self) -> int:
        """The largest of `STEPS` that both dimensions' times have; 1 if they have none."""
        batch = self.runtime.batch
        outputs = {n: self._layer(_probe(n, FULL, batch)) for n in TRIED}
        inputs = {n: self._layer(_probe(FULL, n, batch)) for n in TRIED}
        found = (
            next((step for step in STEPS if _steps(times, step)), 1) for times in (outputs, inputs)
        )
        return max(found)


def _steps(times: dict[int, float], step: int) -> bool:
    """Whether widths between multiples of `step` are no faster, and one step fewer is."""
    inside = all(ms >= SAME * times[-(-width // step) * step] for width, ms in times.items())
    return inside and times[FULL - step] <= LESS * times[FULL]


def _probe(outputs: int, inputs: int, batch: int) -> LayerCall:
    options = ((1, 1), (1, 1), (1, 1))
    return LayerCall("", (outputs, inputs, 3, 3), (batch, inputs, 16, 16), options, normalised=True)


def _layer_time(events: Iterable[Any], computed: Sequence[float] | None) -> float:
    """Milliseconds of a layer's own operators in a profile.

    `computed` are what one thread computed in every call. Of these, the layer has the share that it
    has in the profile, whose times others on the machine can prolong.
    """
    own: dict[str, list[float]] = defaultdict(list)
    layout: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times = layout if event["args"]["op_name"] in REORDERING else own
            times[event["name"]].append(event["dur"] / 1000)  # from microseconds
    layer, beside = (sum(_fastest(taken[WARMUP:]) for taken in by.values()) for by in (own, layout))
    if computed is None or not layer:
        return layer
    return min(layer, _fastest(computed) * layer / (layer + beside))


def _by_turns(
    runs: Sequence[Callable[[], object]],
    now: Callable[[], float],
    repeats: int = REPEATS,
    seconds: float = SECONDS,
) -> list[list[float]]:
    """Milliseconds of every call of each function; at least five after the warm-up."""
    times: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    for turn in range(WARMUP + repeats):
        if turn >= WARMUP + 5 and time.perf_counter() - started > seconds:
            break
        for run, taken in zip(runs, times, strict=True):
            before = now()
            run()
            taken.append((now() - before) * 1e3)
    return [taken[WARMUP:] for taken in times]


def _fastest(times: Iterable[float]) -> float:
    """The mean of the fastest quarter."""
    ordered = sorted(times)
    return float(np.mean(ordered[: max(2, len(ordered) // 4)]))


# --- the file of a layer --------------------------------------------------------------------------


def _images(call: LayerCall) -> tuple[int, ...]:
    """The shape of the layer's input; a dense layer's has two dimensions."""
    if len(call.shape) > 2:
        return call.images
    return math.prod(call.images[:-1]), call.images[-1]


def _model(call: LayerCall, copies: int, kind: Any) -> bytes:
    """An ONNX model of equal layers, each with an input of its own."""
    from onnx import helper, numpy_helper

    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    bounds = (("zero", 0), ("six", 6)) if call.capped else ()
    weights = [numpy_helper.from_array(np.array(bound, kind), name) for name, bound in bounds]
    nodes, inputs, outputs = [], [], []
    for number in range(copies):
        images, weight, bias, sums, result = (
            f"{name}_{number}" for name in ("images", "weight", "bias", "sums", "result")
        )
        weights.append(numpy_helper.from_array(np.full(call.shape, 0.01, kind), weight))
        weights.append(numpy_helper.from_array(np.zeros(call.shape[0], kind), bias))
        last = sums if call.normalised else result
        if len(call.shape) == 2:
            nodes.append(helper.make_node("Gemm", [images, weight, bias], [last], transB=1))
        else:
            options = _options(call)
            nodes.append(helper.make_node("Conv", [images, weight, bias], [last], **options))
        if call.capped:
            nodes.append(helper.make_node("Clip", [sums, "zero", "six"], [result]))
        elif call.normalised:
            nodes.append(helper.make_node("Relu", [sums], [result]))
        inputs.append(helper.make_tensor_value_info(images, element, _images(call)))
        outputs.append(helper.make_tensor_value_info(result, element, None))
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    opset = [helper.make_opsetid("", 18)]
    model: bytes = helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
    return model


def _options(call: LayerCall) -> dict[str, Any]:
    """A convolution's attributes in ONNX."""
    stride, padding, dilation = call.options
    before = [0] * len(stride)
    after = list(before)
    if padding == "same":
        total = [d * (size - 1) for d, size in zip(dilation, call.shape[2:], strict=True)]
        before = [length // 2 for length in total]
        after = [length - low for length, low in zip(total, before, strict=True)]
    elif padding != "valid":
        before = after = list(padding)
    return {
        "kernel_shape": list(call.shape[2:]),
        "strides": list(stride),
        "pads": [*before, *after],
        "dilations": list(dilation),
        "group": call.groups,
    }
