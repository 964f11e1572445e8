"""Compare outputs and gradients of a training step of `zoo.finetune` with those of float64.

python scripts/evidence/gradient_grid.py --out grid.jsonl
python scripts/evidence/gradient_grid.py --isas none AVX2 --precisions fp32 --widths 1 5 7 12

Processors have different convolution kernels, some of them wrong for some shapes. Each row of the
grid is one convolution in a network of its own. It runs in another process than this one, because a
wrong kernel may abort or hang. Prints what is wrong, and exits with 1 if anything is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

LIMITS = {"fp32": 1e-3, "bf16": 6e-2}
"""Largest error that rounding explains, as a share of the largest value of the same tensor."""

SECONDS = 0.5
"""Time for one convolution, after which it counts as hung; a process has a minute more to start."""


@dataclass(frozen=True)
class Convolution:
    """A convolution with a square kernel; kernel, stride and padding in pixels."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    padding: int


@dataclass(frozen=True)
class Setting:
    """The settings of a process; `isa` is oneDNN's largest instruction set, `none` for no limit."""

    isa: str
    precision: str
    threads: int
    raw: bool


@dataclass(frozen=True)
class Grid:
    """Which convolutions to run, and under which settings."""

    isas: tuple[str, ...] = ("SSE41", "AVX2", "AVX512_CORE", "none")
    """values of ONEDNN_MAX_CPU_ISA; `none` leaves it unset"""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """of the training recipe"""
    threads: tuple[int, ...] = (1, 2)
    """of torch"""
    widths: tuple[int, ...] = tuple(range(1, 41))
    """input channels"""
    outputs: tuple[int, ...] = (5, 16, 33)
    """output channels of dense convolutions"""
    kernels: tuple[int, ...] = (1, 3, 5, 7)
    """pixels per side"""
    strides: tuple[int, ...] = (1, 2)
    """pixels"""
    raw: bool = False
    """switch `zoo.common.strides` off, to test torch alone"""
    out: Path | None = None
    """file of JSON lines, one per convolution and setting"""


def convolutions(grid: Grid) -> Iterator[Convolution]:
    """The grid: dense, depthwise and grouped ones, and some with another padding."""
    for kernel, stride in itertools.product(grid.kernels, grid.strides):
        same = Convolution(0, 0, kernel, stride, 1, kernel // 2)
        for width in grid.widths:
            one = replace(same, inputs=width)
            yield from (replace(one, outputs=outputs) for outputs in grid.outputs)
            yield replace(one, outputs=7, padding=0 if kernel > 1 else 1)
            yield replace(one, inputs=2 * width, outputs=6, groups=2)
            if width > 1:
                yield replace(one, outputs=width, groups=width)


def run_grid(grid: Grid) -> Iterator[tuple[Setting, Convolution, float | None]]:
    """Each convolution with its largest relative error; None if it aborts or hangs."""
    for words in itertools.product(grid.isas, grid.precisions, grid.threads):
        setting = Setting(*words, grid.raw)
        errors = _measured(setting, list(convolutions(grid)))
        yield from ((setting, one, error) for one, error in errors.items())


def is_wrong(setting: Setting, error: float | None) -> bool:
    """Whether `error` is larger than rounding explains."""
    return error is None or not error <= LIMITS[setting.precision]


def _measured(setting: Setting, some: Sequence[Convolution]) -> dict[Convolution, float | None]:
    """Errors by convolution; if their process dies, each half runs again, until one is found."""
    environment = {name: word for name, word in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    if setting.isa != "none":
        environment["ONEDNN_MAX_CPU_ISA"] = setting.isa
    asked = json.dumps([asdict(setting), [asdict(one) for one in some]])
    code: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, __file__, "--child"],
            input=asked,
            capture_output=True,
            text=True,
            env=environment,
            timeout=60 + SECONDS * len(some),
        )
        code = done.returncode
        if code == 0:
            return dict(zip(some, json.loads(done.stdout), strict=True))
        if code > 0:  # an exception of this script's own; signals are negative
            raise RuntimeError(done.stderr)
    if len(some) == 1:
        return {some[0]: None}
    middle = len(some) // 2
    return _measured(setting, some[:middle]) | _measured(setting, some[middle:])


def child() -> None:
    """The errors of the convolutions on standard input, as a JSON list."""
    import torch

    import zoo.common.strides

    words, kind = json.load(sys.stdin)
    setting = Setting(**words)
    torch.set_num_threads(setting.threads)
    if setting.raw:
        zoo.common.strides._BLOCK = 0
    print(json.dumps([largest_error(Convolution(**one), setting.precision) for one in kind]))


def largest_error(convolution: Convolution, precision: str) -> float:
    """Largest error of the outputs and all gradients of one step, relative to float64's largest."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    probe = _probe(convolution)
    exact = _probe(convolution).double()
    exact.load_state_dict(probe.state_dict())
    images = torch.randn(8, convolution.inputs, 8, 8)
    labels = torch.arange(8) % probe.logits
    expected = _values(exact)
    exact.train()
    functional.cross_entropy(exact(images.double()), labels).backward()
    seen = _values(probe)
    _engine_step(probe, images, labels, precision)
    assert seen.keys() == expected.keys()
    errors = ((seen[n].double() - w).abs().max() / w.abs().max() for n, w in expected.items())
    return max(error.item() if error.isfinite() else float("inf") for error in errors)


def _engine_step(probe: nn.Module, images: Tensor, labels: Tensor, precision: str) -> None:
    from zoo.training.accelerators import make_accelerator
    from zoo.training.engine import Engine
    from zoo.training.recipes import Recipe

    recipe = Recipe(epochs=1, lr=0.0, clip_norm=None, precision=precision)  # type: ignore[arg-type]
    accelerator = make_accelerator(recipe, cpu=True)
    Engine(probe, [(images, labels)] * 2, recipe, accelerator, None).train(lambda *_: None)


def _probe(convolution: Convolution) -> nn.Module:
    """A network whose logits are weighted sums of one convolution's maps.

    Its `shift` is added to the images, and so has their gradient, summed over the batch.
    """
    import torch
    from torch import nn

    side = (8 + 2 * convolution.padding - convolution.kernel) // convolution.stride + 1

    class Probe(nn.Module):
        logits = 3 * max(2, convolution.outputs)

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(convolution.inputs, 8, 8))
            self.conv = nn.Conv2d(*astuple(convolution)[:4], convolution.padding,
                                  groups=convolution.groups)  # fmt: skip
            pattern = torch.randn(self.logits, convolution.outputs * side * side)
            self.register_buffer("pattern", pattern / side)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images + self.shift).flatten(1) @ self.pattern.T

    return Probe()


def _values(probe: nn.Module) -> dict[str, Tensor]:
    """A dict to which training `probe` adds its last logits and its parameters' gradients."""
    values: dict[str, Tensor] = {}
    probe.register_forward_hook(lambda _, __, logits: values.update(logits=logits.detach()))
    for name, parameter in probe.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: values.update({name: p.grad.detach().clone()})
        )
    return values


def report(rows: Iterable[tuple[Setting, Convolution, float | None]], out: Path | None) -> int:
    """Print each setting's count and wrong convolutions; return how many are wrong in all."""
    wrong = 0
    for setting, own in itertools.groupby(rows, key=lambda row: row[0]):
        count = 0
        for _, one, error in own:
            count += 1
            if out is not None:
                with out.open("a") as file:
                    file.write(
                        json.dumps({**asdict(setting), **asdict(one), "error": error}) + "\n"
                    )
            if is_wrong(setting, error):
                wrong += 1
                print(f"WRONG {setting} {one}: {'dies' if error is None else error}", flush=True)
        print(f"{setting}: {count} convolutions, {wrong} wrong so far", flush=True)
    return wrong


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        child()
    else:
        import tyro

        chosen = tyro.cli(Grid)
        sys.exit(report(run_grid(chosen), chosen.out) > 0)
