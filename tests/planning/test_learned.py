"""The learned policy: corrections of a known one, made from what any layer of any network has."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo
import zoo.planning.learned as learned
from zoo.errors import DocumentError, ZooError
from zoo.planning.decisions import FEATURES, Decisions
from zoo.planning.learned import LearnedPolicy, Training, learned_policy, play
from zoo.planning.policies import policy_solution
from zoo.planning.rankings import RANKINGS, ranking_solution
from zoo.planning.solver import Limits
from zoo.registry.store import stored_groups
from zoo.spec.cost import cost_model
from zoo.spec.groups import ChannelGroups

STORED = (
    "resnet20-16", "cnet", "torchvision:mobilenet_v2", "torchvision:densenet121",
    "timm:efficientnet_b1", "torchvision:vgg16_bn",
)  # fmt: skip
"""Six networks of all kinds: plain, residual, depthwise, dense, gated."""


def groups_of(arch: str) -> ChannelGroups:
    groups = stored_groups(arch)
    assert groups is not None
    return groups


def scores_of(groups: ChannelGroups) -> list[list[float]]:
    rng = np.random.default_rng(1)
    return [list(rng.exponential(rng.exponential(), size)) for size in groups.sizes]


def policy_of(seed: int = 0, scale: float = 1.0, **changes: object) -> LearnedPolicy:
    rng = np.random.default_rng(seed)
    tensors, widths = {}, (len(FEATURES), 8, 8, 1)
    for layer in range(3):
        shape = widths[layer + 1], widths[layer]
        tensors[f"{layer}.weight"] = (scale * rng.normal(size=shape)).astype(np.float32)
        tensors[f"{layer}.bias"] = (scale * rng.normal(size=shape[:1])).astype(np.float32)
    training = Training(
        features=FEATURES, known={"params": "global-per-cost", "macs": "global"},
        architectures=("cnet",), networks=("0" * 64,),
        data=("digits",), metrics=("macs", "params"), factors=(2.0, 6.0), episodes=1,
        fidelity="none", command="none",
    )  # fmt: skip
    return LearnedPolicy(tensors, replace(training, **changes))


@pytest.mark.parametrize("arch", STORED)
@pytest.mark.parametrize("metric", ["params", "macs"])
def test_without_a_correction_it_is_the_known_policy(arch: str, metric: str) -> None:
    groups = groups_of(arch)
    model, scores = cost_model(groups), scores_of(groups)
    silent = policy_of(scale=0.0)
    plain = play(silent, Decisions(groups, model, 4.0, metric))
    assert plain == policy_solution("equal", model, 4.0, metric)
    for name in ("global", "global-l2", "global-per-cost", "knapsack"):
        ranking = RANKINGS[name]
        found = play(silent, Decisions(groups, model, 4.0, metric, scores=scores, ranking=ranking))
        assert found == ranking_solution(ranking, scores, model, 4.0, metric)


@pytest.mark.parametrize("arch", STORED)
def test_the_corrected_widths_meet_the_factor_and_are_always_the_same(arch: str) -> None:
    groups = groups_of(arch)
    model = cost_model(groups)
    for scores in (None, scores_of(groups)):
        found = [
            play(policy_of(scale=0.3), Decisions(groups, model, 3.0, "macs", scores=scores))
            for _ in range(2)
        ]
        assert found[0] == found[1]
        assert found[0].got == pytest.approx(3.0, rel=0.01)
        assert model.factor(found[0].widths, "macs") == found[0].got
        assert found[0] != Decisions(groups, model, 3.0, "macs", scores=scores).known


def test_a_correction_keeps_more_of_its_group_and_less_of_the_others() -> None:
    groups = groups_of("resnet20-16")
    model = cost_model(groups)
    for scores in (None, scores_of(groups)):
        for favoured in range(len(groups.groups)):
            decisions = Decisions(groups, model, 4.0, "macs", scores=scores)
            for group in range(len(groups.groups)):
                decisions.decide(float(group == favoured))
            found, known = decisions.solution().widths, decisions.known.widths
            assert found[favoured] >= known[favoured]
            fewer = [a <= b + 1 for a, b in zip(found, known, strict=True)]
            assert sum(fewer) >= len(fewer) - 1  # two widths may close the last percent


@pytest.mark.parametrize("arch", STORED)
def test_what_is_observed_holds_no_name_and_is_bounded(arch: str) -> None:
    groups = groups_of(arch)
    renamed = replace(
        groups,
        groups=tuple(
            replace(group, name=f"g{number}") for number, group in enumerate(groups.groups)
        ),
    )
    seen = []
    for each in (groups, renamed):
        decisions = Decisions(each, cost_model(each), 4.0, "macs", scores=scores_of(groups))
        rows = []
        while not decisions.finished:
            rows.append(decisions.observe())
            decisions.decide(0.5 * (-1) ** len(rows))
        seen.append(np.array(rows))
    assert np.array_equal(*seen)
    assert seen[0].shape == (len(groups.groups), len(FEATURES))
    assert np.isfinite(seen[0]).all()
    assert np.abs(seen[0]).max() <= 2
    so_far = seen[0][:, FEATURES.index("left to save")]
    assert so_far[0] == pytest.approx(0, abs=0.02)  # the known policy meets the factor
    assert len(set(so_far)) > 1  # and the corrections move away from it


def test_it_computes_what_the_trained_network_does() -> None:
    policy = policy_of(3, 0.4)
    layers = [nn.Linear(len(FEATURES), 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)]
    network = nn.Sequential(*layers).double()
    for number, layer in enumerate(layers[::2]):
        layer.weight.data = torch.from_numpy(policy.tensors[f"{number}.weight"]).double()
        layer.bias.data = torch.from_numpy(policy.tensors[f"{number}.bias"]).double()
    for row in np.random.default_rng(0).normal(size=(20, len(FEATURES))).astype(np.float32):
        expected = network(torch.from_numpy(row).double()).clamp(-1, 1).item()
        assert policy.correction(row) == pytest.approx(expected, abs=1e-12)


# --- its file -------------------------------------------------------------------------------------


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    policy = policy_of()
    policy.write(tmp_path)
    again = learned_policy(f"learned:{tmp_path}")
    assert again.training == policy.training
    assert all(np.array_equal(again.tensors[name], own) for name, own in policy.tensors.items())
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1_000_000


def test_what_is_no_policy_of_this_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="No learned policy in"):
        learned_policy(f"learned:{tmp_path}")
    policy_of(features=(*FEATURES[:-1], "colour")).write(tmp_path)
    with pytest.raises(DocumentError, match="observes other features"):
        learned_policy(f"learned:{tmp_path}")
    policy_of(known={"macs": "global-best"}).write(tmp_path)
    with pytest.raises(DocumentError, match="'global-best'"):
        learned_policy(f"learned:{tmp_path}")
    policy_of(factors=()).write(tmp_path)
    with pytest.raises(DocumentError, match="names no factor"):
        learned_policy(f"learned:{tmp_path}")
    policy_of().write(tmp_path)
    document = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps({**document, "schema_version": 7}))
    with pytest.raises(DocumentError, match="schema_version is 7"):
        learned_policy(f"learned:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("0.weight", np.ones((8, 3), np.float32), "0.weight is"),
        ("1.bias", np.full(8, np.nan, np.float32), "not finite"),
        ("2.weight", np.ones((2, 8), np.float32), "2.weight is"),
        ("3.weight", np.ones((1, 1), np.float32), "expected the tensors"),
    ],
)
def test_broken_weights_are_refused(
    tmp_path: Path, name: str, value: np.ndarray, told: str
) -> None:
    policy = policy_of()
    policy.write(tmp_path)
    save_file({**policy.tensors, name: value}, tmp_path / "policy.safetensors")
    with pytest.raises(DocumentError, match=told):
        learned_policy(f"learned:{tmp_path}")
    (tmp_path / "policy.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DocumentError, match="cannot be read"):
        learned_policy(f"learned:{tmp_path}")


def test_the_bundled_one_says_where_it_comes_from() -> None:
    training = learned_policy().training
    assert len(training.architectures) >= 3
    assert len(training.networks) >= len(training.architectures)
    assert training.episodes >= 300
    assert "/" not in training.command.replace("scripts/evidence/", "")
    assert sum(file.stat().st_size for file in learned.bundled_folder().iterdir()) < 1_000_000


# --- on a live network ----------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1) if groups == 2 else nn.Identity()
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x).relu()).mean((2, 3)))


@pytest.fixture
def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(16, 3, 8, 8, generator=generator), torch.arange(16) % 4)


@pytest.mark.parametrize("groups", [1, 2])
def test_any_network_is_pruned_by_it_and_left_as_it_was(
    tmp_path: Path, images: TensorDataset, groups: int
) -> None:
    policy_of(1, 0.5).write(tmp_path)
    network = Two(groups)
    before = copy.deepcopy(network.state_dict())
    for data in (None, images):
        pruned = zoo.prune(
            network, torch.zeros(1, 3, 8, 8), cf=2, profile=f"learned:{tmp_path}", data=data,
            metric="macs", criterion="l2",
        )  # fmt: skip
        plan = pruned.pruning.plan
        assert plan.got == pytest.approx(2, rel=0.07)  # sixteen channels have coarse steps
        assert plan.profile == f"learned:{tmp_path}{'' if data else ', no data'}"
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_what_it_was_not_trained_for_is_said_and_solved() -> None:
    policy = policy_of()
    model = cost_model(groups_of("torchvision:vgg16_bn"))
    with pytest.warns(UserWarning, match="trained for factors of 2 to 6; 8 is outside"):
        found = play(policy, Decisions(groups_of("torchvision:vgg16_bn"), model, 8.0))
    assert found.got == pytest.approx(8, rel=0.01)
    macs_alone = policy_of(metrics=("macs",))
    with pytest.warns(UserWarning, match="trained for macs, not for params"):
        play(macs_alone, Decisions(groups_of("torchvision:vgg16_bn"), model, 4.0))


def test_limits_hold() -> None:
    groups = groups_of("torchvision:vgg16_bn")
    limits = Limits(align=16, pinned={0: 64}, floor=0.2)
    decisions = Decisions(groups, cost_model(groups), 4.0, "macs", limits=limits)
    found = play(policy_of(scale=0.3), decisions)
    assert found.widths[0] == 64
    assert all(width % 16 == 0 for width in found.widths)
    assert all(w >= 0.2 * size for w, size in zip(found.widths, groups.sizes, strict=True))


def test_without_a_bundled_policy_the_folder_has_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "bundled_folder", lambda: tmp_path / "policy")
    with pytest.raises(ZooError, match="as learned:FOLDER"):
        zoo.prune(Two(), torch.zeros(1, 3, 8, 8), cf=2, profile="learned")
    policy_of().write(tmp_path / "policy")
    plan = zoo.plan(Two(), torch.zeros(1, 3, 8, 8), cf=2, profile="learned")
    assert plan.profile == "learned, no data"
    with pytest.raises(ZooError, match="names no folder: write learned:FOLDER"):
        zoo.plan(Two(), torch.zeros(1, 3, 8, 8), cf=2, profile="learned:")
