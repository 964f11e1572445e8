"""The learned policy: one small network that corrects a known policy, for any architecture.

It was trained by PPO on several networks at once (`zoo/search/transfer.py`). It is kept as
`policy.json` beside `policy.safetensors`, in the registry or in a folder of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from zoo.common.documents import decode_document, encode_document, read_json, write_json
from zoo.common.notices import warn
from zoo.errors import DocumentError, ZooError
from zoo.planning.decisions import FEATURES, Decisions
from zoo.planning.rankings import BEST_RANKING, RANKINGS, Ranking
from zoo.planning.solver import Solution
from zoo.registry.store import registry_folder

__all__ = ["LEARNED", "LearnedPolicy", "Training", "learned_policy", "play"]

LEARNED = "learned"
"""The name of the bundled policy; `learned:FOLDER` is another."""

_LAYERS = ("0", "1", "2")


@dataclass(frozen=True)
class Training:
    """How a policy network was trained.

    Attributes:
        features: what it observes, in order.
        known: metric -> the ranking that it corrects where there are scores.
        architectures: names of the networks.
        networks: sha256 of their checkpoints.
        data: names of the data sets.
        metrics, factors: that it was trained for.
        episodes: how many were played.
        fidelity: how their accuracies were measured.
        command: that repeats it.
    """

    features: tuple[str, ...]
    known: dict[str, str]
    architectures: tuple[str, ...]
    networks: tuple[str, ...]
    data: tuple[str, ...]
    metrics: tuple[str, ...]
    factors: tuple[float, ...]
    episodes: int
    fidelity: str
    command: str

    def covers(self, cf: float) -> bool:
        """Whether a factor is in the range of those that it was trained for."""
        return min(self.factors) <= cf <= max(self.factors)


@dataclass(frozen=True)
class LearnedPolicy:
    """A policy network: two tanh layers and one output.

    Attributes:
        tensors: `0.weight`, `0.bias` and so on, as torch's `nn.Linear` has them.
        training: how it was trained.
    """

    tensors: Mapping[str, NDArray[Any]]
    training: Training

    def correction(self, observation: NDArray[Any]) -> float:
        """The correction in [-1, 1] of the group that was observed."""
        value = observation.astype(np.float64)
        for layer in _LAYERS:
            value = self.tensors[f"{layer}.weight"] @ value + self.tensors[f"{layer}.bias"]
            if layer != _LAYERS[-1]:
                value = np.tanh(value)
        return float(np.clip(value[0], -1.0, 1.0))

    def ranking(self, metric: str) -> Ranking:
        """What it corrects where there are scores."""
        return RANKINGS[self.training.known.get(metric, BEST_RANKING[metric])]

    @classmethod
    def read(cls, folder: str | Path) -> LearnedPolicy:
        """The policy in `folder`.

        Raises:
            ZooError: when there is none.
            DocumentError: for one of another version, or a broken one.
        """
        document, weights = (Path(folder) / f"policy.{end}" for end in ("json", "safetensors"))
        if not document.is_file() or not weights.is_file():
            raise ZooError(
                f"No learned policy in {folder}: it would hold policy.json and policy.safetensors."
            )
        training = decode_document(Training, read_json(document), str(document))
        if not training.factors:
            raise DocumentError(f"{document}: it names no factor that the policy was trained for.")
        if training.features != FEATURES:
            raise DocumentError(
                f"{document}: this policy observes other features than this version's; train again."
            )
        for known in training.known.values():
            if known not in RANKINGS:
                raise DocumentError(f"{document}: it corrects {known!r}, which is unknown.")
        try:
            tensors = load_file(weights)
        except (SafetensorError, OSError) as error:
            raise DocumentError(f"{weights} cannot be read: {error}") from error
        _check_shapes(tensors, weights)
        return cls(tensors, training)

    def write(self, folder: str | Path) -> None:
        """Write both files into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.tensors), folder / "policy.safetensors")
        write_json(folder / "policy.json", encode_document(self.training))


def learned_policy(name: str = LEARNED) -> LearnedPolicy:
    """The policy that `learned`, the bundled one, or `learned:FOLDER` names.

    Raises:
        ZooError: when there is none.
        DocumentError: for one of another version, or a broken one.
    """
    _, colon, folder = name.partition(":")
    if colon and not folder:
        raise ZooError(f"{name!r} names no folder: write {LEARNED}:FOLDER, or {LEARNED}.")
    if not folder and not bundled_folder().is_dir():
        raise ZooError("No learned policy is bundled: name the folder of yours as learned:FOLDER.")
    return LearnedPolicy.read(Path(folder).expanduser() if folder else bundled_folder())


def bundled_folder() -> Path:
    """Where the bundled policy is."""
    return registry_folder() / "policy"


def play(policy: LearnedPolicy, decisions: Decisions) -> Solution:
    """The widths that the policy decides for; deterministic.

    A factor that no training saw is decided on all the same, with a warning.
    """
    factors = policy.training.factors
    if not policy.training.covers(decisions.cf):
        warn(
            f"The learned policy was trained for factors of {min(factors):g} to "
            f"{max(factors):g}; {decisions.cf:g} is outside."
        )
    if decisions.metric not in policy.training.metrics:
        warn(
            f"The learned policy was trained for {' and '.join(policy.training.metrics)}, not for "
            f"{decisions.metric}."
        )
    while not decisions.finished:
        decisions.decide(policy.correction(decisions.observe()))
    return decisions.solution()


def _check_shapes(tensors: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Refuse weights that are not three layers from the features to one number."""
    wanted = {f"{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias")}
    if set(tensors) != wanted:
        raise DocumentError(f"{path}: expected the tensors {', '.join(sorted(wanted))}.")
    width = len(FEATURES)
    for layer in _LAYERS:
        weight, bias = tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise DocumentError(f"{path}: {layer}.weight is {weight.shape}, its input {width}.")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise DocumentError(f"{path}: {layer} holds numbers that are not finite.")
        width = len(bias)
    if width != 1:
        raise DocumentError(f"{path}: {width} outputs instead of one.")
