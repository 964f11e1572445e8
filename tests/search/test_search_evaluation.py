from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import nn

from zoo.data.datasets import ImageSet
from zoo.errors import ZooError
from zoo.models import build_model
from zoo.search import fidelities
from zoo.search.evaluation import Evaluator
from zoo.search.fidelities import (
    Distilled,
    FineTuning,
    FromScratch,
    Recalibration,
    live_features,
    recalibrate,
    recalibrated,
)
from zoo.search.ledger import Ledger
from zoo.search.masked_training import RandomlyMasked, train_under_masks
from zoo.search.tasks import Candidate, Task, check_tasks, cut, make_task, plan_of, sample
from zoo.spec.plans import kept_positions, make_plan
from zoo.surgery.surgery import apply
from zoo.tracing.graph import channel_groups
from zoo.training.finetuning import finetune
from zoo.training.recipes import Recipe


def stripes(count: int, seed: int) -> ImageSet:
    """Four easy classes: which quarter of a noisy 8x8 image is bright; sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (count, 3, 8, 8), generator=generator)
    labels = torch.arange(count) * 4 // count
    for index, label in enumerate(labels.tolist()):
        images[index, :, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 120
    return ImageSet(
        "quarters", images.to(torch.uint8), labels, tuple("abcd"), (0.3,) * 3, (0.3,) * 3, False
    )


def trained(arch: str) -> Task:
    module = build_model(arch, 4, image_size=8)
    train, val = stripes(512, 1), stripes(200, 2)
    recipe = Recipe(epochs=3, lr=0.05, augment=False, batch_size=64)
    finetune(module, train, val, recipe=recipe, progress=False)
    return make_task(arch, module, channel_groups(module, torch.zeros(1, 3, 8, 8)), train, val)


@pytest.fixture(scope="module")
def cnet() -> Task:
    return trained("cnet")


@pytest.fixture(scope="module")
def resnet() -> Task:
    return trained("resnet20-16")


def halved(task: Task, seed: int) -> Candidate:
    return Candidate(task, tuple(size // 2 for size in task.groups.sizes), seed)


@dataclass
class Counted:
    """A fidelity that measures nothing, and remembers what it was asked for."""

    name: str
    calls: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    def measure(self, candidate: Candidate) -> float:
        self.calls.append((candidate.widths, candidate.seed))
        return 0.5 + candidate.seed / 10


def test_the_task_is_measured_on_the_validation_split(resnet):
    assert resnet.base_accuracy > 0.9
    assert resnet.split_digest == resnet.val.digest()
    assert [len(vector) for vector in resnet.features] == list(resnet.groups.sizes)
    assert all((vector >= 0).all() and vector.max() > 0 for vector in resnet.features)


@pytest.mark.parametrize("name", ["cnet", "resnet"])
def test_evaluating_changes_nothing_in_the_base_network_and_repeats_itself(name, request):
    task = request.getfixturevalue(name)
    before = {key: tensor.clone() for key, tensor in task.module.state_dict().items()}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    fidelity = Recalibration(256)
    first = fidelity.measure(halved(task, 3))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert fidelity.measure(halved(task, 3)) == first
    assert not task.module.training
    for key, tensor in task.module.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", ["cnet", "resnet"])
def test_recalibration_repairs_what_pruning_broke(name, request):
    task = request.getfixturevalue(name)
    broken, repaired = [], []
    for seed in range(4):
        module = cut(halved(task, seed))
        broken.append(fidelities.evaluate(module, task.val).accuracy)
        recalibrate(module, task.module, task.train)
        repaired.append(fidelities.evaluate(module, task.val).accuracy)
    assert sum(repaired) > sum(broken)
    whole = Recalibration().measure(Candidate(task, task.groups.sizes, 0))
    assert whole == pytest.approx(task.base_accuracy, abs=0.05)


def test_batch_norm_statistics_are_those_of_the_calibration_images(resnet):
    module = cut(halved(resnet, 0))
    recalibrate(module, resnet.module, resnet.train)
    images = resnet.train.normalise(resnet.train.images)
    with torch.no_grad():
        stem = module.get_submodule("conv1")(images)
    norm = module.get_submodule("bn1")
    assert torch.allclose(norm.running_mean, stem.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(norm.running_var, stem.var((0, 2, 3)), rtol=1e-3)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {layer.momentum for layer in norms} == {0.1}
    assert not any(layer.training for layer in norms)


def test_dropout_makes_no_two_recalibrations_of_one_candidate(cnet):
    def once() -> dict[str, torch.Tensor]:
        module = cut(halved(cnet, 0))
        module.register_forward_pre_hook(lambda _, given: nn.functional.dropout(given[0], 0.5))
        recalibrate(module, cnet.module, cnet.train)
        return module.state_dict()

    first, second = once(), once()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_without_batch_norm_inputs_are_rescaled_by_what_their_producer_kept(cnet, monkeypatch):
    monkeypatch.setattr(fidelities, "_small_steps", lambda *_: None)
    widths = (16, 8, 32, 16, 4, 16)
    plain, scaled = (cut(Candidate(cnet, widths, 1)) for _ in range(2))
    recalibrate(scaled, cnet.module, cnet.train)
    factors = {"conv1": 1, "conv2": 2, "conv3": 4, "conv4": 1, "conv5": 2, "conv6": 8, "fc": 2}
    for name, factor in factors.items():
        before, after = plain.get_submodule(name), scaled.get_submodule(name)
        assert torch.allclose(after.weight, before.weight * factor), name
        assert torch.equal(after.bias, before.bias)


def test_a_sample_is_fixed_and_mixes_the_classes():
    data = stripes(400, 0)
    part = sample(data, 100)
    assert torch.equal(part.images, sample(data, 100).images)
    assert part.labels.bincount(minlength=4).min() > 10
    assert len(sample(data, None)) == 400


def test_bad_tasks_are_refused(cnet, resnet):
    with pytest.raises(ZooError, match="one architecture"):
        check_tasks([resnet, cnet])
    fresh = build_model("cnet", 4, image_size=8)
    groups = channel_groups(fresh, torch.zeros(1, 3, 8, 8))
    nn.init.zeros_(fresh.get_submodule("fc").weight)
    with pytest.raises(ZooError, match="near chance"):
        make_task("untrained", fresh, groups, cnet.train, cnet.val)


def test_an_evaluation_is_paid_for_once(cnet, tmp_path):
    fidelity, other = Counted("one"), Counted("other")
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        evaluator = Evaluator(ledger)
        candidates = [halved(cnet, seed) for seed in (1, 2, 1)]
        assert evaluator(candidates, fidelity, ["a", "b", "c"]) == [0.6, 0.7, 0.6]
        assert (len(fidelity.calls), evaluator.measured, evaluator.spent[0]) == (2, 2, 2)
        assert {row.key.seed: row.source for row in ledger} == {1: "a", 2: "b"}
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        again = Evaluator(ledger)
        assert again([halved(cnet, 2)] * 2, fidelity) == [0.7] * 2
        assert (len(fidelity.calls), again.measured, again.spent[0]) == (2, 0, 1)
        again([halved(cnet, 2)], other)
        again([Candidate(cnet, (1,) * 6, 2)], fidelity)
        assert (len(fidelity.calls), len(other.calls)) == (3, 1)


def test_what_a_measurement_depends_on_tells_ledger_keys_apart(cnet):
    """The same images normalised, mirrored or trained on otherwise give other accuracies."""
    fidelity, ledger = Counted("one"), Ledger()
    variants = [
        cnet,
        replace(cnet, val=replace(cnet.val, mean=(0.4,) * 3)),
        replace(cnet, train=replace(cnet.train, flip=True)),
        replace(cnet, train=cnet.train.subset(torch.arange(100))),
        replace(cnet, network="another"),
    ]
    Evaluator(ledger)([halved(task, 1) for task in variants], fidelity)
    assert len(ledger) == len(fidelity.calls) == len(variants)


def test_a_fine_tune_that_diverges_keeps_nothing(cnet):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = Recipe(epochs=1, lr=1e30, augment=False, clip_norm=None, warmup=0.0)
        assert FineTuning(recipe).measure(halved(cnet, 0)) == 0.0


@pytest.mark.parametrize("seed", [math.nan, math.inf, 6, -6])
def test_what_is_no_accuracy_is_refused_and_not_kept(cnet, seed):
    ledger = Ledger()
    with pytest.raises(ZooError, match=r"accuracy of .* by broken"):
        Evaluator(ledger)([halved(cnet, 1), halved(cnet, seed)], Counted("broken"))
    assert [row.accuracy for row in ledger] == [0.6]


def test_fidelity_names_tell_their_settings_apart():
    recipe = Recipe(epochs=1)
    names = [
        Recalibration().name,
        Recalibration(1024).name,
        Recalibration(2048, 500).name,
        FineTuning(recipe).name,
        FineTuning(recipe, 500).name,
        FineTuning(Recipe(epochs=1, lr=0.01)).name,
        FromScratch(recipe).name,
        Distilled().name,
        Distilled(50).name,
        Distilled(lr=0.1).name,
        Distilled(calibration_images=512).name,
    ]
    assert len(set(names)) == len(names)
    assert FineTuning(Recipe(epochs=1)).name == FineTuning(recipe).name


@pytest.mark.parametrize("name", ["cnet", "resnet"])
def test_distillation_repeats_itself_and_beats_recalibration(name, request, monkeypatch):
    monkeypatch.setattr(fidelities, "SGD_STEPS", 5)
    task = request.getfixturevalue(name)
    before = {key: tensor.clone() for key, tensor in task.module.state_dict().items()}
    thin = [Candidate(task, tuple(max(1, s // 8) for s in task.groups.sizes), n) for n in range(3)]
    ledger = Ledger()
    evaluator = Evaluator(ledger)
    cheap = evaluator(thin, Recalibration(256))
    distilled = evaluator(thin, Distilled(30, calibration_images=256))
    assert sum(distilled) > sum(cheap)
    assert len(ledger) == 6
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    assert Distilled(30, calibration_images=256).measure(thin[1]) == distilled[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not task.module.training
    after = task.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_distillation_that_diverges_keeps_nothing(cnet):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Distilled(8, lr=1e30, calibration_images=128).measure(halved(cnet, 0)) == 0.0


def test_a_sibling_has_the_widths_and_none_of_the_weights(cnet):
    candidate = halved(cnet, 0)
    fine_tuned, sibling = cut(candidate), FromScratch(Recipe(epochs=1)).start(candidate)
    weights = dict(fine_tuned.named_parameters())
    for name, tensor in sibling.named_parameters():
        assert tensor.shape == weights[name].shape
        if tensor.ndim > 1:
            assert not torch.isclose(tensor, weights[name]).any()
    again = FromScratch(Recipe(epochs=1)).start(candidate)
    assert all(map(torch.equal, sibling.parameters(), again.parameters()))


def test_an_interrupted_fine_tune_leaves_no_row(cnet, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    fidelity = FineTuning(Recipe(epochs=1, augment=False))
    assert 0 <= fidelity.measure(halved(cnet, 0)) <= 1
    monkeypatch.setattr("zoo.training.engine.Engine.train", interrupted)
    ledger = Ledger()
    with pytest.raises(KeyboardInterrupt):
        Evaluator(ledger)([halved(cnet, 0)], fidelity)
    assert len(ledger) == 0


def test_live_features_are_those_of_the_network_that_was_cut(resnet):
    candidate = halved(resnet, 4)
    module = recalibrated(candidate, 512)
    pruned = channel_groups(module, torch.zeros(1, 3, 8, 8))
    direct = fidelities.layer_features(module, pruned, sample(resnet.val, 512))
    kept = plan_of(candidate).kept
    for group, live, own in zip(pruned.groups, live_features(candidate, 512), direct, strict=True):
        inside = list(kept[group.name])
        np.testing.assert_allclose(live[inside], own, rtol=1e-3, atol=1e-9)
        assert not np.delete(live, inside).any()


def test_under_masks_the_network_is_what_surgery_would_make_of_it(resnet):
    """In one training step: the same loss and gradients as the network cut to the drawn widths."""
    dense = copy.deepcopy(resnet.module).train()
    wrapper = RandomlyMasked(dense, resnet.groups, seed=3).train()
    kept = RandomlyMasked(dense, resnet.groups, seed=3)._kept()
    widths = {name: len(channels) for name, channels in kept.items()}
    scores = [[float(c in kept[g.name]) for c in range(g.size)] for g in resnet.groups.groups]
    plan = make_plan(
        resnet.groups, widths, scores,
        profile="", metric="params", asked=1, criterion="", seed=0,
    )  # fmt: skip
    pruned = apply(dense, resnet.groups, plan).train()
    images = resnet.train.normalise(resnet.train.images[:32])
    ours, theirs = wrapper(images), pruned(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    grads = dict(dense.named_parameters())
    for name, dims in kept_positions(resnet.groups, plan.kept).items():
        if name not in grads:
            continue
        full = grads[name].grad
        part = full
        for dim, index in dims.items():
            part = part.index_select(dim, torch.from_numpy(index))
        own = pruned.get_parameter(name).grad
        torch.testing.assert_close(part, own, rtol=1e-2, atol=1e-3)
        assert full.abs().sum() == pytest.approx(float(part.abs().sum()), rel=1e-4)


def test_training_under_masks_helps_what_is_cut_from_it(resnet):
    candidates = [halved(resnet, seed) for seed in range(4)]
    twin = copy.deepcopy(resnet.module)
    recipe = Recipe(epochs=3, lr=0.05, augment=False, batch_size=64)
    train_under_masks(twin, resnet.groups, resnet.train, recipe)
    assert not twin.training
    task = make_task("masked", twin, resnet.groups, resnet.train, resnet.val)
    fidelity = Recalibration(256)
    before = [fidelity.measure(candidate) for candidate in candidates]
    after = [fidelity.measure(replace(candidate, task=task)) for candidate in candidates]
    assert sum(after) > sum(before)
