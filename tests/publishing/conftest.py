"""A pruned network's folder and a registry, published to a Hub on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import LoopbackHub

import zoo
from zoo.data.images import ImageSet

REPO = "org/net"

OPTIONS = zoo.PublishOptions(license="mit", base_model="org/dense", datasets=("org/data",))


@pytest.fixture(scope="session")
def images() -> ImageSet:
    """Noise of ten classes, at the size of the network."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=generator)
    names = tuple(f"class {number}" for number in range(10))
    half = (0.5, 0.5, 0.5)
    return ImageSet("noise (16x16)", pixels, torch.arange(64) % 10, names, half, half)


@pytest.fixture(scope="session")
def network() -> Any:
    """A real network, pruned."""
    return zoo.load("resnet20-16", 4, "bundled:resnet20-16/cifar10", metric="macs")


@pytest.fixture(scope="session")
def network_folder(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save(network, tmp_path_factory.mktemp("saved") / "net")


@pytest.fixture(scope="session")
def repository(
    network_folder: Path, images: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files that publishing the network sends."""
    home = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch, LoopbackHub(home) as hub:
        hub.attach(patch)
        zoo.publish(network_folder, REPO, data=images, options=OPTIONS)
        assert hub.unknown == []
        return hub.files(REPO)


@pytest.fixture
def published(hub: LoopbackHub, repository: dict[str, bytes]) -> str:
    """The reference of the published network, pinned; nothing of it is in a cache."""
    return f"hf:{REPO}@{hub.add_repo(REPO, repository)}"


@pytest.fixture
def repository_folder(repository: dict[str, bytes], tmp_path: Path) -> Path:
    """The same files in a folder."""
    folder = tmp_path / "mirror"
    for name, content in repository.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
