"""Small networks of any input and any output."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
from odd import IMAGES, Net, conv, net
from torch import Tensor, nn

__all__ = ["CALLS", "SIGNAL", "STRUCTURES", "fused", "fused_parts", "two_heads"]

Pair = namedtuple("Pair", "maps logits")


@dataclass
class Heads:
    maps: Tensor
    more: dict[str, list[Tensor]]


@dataclass(slots=True)
class SlimHeads:
    maps: Tensor
    more: dict[str, list[Tensor]]


STRUCTURES = {
    "tuple": lambda maps, logits: (maps, logits),
    "nested list": lambda maps, logits: [[maps], [logits, [logits * 2]]],
    "dict": lambda maps, logits: {"maps": maps, "logits": logits},
    "ordered dict": lambda maps, logits: OrderedDict(logits=logits, maps=maps),
    "named tuple": lambda maps, logits: Pair(maps, logits),
    "dataclass": lambda maps, logits: Heads(maps, {"all": [logits]}),
    "dataclass with slots": lambda maps, logits: SlimHeads(maps, {"all": [logits]}),
    "beside no tensors": lambda maps, logits: (maps, None, 3, "why", logits),
}


def two_heads(structure: str) -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> object:
        maps = n.b(n.a(x).relu())
        return STRUCTURES[structure](n.c(maps), n.head(maps.mean((2, 3))))

    return Net(run, a=conv(3, 8), b=conv(8, 6), c=conv(6, 4), head=nn.Linear(6, 5))


def volume(kind: int) -> nn.Module:
    """A small network of convolutions in `kind` dimensions."""
    conv_n, norm, pool = (
        getattr(nn, f"{name}{kind}d") for name in ("Conv", "BatchNorm", "AdaptiveAvgPool")
    )
    return nn.Sequential(
        conv_n(2, 12, 3, padding=1), norm(12), nn.ReLU(), conv_n(12, 8, 3, groups=4), nn.ReLU(),
        pool(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def fused(n: nn.Module, image: Tensor, signal: Tensor) -> Tensor:
    both = torch.cat([n.a(image).relu().mean((2, 3)), n.s(signal).relu().mean(2)], 1)
    return n.head(both)


def fused_parts() -> dict[str, nn.Module]:
    return {"a": conv(3, 8), "s": nn.Conv1d(1, 6, 5), "head": nn.Linear(14, 4)}


class Named(nn.Module):
    """Images and, by name alone, a table's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 4)
        self.table = nn.Embedding(5, 8)

    def forward(self, image: Tensor, *, position: Tensor, scale: float = 1.0) -> Tensor:
        rows = self.table(position)[..., None, None] * scale
        return self.head((self.b(self.a(image).relu()) + rows).mean((2, 3)))


class Batch(nn.Module):
    """One argument, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 4)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = self.b(self.a(batch["image"]).relu()) * batch["mask"]
        return {"logits": self.head(maps.mean((2, 3)))}


SIGNAL = torch.rand(2, 1, 16)
CALLS: dict[str, tuple] = {
    "1-d": (lambda: volume(1), torch.rand(2, 2, 16), "0 3"),
    "3-d": (lambda: volume(3), torch.rand(2, 2, 5, 6, 7), "0 3"),
    "tuple": (lambda: Net(fused, **fused_parts()), (IMAGES, SIGNAL), "a s"),
    "a list": (lambda: Net(fused, **fused_parts()), [IMAGES, SIGNAL], "a s"),
    "names": (Named, {"position": torch.tensor([1, 3]), "image": IMAGES}, "a b"),
    "one dict": (Batch, {"image": IMAGES, "mask": torch.ones(2, 1, 8, 8)}, "a b"),
    "oblong": (net, torch.rand(2, 3, 4, 12), "a b"),
}  # fmt: skip
"""Name -> the network, what it is called with, and its groups."""
