"""Networks of widespread public implementations, rewritten as plain functions of images.

Each has the key names of its implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "DEEP",
    "PLAIN",
    "SEQUENTIAL",
    "SMALL",
    "Layers",
    "inverted",
    "projected",
    "residual",
    "vgg16",
]


class Layers:
    """Layers by name, whose random tensors come into being, as `state`, when they are first used.

    `largest` is the largest activation: 6 and more shows what ReLU6 clips.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.largest = 0.0
        self._generator = torch.Generator().manual_seed(1)

    def _tensor(self, name: str, *shape: int, mean: float = 0.0, sd: float = 0.1) -> Tensor:
        self.state[name] = mean + sd * torch.randn(shape, generator=self._generator)
        return self.state[name].double()

    def conv(
        self,
        x: Tensor,
        name: str,
        channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> Tensor:
        fan_in = x.shape[1] // groups * kernel**2
        shape = (channels, x.shape[1] // groups, kernel, kernel)
        weight = self._tensor(f"{name}.weight", *shape, sd=(2 / fan_in) ** 0.5)
        offset = self._tensor(f"{name}.bias", channels) if bias else None
        return F.conv2d(x, weight, offset, stride, kernel // 2, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        count = x.shape[1]
        weight = self._tensor(f"{name}.weight", count, mean=1.0)
        bias = self._tensor(f"{name}.bias", count)
        mean = self._tensor(f"{name}.running_mean", count)
        variance = self._tensor(f"{name}.running_var", count, mean=1.0)
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)
        return F.batch_norm(x, mean, variance, weight, bias)

    def relu(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, float(x.max()))
        return F.relu(x)

    def relu6(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, float(x.max()))
        return F.relu6(x)

    def dense(self, x: Tensor, name: str, outputs: int) -> Tensor:
        weight = self._tensor(f"{name}.weight", outputs, x.shape[1], sd=x.shape[1] ** -0.5)
        return F.linear(x, weight, self._tensor(f"{name}.bias", outputs))


# --- residual networks ----------------------------------------------------------------------------

PLAIN = {
    "stem": ("conv1", "bn1"),
    "stage": "layer{}",
    "block": [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")],
}
SEQUENTIAL = {
    "stem": ("conv1.0", "conv1.1"),
    "stage": "conv{}_x",
    "block": [(f"residual_function.{n}", f"residual_function.{n + 1}") for n in (0, 3, 6)],
}


def residual(
    layers: Layers,
    x: Tensor,
    *,
    names: dict,
    shortcut: str | None,
    classifier: str,
    width: int = 64,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    bottleneck: bool = False,
    pool: bool = False,
    everywhere: bool = False,
) -> Tensor:
    """A residual network; without a `shortcut`'s name the new channels are zeros on both sides."""
    first_stage = 1 if names is PLAIN else 2
    x = layers.relu(layers.norm(layers.conv(x, names["stem"][0], width, 3), names["stem"][1]))
    if pool:
        x = F.max_pool2d(x, 3, 2, padding=1)
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        outer = 4 * inner if bottleneck else inner
        for block in range(count):
            at = f"{names['stage'].format(stage + first_stage)}.{block}"
            stride = 2 if stage and not block else 1
            plan = [(inner, 1), (inner, 3), (outer, 1)] if bottleneck else [(inner, 3), (outer, 3)]
            out = x
            for n, ((channels, kernel), (conv, norm)) in enumerate(
                zip(plan, names["block"], strict=False)
            ):
                own = stride if n == (1 if bottleneck else 0) else 1
                out = layers.norm(
                    layers.conv(out, f"{at}.{conv}", channels, kernel, own), f"{at}.{norm}"
                )
                out = out if n == len(plan) - 1 else layers.relu(out)
            if stride == 2 or x.shape[1] != outer or (everywhere and not block):
                if shortcut is None:
                    new = (outer - x.shape[1]) // 2
                    zeros = x.new_zeros(len(x), new, *out.shape[2:])
                    x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
                else:
                    x = layers.conv(x, f"{at}.{shortcut}.0", outer, 1, stride)
                    x = layers.norm(x, f"{at}.{shortcut}.1")
            x = layers.relu(out + x)
    return layers.dense(F.avg_pool2d(x, x.shape[-1]).flatten(1), classifier, 10)


SMALL = {"names": PLAIN, "width": 16, "blocks": (3, 3, 3)}
DEEP = {"bottleneck": True, "blocks": (3, 4, 6, 3)}


# --- plain and depthwise networks -----------------------------------------------------------------


def vgg16(layers: Layers, x: Tensor, *, features: str, dense: dict[str, int]) -> Tensor:
    index = 0
    for widths in ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3):
        for channels in widths:
            x = layers.conv(x, f"{features}.{index}", channels, 3, bias=True)
            x = layers.relu(layers.norm(x, f"{features}.{index + 1}"))
            index += 3
        x, index = F.max_pool2d(x, 2), index + 1
    x = x.flatten(1)
    *hidden, last = dense
    for name in hidden:
        x = layers.relu(layers.dense(x, name, dense[name]))
    return layers.dense(x, last, dense[last])


SETTING = [
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def inverted(layers: Layers, x: Tensor) -> Tensor:
    """torchvision's key names: of a block with an expansion, and of the one without."""
    step = lambda y, name, *shape, **more: layers.relu6(  # noqa: E731
        layers.norm(layers.conv(y, f"{name}.0", *shape, **more), f"{name}.1")
    )
    x, index = step(x, "features.0", 32, 3), 1
    for expansion, channels, count, first in SETTING:
        for block in range(count):
            at, stride = f"features.{index}.conv", 1 if block else first
            out, n = x, 0
            if expansion > 1:
                out, n = step(out, f"{at}.0", 6 * x.shape[1], 1), 1
            wide = out.shape[1]
            out = step(out, f"{at}.{n}", wide, 3, stride=stride, groups=wide)
            out = layers.norm(layers.conv(out, f"{at}.{n + 1}", channels, 1), f"{at}.{n + 2}")
            x = x + out if x.shape == out.shape else out
            index += 1
    x = step(x, f"features.{index}", 1280, 1)
    return layers.dense(x.mean((2, 3)), "classifier.1", 10)


def projected(layers: Layers, x: Tensor) -> Tensor:
    """kuangliu's key names, ReLU, an expansion in every block and projected shortcuts."""
    x = layers.relu(layers.norm(layers.conv(x, "conv1", 32, 3), "bn1"))
    index = 0
    for expansion, channels, count, first in SETTING:
        for block in range(count):
            at, stride = f"layers.{index}", 1 if block else first
            wide = expansion * x.shape[1]
            out = layers.relu(layers.norm(layers.conv(x, f"{at}.conv1", wide, 1), f"{at}.bn1"))
            out = layers.conv(out, f"{at}.conv2", wide, 3, stride, groups=wide)
            out = layers.relu(layers.norm(out, f"{at}.bn2"))
            out = layers.norm(layers.conv(out, f"{at}.conv3", channels, 1), f"{at}.bn3")
            if stride == 1 and x.shape[1] != channels:
                x = layers.conv(x, f"{at}.shortcut.0", channels, 1)
                x = layers.norm(x, f"{at}.shortcut.1")
            x = out + x if stride == 1 else out
            index += 1
    x = layers.relu(layers.norm(layers.conv(x, "conv2", 1280, 1), "bn2"))
    return layers.dense(F.avg_pool2d(x, 4).flatten(1), "linear", 10)
