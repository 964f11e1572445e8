"""A model zoo of out-of-the-box channel-pruned networks.

    model = zoo.load("resnet20-16", cf=4, weights="my_ckpt.pt")
    result = zoo.finetune(model, train=train_set, val=val_set)
    zoo.export(model, "resnet20-16-cf4.onnx", inputs=val_set)

`import zoo` imports neither torch nor anything else that is heavy; each name is imported from its
module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.data import load_data
    from zoo.deployment import BenchmarkOptions, ExportOptions
    from zoo.errors import ZooError
    from zoo.iterative import Schedule, prune_iteratively
    from zoo.loading import create_model, load, load_pruned, plan, prune, save
    from zoo.measurement import benchmark, compare
    from zoo.onnx_export import export
    from zoo.profile import Profile
    from zoo.recipes import RECIPES, Recipe
    from zoo.registry import get_profile, list_profiles
    from zoo.runtime import InferenceSession
    from zoo.search.campaign import SearchConfig, search_profile
    from zoo.strides import UnitStrides
    from zoo.training import evaluate, finetune

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
    "zoo.data": ("load_data",),
    "zoo.deployment": ("BenchmarkOptions", "ExportOptions"),
    "zoo.errors": ("ZooError",),
    "zoo.iterative": ("Schedule", "prune_iteratively"),
    "zoo.loading": ("create_model", "load", "load_pruned", "plan", "prune", "save"),
    "zoo.measurement": ("benchmark", "compare"),
    "zoo.onnx_export": ("export",),
    "zoo.profile": ("Profile",),
    "zoo.recipes": ("RECIPES", "Recipe"),
    "zoo.registry": ("get_profile", "list_profiles"),
    "zoo.runtime": ("InferenceSession",),
    "zoo.search.campaign": ("SearchConfig", "search_profile"),
    "zoo.strides": ("UnitStrides",),
    "zoo.training": ("evaluate", "finetune"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
