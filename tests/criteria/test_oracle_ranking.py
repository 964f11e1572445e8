"""The oracle against evaluating every masked network anew; Spearman's correlation by hand."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from zoo.criteria.oracle import Oracle, oracle, spearman
from zoo.criteria.scores import channel_scores
from zoo.errors import ZooError
from zoo.models import build_model
from zoo.spec.plans import make_plan
from zoo.surgery.masking import masked
from zoo.tracing.graph import channel_groups


def network() -> nn.Module:
    """Stage outputs in several slots, and channels that lie in blocks of a flattened map."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 16, 3),
    )  # fmt: skip


def test_the_oracle_is_what_evaluating_each_masked_network_gives() -> None:
    module = network().train()
    before = copy.deepcopy(module.state_dict())
    images, labels = torch.rand(10, 3, 8, 8), torch.arange(10) % 3
    groups = channel_groups(module, images[:1])
    found = oracle(module, groups, [(images[:7], labels[:7]), (images[7:], labels[7:])])
    with torch.no_grad():
        whole = functional.cross_entropy(copy.deepcopy(module).eval()(images), labels).item()
        for group in groups.groups:
            changes = []
            for unit in range(group.size):
                widths = {g.name: g.size - (g is group) for g in groups.groups}
                scores = [[float(u != unit) for u in range(g.size)] for g in groups.groups]
                plan = make_plan(
                    groups, widths, scores, profile="", metric="params", asked=1, criterion="",
                    seed=0,
                )  # fmt: skip
                logits = masked(module, groups, plan).eval()(images)
                changes.append(functional.cross_entropy(logits, labels).item() - whole)
            assert found.changes[group.name] == pytest.approx(changes, abs=1e-6)
    assert found.loss == pytest.approx(whole, abs=1e-6)
    assert min(min(row) for row in found.changes.values()) < 0 <= min(map(min, found.scores))
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_masking_one_unit_after_another_leaves_no_trace() -> None:
    """The last group's changes don't depend on the groups that were masked before it."""
    module = build_model("cnet", 3, image_size=8)
    batches = [(torch.rand(4, 3, 8, 8), torch.arange(4) % 3)]
    groups = channel_groups(module, torch.zeros(1, 3, 8, 8))
    every = oracle(module, groups, batches)
    last = oracle(
        module, type(groups)(groups.groups[-1:], groups.shapes, (), groups.positions, 8), batches
    )
    assert every.changes["conv6"] == last.changes["conv6"]


def test_without_batches_the_oracle_is_an_error() -> None:
    with pytest.raises(ZooError, match="no batches"):
        oracle(network(), channel_groups(network(), torch.zeros(1, 3, 8, 8)), [])


def test_spearman_of_known_cases() -> None:
    truth = Oracle(1.0, {"a": (0.1, -0.4, 0.2, 0.3), "b": (1.0, 2.0, 3.0), "c": (0.5, 0.6)})
    # ranks of |change| in a are 0 3 1 2; of the scores 0 1 2 3: 1 - 6 · (0 + 4 + 1 + 1) / (4 · 15)
    found = spearman([[1, 2, 3, 4], [5, 5, 7], [8, 8]], truth)
    assert found.per_group["a"] == pytest.approx(0.4)
    # with a tie, Pearson's correlation of the ranks (0.5, 0.5, 2) and (0, 1, 2)
    assert found.per_group["b"] == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert math.isnan(found.per_group["c"])
    assert found.mean == pytest.approx((0.4 + found.per_group["b"]) / 2)


def test_overall_a_group_counts_by_its_l2_norm() -> None:
    truth = Oracle(0.0, {"a": (1.0, 2.0), "b": (3.0, 4.0, 5.0, 6.0)})
    given = [[0.3, 0.4], [0.7, 0.8, 0.9, 1.0]]
    scaled = [[1000 * value for value in given[0]], given[1]]
    assert spearman(given, truth).overall == pytest.approx(spearman(scaled, truth).overall)
    # divided by their norms they are (0.60, 0.80) and (0.41, 0.47, 0.52, 0.58)
    ranks, wanted = [4, 5, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]
    distance = sum((a - b) ** 2 for a, b in zip(ranks, wanted, strict=True))
    assert spearman(given, truth).overall == pytest.approx(1 - 6 * distance / (6 * 35))


def test_spearman_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    scores = [float(draw.randint(0, 9)) for _ in range(40)]
    changes = tuple(float(draw.randint(-9, 9)) for _ in range(40))
    expected = stats.spearmanr(scores, [abs(change) for change in changes]).statistic
    assert spearman([scores], Oracle(0, {"a": changes})).overall == pytest.approx(expected)


def test_the_oracle_agrees_with_itself_and_hardly_with_chance(toy_images) -> None:
    module = network()
    groups = channel_groups(module, torch.zeros(1, 3, 8, 8))
    truth = oracle(module, groups, [(toy_images.normalise(toy_images.images), toy_images.labels)])
    itself = spearman(truth.scores, truth)
    assert list(itself.per_group.values()) == pytest.approx([1, 1])
    chance = [spearman(channel_scores("random", module, groups, s, None), truth) for s in range(40)]
    assert abs(sum(found.mean for found in chance)) / 40 < 0.2
