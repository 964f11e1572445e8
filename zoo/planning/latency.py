"""The latency of a network on the current device: its layers, each timed at several widths.

A convolution is timed with the batch norm on its outputs and a ReLU, or alone if it has no batch
norm; a dense layer is timed alone. The whole network is timed too, dense and at half of every
width. All layer times are multiplied by one factor, and one constant is added, so that their sum
agrees with both. Every time is a median and is measured once: the user's cache folder, if it can be
written, keeps it under a key of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from zoo.common.documents import decode, encode, read_json, write_json
from zoo.data.datasets import cache_folder
from zoo.errors import DocumentError, ZooError, first_line
from zoo.spec.cost import Conditions, Extent, LatencyTable, LayerTimes, cost_model, extents
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import make_plan
from zoo.surgery.surgery import apply, evaluating
from zoo.tracing.calls import Inputs, call, described, example_for, tensors_of

__all__ = ["device_name", "latency_table", "milliseconds"]

GRID = (0.125, 0.25, 0.5, 0.75, 1.0)
"""The shares of a layer's outputs, and of its inputs, at which it is timed."""

BATCH = {"cpu": 1, "cuda": 64}
"""Images per forward pass, by kind of device; 1 on any other."""

WARMUP, REPEATS = 3, 11


def latency_table(module: nn.Module, groups: ChannelGroups) -> LatencyTable:
    """The layer times of `module`, in milliseconds, on its device and in eval mode.

    Layers are the convolutions and dense layers that `groups` counts MACs of. A layer never counts
    as slower than a wider one: its time is the minimum of its own and theirs.

    Raises:
        ZooError: if the network has no such layer, or does not run on inputs like those that
            `groups` were made with.
    """
    first = next(module.parameters())
    conditions = Conditions(
        device=device_name(first.device),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        dtype=str(first.dtype).removeprefix("torch."),
        batch=BATCH.get(first.device.type, 1),
        image_size=groups.image_size,
        inputs=groups.inputs,
    )
    # a layer's input size is part of its call, so networks share the times of equal layers
    own = ("image_size", "inputs")
    where = {key: value for key, value in asdict(conditions).items() if key not in own}
    ones = example_for(module, groups.image_size, groups.inputs, torch.ones, conditions.batch)
    calls = _calls(module, groups, ones)
    if not calls:
        raise ZooError(
            f"Latency is measured on convolutions and dense layers, of which "
            f"{type(module).__name__} calls none with channels to prune; use params or macs."
        )
    lengths, layers = extents(groups), []
    for made in calls:
        outputs = _grid(lengths[made.weight][0], made.shape[0], made.unit)
        inputs = _grid(lengths[made.weight][1], made.shape[1], 1)
        cells = [made.resized(o, i) for o in outputs for i in inputs]
        layer = {key: value for key, value in asdict(made).items() if key != "weight"}
        times = _remembered(
            {"layer": layer, "outputs": outputs, "inputs": inputs, **where},
            partial(_measured, cells, first),
        )
        layers.append(LayerTimes(made.weight, outputs, inputs, _rising(times, len(inputs))))

    table = LatencyTable(conditions, tuple(layers), 0.0)
    return _calibrated(table, module, groups, ones)


def _calibrated(
    table: LatencyTable, module: nn.Module, groups: ChannelGroups, inputs: Inputs
) -> LatencyTable:
    """`table` scaled to give the whole network's measured times, dense and at half its widths."""
    halves = {group.name: max(1, group.size // 2) for group in groups.groups}

    def measure() -> list[float]:
        scores = [[0.0] * size for size in groups.sizes]
        plan = make_plan(
            groups, halves, scores, profile="", metric="params", asked=1, criterion="", seed=0
        )
        small = apply(module, groups, plan)
        with evaluating(module):
            networks = [partial(call, module, inputs), partial(call, small.eval(), inputs)]
            return milliseconds(networks, tensors_of(inputs)[0].device, 5 * REPEATS)

    network = hashlib.sha256((repr(module) + repr(groups.shapes)).encode()).hexdigest()
    where = encode(table.conditions, terse=True)
    dense, half = _remembered({"network": network, **where}, measure)
    model = cost_model(groups, table)
    layers = [model.total(w, "latency") for w in (groups.sizes, tuple(halves.values()))]
    slope = (dense - half) / (layers[0] - layers[1]) if layers[0] > layers[1] else 0.0
    slope = min(max(slope, 0.0), dense / layers[0])
    scaled = tuple(
        replace(layer, ms=tuple(tuple(slope * ms for ms in row) for row in layer.ms))
        for layer in table.layers
    )
    return replace(table, layers=scaled, rest=dense - slope * layers[0])


def _measured(calls: Sequence[_Call], like: Tensor) -> list[float]:
    """Milliseconds of each call, one at a time: all tensors together could fill the memory."""
    return [milliseconds([call.runner(like)], like.device)[0] for call in calls]


def milliseconds(
    runs: Sequence[Callable[[], object]], device: torch.device, repeats: int = REPEATS
) -> list[float]:
    """The median wall time of each function on `device`, in turns, after a warm-up."""
    times: list[list[float]] = [[] for _ in runs]
    with torch.inference_mode():
        for _ in range(WARMUP + repeats):
            for run, taken in zip(runs, times, strict=True):
                started = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken.append((time.perf_counter() - started) * 1e3)
    return [statistics.median(taken[WARMUP:]) for taken in times]


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its weight's name and shape, and the shape of its input.

    `options` are a convolution's stride, padding and dilation; a dense layer has none.
    """

    weight: str
    shape: tuple[int, ...]
    images: tuple[int, ...]
    options: tuple[Any, ...] = ()
    groups: int = 1
    normalised: bool = False

    @property
    def depthwise(self) -> bool:
        """Whether removing an input removes a group, rather than an input of every group."""
        return self.groups > 1 and self.shape[1] == 1

    @property
    def unit(self) -> int:
        """Any number of outputs must be a multiple of this."""
        return self.shape[0] // self.groups if self.depthwise else self.groups

    def resized(self, outputs: int, inputs: int) -> _Call:
        """The same call with other lengths of its weight's first two dimensions."""
        shape = (outputs, inputs, *self.shape[2:])
        if len(shape) == 2:
            return replace(self, shape=shape, images=(*self.images[:-1], inputs))
        groups = outputs // self.unit if self.depthwise else self.groups
        images = (self.images[0], inputs * groups, *self.images[2:])
        return replace(self, shape=shape, images=images, groups=groups)

    def runner(self, like: Tensor) -> Callable[[], Tensor]:
        """A function that makes the call, with tensors like `like`."""
        images, weight = like.new_ones(self.images), like.new_ones(self.shape)
        if len(self.shape) == 2:
            return lambda: F.linear(images, weight)
        stride, padding, dilation = self.options
        name = f"conv{len(self.shape) - 2}d"

        def convolve() -> Tensor:
            return getattr(F, name)(images, weight, None, stride, padding, dilation, self.groups)

        if not self.normalised:
            return convolve
        one = like.new_ones(self.shape[0])
        return lambda: F.relu(F.batch_norm(convolve(), one, one, one, one))


def _calls(module: nn.Module, groups: ChannelGroups, inputs: Inputs) -> list[_Call]:
    """The calls of the layers in one forward pass, in order."""
    calls: list[_Call] = []
    outputs: dict[int, tuple[int, Tensor]] = {}  # the tensors are kept, so that no id is reused

    def record(weight: str, layer: Any, given: tuple[Tensor], output: Tensor) -> None:
        made = _Call(weight, tuple(layer.weight.shape), tuple(given[0].shape))
        if isinstance(layer, _ConvNd):
            options = (layer.stride, layer.padding, layer.dilation)
            made = replace(made, options=options, groups=layer.groups)
        outputs[id(output)] = len(calls), output
        calls.append(made)

    def mark(_: nn.Module, given: tuple[Tensor]) -> None:
        if id(given[0]) in outputs:
            index = outputs[id(given[0])][0]
            calls[index] = replace(calls[index], normalised=True)

    hooks = []
    for name, layer in module.named_modules():
        weight = f"{name}.weight".removeprefix(".")
        timed = isinstance(layer, (_ConvNd, nn.Linear)) and not isinstance(layer, _ConvTransposeNd)
        if timed and weight in groups.positions:
            hooks.append(layer.register_forward_hook(partial(record, weight)))
        elif isinstance(layer, _BatchNorm):
            hooks.append(layer.register_forward_pre_hook(mark))
    try:
        with evaluating(module), torch.inference_mode():
            call(module, inputs)
    except Exception as error:  # whatever the network raises
        reason = first_line(error)
        raise ZooError(
            f"Latency is measured on inputs of shape {described(inputs)}, which "
            f"{type(module).__name__} does not run on: {reason}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _grid(extent: Extent, length: int, unit: int) -> tuple[int, ...]:
    """The lengths of a dimension to time: only its own if no group owns part of it."""
    if not extent.per:
        return (length,)
    return tuple(sorted({max(1, round(share * length / unit)) * unit for share in GRID}))


def _rising(times: Sequence[float], columns: int) -> tuple[tuple[float, ...], ...]:
    """`times` in rows of `columns`, each lowered to the minimum of those below and to the right."""
    rows = [list(times[at : at + columns]) for at in range(0, len(times), columns)]
    for row in rows:
        for column in reversed(range(columns - 1)):
            row[column] = min(row[column], row[column + 1])
    for row, wider in zip(reversed(rows[:-1]), reversed(rows[1:]), strict=True):
        row[:] = map(min, row, wider)
    return tuple(map(tuple, rows))


def _remembered(of: dict[str, Any], measure: Callable[[], list[float]]) -> tuple[float, ...]:
    """The cached result of `measure` for the key `of`; measured if no intact file has it."""
    key = json.dumps(of, sort_keys=True)
    path = cache_folder() / "latency" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    try:
        return decode(_Remembered, read_json(path), str(path)).ms
    except DocumentError:
        times = measure()
        with suppress(OSError):
            write_json(path, _Remembered(of, tuple(times)))
        return tuple(times)


@dataclass(frozen=True)
class _Remembered:
    of: dict[str, Any]
    ms: tuple[float, ...]


def device_name(device: torch.device) -> str:
    """The model name of the processor or graphics card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
