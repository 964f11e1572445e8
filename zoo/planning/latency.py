"""The latency of a network: its layers, each timed at several widths by a clock.

The clock is PyTorch's on the network's device, or one that is handed down, as that of ONNX Runtime
in `zoo.deployment.layer_times`. PyTorch's times a convolution with the batch norm on its outputs
and a ReLU, or alone if it has no batch norm; a dense layer is timed alone. The whole network is
timed too, dense and at a part of every width. All layer times are multiplied by one factor, and one
constant is added, so that their sum agrees with that. PyTorch's times are medians. Every time is
measured once: the user's cache folder, if it can be written, keeps it under a key of all that it
depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo.common.cache import cache_folder
from zoo.common.documents import decode, encode, read_json, write_json
from zoo.errors import DocumentError, ZooError
from zoo.planning.layer_calls import LayerCall, layer_calls
from zoo.planning.solver import Limits, round_widths
from zoo.spec.cost import Conditions, Extent, LatencyTable, LayerTimes, cost_model, extents
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import make_plan
from zoo.surgery.surgery import apply, evaluating
from zoo.tracing.calls import Inputs, call, example_for

__all__ = ["Clock", "device_name", "latency_table", "milliseconds", "remembered"]

GRID = (0.125, 0.25, 0.5, 0.75, 1.0)
"""The shares of a layer's outputs, and of its inputs, at which it is timed."""

BATCH = {"cpu": 1, "cuda": 64}
"""Images per forward pass, by kind of device; 1 on any other."""

WARMUP, REPEATS = 3, 11


class Clock(Protocol):
    """What times layers and networks; `shares` are the keep ratios at which whole networks are."""

    shares: tuple[float, ...]

    @property
    def step(self) -> int:
        """Layers whose widths are between two multiples of it take as long as the wider one."""

    def conditions(self, groups: ChannelGroups) -> Conditions:
        """What its times depend on."""

    def layers(self, calls: Sequence[LayerCall]) -> list[float]:
        """Milliseconds of each call."""

    def networks(self, networks: Sequence[nn.Module], inputs: Inputs) -> list[float]:
        """Milliseconds of one forward pass of each network, measured by turns."""


class _TorchClock:
    """PyTorch on the device of a tensor."""

    shares: tuple[float, ...] = (0.5,)
    step = 1

    def __init__(self, like: Tensor) -> None:
        self.like = like

    def conditions(self, groups: ChannelGroups) -> Conditions:
        return Conditions(
            device=device_name(self.like.device),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            dtype=str(self.like.dtype).removeprefix("torch."),
            batch=BATCH.get(self.like.device.type, 1),
            image_size=groups.image_size,
            inputs=groups.inputs,
        )

    def layers(self, calls: Sequence[LayerCall]) -> list[float]:
        return _measured(calls, self.like)

    def networks(self, networks: Sequence[nn.Module], inputs: Inputs) -> list[float]:
        with contextlib.ExitStack() as modes:
            for network in networks:
                modes.enter_context(evaluating(network))
            runs = [partial(call, network, inputs) for network in networks]
            return milliseconds(runs, self.like.device, 5 * REPEATS)


def latency_table(
    module: nn.Module, groups: ChannelGroups, clock: Clock | None = None
) -> LatencyTable:
    """The layer times of `module`, in milliseconds, in eval mode.

    Layers are the convolutions and dense layers that `groups` counts MACs of. A layer never counts
    as slower than a wider one: its time is the minimum of its own and theirs.

    Args:
        module: whose layers are timed.
        groups: its channel groups.
        clock: what measures; by default PyTorch, on the network's device.

    Raises:
        ZooError: if the network has no such layer, or does not run on inputs like those that
            `groups` were made with.
    """
    clock = clock or _TorchClock(next(module.parameters()))
    conditions = clock.conditions(groups)
    # a layer's input size is part of its call, so networks share the times of equal layers
    where = encode(conditions, terse=True)
    where = {key: value for key, value in where.items() if key not in ("image_size", "inputs")}
    ones = example_for(module, groups.image_size, groups.inputs, torch.ones, conditions.batch)
    calls = layer_calls(module, groups, ones)
    if not calls:
        raise ZooError(
            f"Latency is measured on convolutions and dense layers, of which "
            f"{type(module).__name__} calls none with channels to prune; use params or macs."
        )
    lengths, layers = extents(groups), []
    for made in calls:
        step = 1 if made.groups > 1 and not made.depthwise else conditions.step
        outputs = _grid(lengths[made.weight][0], made.shape[0], math.lcm(made.unit, step))
        inputs = _grid(lengths[made.weight][1], made.shape[1], step)
        cells = [made.resized(o, i) for o in outputs for i in inputs]
        layer = {key: value for key, value in asdict(made).items() if key != "weight"}
        times = remembered(
            {"layer": layer, "outputs": outputs, "inputs": inputs, **where},
            partial(clock.layers, cells),
        )
        layers.append(LayerTimes(made.weight, outputs, inputs, _rising(times, len(inputs)), step))

    table = LatencyTable(conditions, tuple(layers), 0.0)
    return _calibrated(table, module, groups, ones, clock)


def _calibrated(
    table: LatencyTable, module: nn.Module, groups: ChannelGroups, inputs: Inputs, clock: Clock
) -> LatencyTable:
    """`table` scaled to give whole networks' measured times, dense and at the clock's shares.

    The dense time is met exactly, the relative errors of the others have the least squares.
    """
    limits = Limits(align=table.conditions.step)
    widths = [
        round_widths(groups.sizes, [share] * len(groups.sizes), limits) for share in clock.shares
    ]

    def measure() -> list[float]:
        return clock.networks([module, *(_narrower(module, groups, own) for own in widths)], inputs)

    network = hashlib.sha256((repr(module) + repr(groups.shapes)).encode()).hexdigest()
    where = encode(table.conditions, terse=True)
    dense, *smaller = remembered({"network": network, "widths": widths, **where}, measure)
    model = cost_model(groups, table)
    layers = model.total(groups.sizes, "latency")
    totals = [model.total(own, "latency") for own in widths]
    saved = [(layers - total) / ms for total, ms in zip(totals, smaller, strict=True)]
    gained = [(dense - ms) / ms for ms in smaller]
    squares = sum(own**2 for own in saved)
    slope = sum(map(mul, saved, gained)) / squares if squares else 0.0
    slope = min(max(slope, 0.0), dense / layers)
    scaled = tuple(
        replace(layer, ms=tuple(tuple(slope * ms for ms in row) for row in layer.ms))
        for layer in table.layers
    )
    return replace(table, layers=scaled, rest=max(0.0, dense - slope * layers))


def _narrower(module: nn.Module, groups: ChannelGroups, widths: Sequence[int]) -> nn.Module:
    """`module` with the first channels of every group."""
    scores = [[0.0] * size for size in groups.sizes]
    own = dict(zip(groups.names, widths, strict=True))
    plan = make_plan(
        groups, own, scores, profile="", metric="params", asked=1, criterion="", seed=0
    )
    return apply(module, groups, plan)


def _measured(calls: Sequence[LayerCall], like: Tensor) -> list[float]:
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


def _grid(extent: Extent, length: int, unit: int) -> tuple[int, ...]:
    """The lengths of a dimension to time, multiples of `unit` up to its own.

    Only its own if no group owns part of it.
    """
    if not extent.per:
        return (length,)
    shares = (max(1, round(share * length / unit)) * unit for share in GRID[:-1])
    return tuple(sorted({*(own for own in shares if own < length), length}))


def _rising(times: Sequence[float], columns: int) -> tuple[tuple[float, ...], ...]:
    """`times` in rows of `columns`, each lowered to the minimum of those below and to the right."""
    rows = [list(times[at : at + columns]) for at in range(0, len(times), columns)]
    for row in rows:
        for column in reversed(range(columns - 1)):
            row[column] = min(row[column], row[column + 1])
    for row, wider in zip(reversed(rows[:-1]), reversed(rows[1:]), strict=True):
        row[:] = map(min, row, wider)
    return tuple(map(tuple, rows))


def remembered(of: dict[str, Any], measure: Callable[[], list[float]]) -> tuple[float, ...]:
    """The cached result of `measure` for the key `of`; measured if no intact file has it."""
    key = json.dumps(of, sort_keys=True)
    path = cache_folder() / "latency" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    try:
        return decode(_Remembered, read_json(path), str(path)).ms
    except DocumentError:
        times = measure()
        with contextlib.suppress(OSError):
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
