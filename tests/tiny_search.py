"""A search that takes seconds, and short ways to run it and to read its tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from learnt import base_networks

from zoo.search.run import SearchConfig, search_profile
from zoo.search.tasks import Task, load_tasks
from zoo.spec.profile import Profile

__all__ = ["load", "quick", "search", "tiny_search"]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few steps of recalibration, in the modules that import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.search.fidelities.SGD_STEPS", 5)
        yield


def tiny_search(folder: Path) -> SearchConfig:
    """A tiny search of cnet on the digits at their own size of 8x8, with two base networks."""
    return SearchConfig(
        arch="cnet", tasks=base_networks(folder), out=folder / "run", cf=(2.0,), data="digits",
        size=8, episodes=16, workers=1, calibration_images=128, val_images=None, candidates=3,
        finalists=2, final_seeds=1, finetune_images=256,
    )  # fmt: skip


def search(config: SearchConfig) -> Profile:
    [profile] = search_profile(config)
    return profile


def load(config: SearchConfig) -> tuple[Task, ...]:
    return load_tasks(config.arch, config.tasks, config.data, config.data_dir, config.size)
