"""What tests of commands share: a network that `zoo train` has trained, and one pruned of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from learnt import TINY

from zoo.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cnet trained by `zoo train` on digits at 8x8."""
    path = tmp_path_factory.mktemp("base") / "cnet.safetensors"
    assert main(["train", "--arch", "cnet", *TINY, "--seed", "3", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def pruned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "cnet-cf2"
    weights = ["--weights", str(base), "--profile", "equal"]
    assert main(["prune", "cnet", "--cf", "2", *weights, "--out", str(folder)]) == 0
    return folder
