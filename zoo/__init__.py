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
    from zoo.data.datasets import Splits, load_data
    from zoo.data.images import ImageSet
    from zoo.deployment.exporting import ExportResult, export
    from zoo.deployment.measurement import BenchmarkRow, ComparisonRow, benchmark, compare
    from zoo.deployment.options import BenchmarkOptions, ExportOptions, Runtime
    from zoo.deployment.runtime import InferenceSession
    from zoo.errors import (
        CheckpointError,
        DataError,
        DivergenceError,
        DocumentError,
        ExportError,
        FactorError,
        GraphError,
        ZooError,
    )
    from zoo.iterative import IterativeResult, Schedule, prune_iteratively
    from zoo.loading import create_model, load, load_pruned, plan, prune, save
    from zoo.publishing.options import PublishOptions
    from zoo.publishing.publication import publish
    from zoo.publishing.verification import Verification, verify
    from zoo.registry.hub_commits import Published
    from zoo.registry.store import ProfileEntry, get_profile, list_profiles
    from zoo.search.lookup import EvaluatedProfile, ledger_lookup
    from zoo.search.run import SearchConfig, search_profile
    from zoo.spec.plans import Plan, PruningRecord
    from zoo.spec.profile import Profile
    from zoo.training.finetuning import Evaluation, TrainResult, evaluate, finetune
    from zoo.training.recipes import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "BenchmarkOptions",
    "BenchmarkRow",
    "CheckpointError",
    "ComparisonRow",
    "DataError",
    "DivergenceError",
    "DocumentError",
    "EvaluatedProfile",
    "Evaluation",
    "ExportError",
    "ExportOptions",
    "ExportResult",
    "FactorError",
    "GraphError",
    "ImageSet",
    "InferenceSession",
    "IterativeResult",
    "Plan",
    "Profile",
    "ProfileEntry",
    "PruningRecord",
    "PublishOptions",
    "Published",
    "Recipe",
    "Runtime",
    "Schedule",
    "SearchConfig",
    "Splits",
    "TrainResult",
    "UnitStrides",
    "Verification",
    "ZooError",
    "benchmark",
    "compare",
    "create_model",
    "evaluate",
    "export",
    "finetune",
    "get_profile",
    "ledger_lookup",
    "list_profiles",
    "load",
    "load_data",
    "load_pruned",
    "plan",
    "prune",
    "prune_iteratively",
    "publish",
    "save",
    "search_profile",
    "verify",
]

_HOMES = {
    "zoo.common.strides": ("UnitStrides",),
    "zoo.data.datasets": ("Splits", "load_data"),
    "zoo.data.images": ("ImageSet",),
    "zoo.deployment.exporting": ("ExportResult", "export"),
    "zoo.deployment.measurement": ("BenchmarkRow", "ComparisonRow", "benchmark", "compare"),
    "zoo.deployment.options": ("BenchmarkOptions", "ExportOptions", "Runtime"),
    "zoo.deployment.runtime": ("InferenceSession",),
    "zoo.errors": (
        "CheckpointError",
        "DataError",
        "DivergenceError",
        "DocumentError",
        "ExportError",
        "FactorError",
        "GraphError",
        "ZooError",
    ),
    "zoo.iterative": ("IterativeResult", "Schedule", "prune_iteratively"),
    "zoo.loading": ("create_model", "load", "load_pruned", "plan", "prune", "save"),
    "zoo.publishing.options": ("PublishOptions",),
    "zoo.publishing.publication": ("publish",),
    "zoo.publishing.verification": ("Verification", "verify"),
    "zoo.registry.hub_commits": ("Published",),
    "zoo.registry.store": ("ProfileEntry", "get_profile", "list_profiles"),
    "zoo.search.run": ("SearchConfig", "search_profile"),
    "zoo.search.lookup": ("EvaluatedProfile", "ledger_lookup"),
    "zoo.spec.plans": ("Plan", "PruningRecord"),
    "zoo.spec.profile": ("Profile",),
    "zoo.training.finetuning": ("Evaluation", "TrainResult", "evaluate", "finetune"),
    "zoo.training.recipes": ("RECIPES", "Recipe"),
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
