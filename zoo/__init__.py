"""A model zoo of out-of-the-box channel-pruned networks.

    model = zoo.load("resnet20-16", cf=4, weights="my_ckpt.pt")
    result = zoo.finetune(model, train=train_set, val=val_set)
    zoo.export(model, "resnet20-16-cf4.onnx", inputs=val_set)

`import zoo` imports neither torch nor anything else that is heavy; each name is imported from its
module when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from zoo.common.strides import UnitStrides
    from zoo.data.datasets import load_data
    from zoo.deployment.export import export
    from zoo.deployment.measurement import benchmark, compare
    from zoo.deployment.options import BenchmarkOptions, ExportOptions
    from zoo.deployment.runtime import InferenceSession
    from zoo.errors import ZooError
    from zoo.iterative import Schedule, prune_iteratively
    from zoo.loading import create_model, load, load_pruned, plan, prune, save
    from zoo.registry.store import get_profile, list_profiles
    from zoo.search.campaign import SearchConfig, search_profile
    from zoo.spec.profile import Profile
    from zoo.training.finetuning import evaluate, finetune
    from zoo.training.recipes import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "BenchmarkOptions",
    "ExportOptions",
    "InferenceSession",
    "Profile",
    "Recipe",
    "Schedule",
    "SearchConfig",
    "UnitStrides",
    "ZooError",
    "benchmark",
    "compare",
    "create_model",
    "evaluate",
    "export",
    "finetune",
    "get_profile",
    "list_profiles",
    "load",
    "load_data",
    "load_pruned",
    "plan",
    "prune",
    "prune_iteratively",
    "save",
    "search_profile",
]

_HOMES = {
    "zoo.data.datasets": ("load_data",),
    "zoo.deployment.options": ("BenchmarkOptions", "ExportOptions"),
    "zoo.errors": ("ZooError",),
    "zoo.iterative": ("Schedule", "prune_iteratively"),
    "zoo.loading": ("create_model", "load", "load_pruned", "plan", "prune", "save"),
    "zoo.deployment.measurement": ("benchmark", "compare"),
    "zoo.deployment.export": ("export",),
    "zoo.spec.profile": ("Profile",),
    "zoo.training.recipes": ("RECIPES", "Recipe"),
    "zoo.registry.store": ("get_profile", "list_profiles"),
    "zoo.deployment.runtime": ("InferenceSession",),
    "zoo.search.campaign": ("SearchConfig", "search_profile"),
    "zoo.common.strides": ("UnitStrides",),
    "zoo.training.finetuning": ("evaluate", "finetune"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("prunezoo")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
