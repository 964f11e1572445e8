"""What tests share: a private cache, one torch thread, a Hub, images, a network, GPU skipping."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from helpers import randomised
from loopback_hub import LoopbackHub
from PIL import Image
from torch import nn

import zoo
from zoo.data.datasets import ImageSet
from zoo.models import build_model

# Shared machines stall now and then: only the values count, never the time. No example database:
# a test run leaves nothing behind in the working tree. The examples are the same everywhere;
# $ZOO_EXAMPLES asks for so many others, at random.
hunted = os.environ.get("ZOO_EXAMPLES")
hypothesis.settings.register_profile(
    "zoo", deadline=None, database=None, max_examples=int(hunted or 50), derandomize=not hunted
)
hypothesis.settings.load_profile("zoo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub on loopback to which the Hub's client of this process talks, with an empty cache."""
    with LoopbackHub(tmp_path / "hf") as hub:
        hub.attach(monkeypatch)
        yield hub


@pytest.fixture
def toy_images() -> ImageSet:
    """96 separable 8x8 images of three classes: class c is bright in channel c, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    images = torch.randint(0, 60, (96, 3, 8, 8), generator=generator)
    images[torch.arange(96), labels] += 120
    return ImageSet(
        "toy", images.to(torch.uint8), labels, ("r", "g", "b"), (0.3, 0.3, 0.3), (0.25, 0.25, 0.25)
    )


@pytest.fixture
def image_tree(tmp_path: Path) -> Path:
    """A folder with train/ and val/ ImageFolder trees: two classes, 8x8 PNG files of one colour."""
    for split, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                colour = (10 * n, 200 * label, 7)
                Image.new("RGB", (8, 8), colour).save(folder / f"{n:02d}.png")
    return tmp_path / "tree"


@pytest.fixture
def streets(tmp_path: Path) -> Path:
    """A folder with train/ and val/ trees of two classes: noise in pictures of 12x40 pixels."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for name in ("left", "right"):
            folder = tmp_path / "streets" / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = draw.integers(0, 256, (12, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    return tmp_path / "streets"


@pytest.fixture
def dense() -> nn.Module:
    """A resnet20-16 for seven classes, in eval mode, with no tensor at its initial value."""
    return randomised(build_model("resnet20-16", 7))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """cnet for 8-pixel images."""
    return zoo.create_model("cnet", 10, image_size=8)
