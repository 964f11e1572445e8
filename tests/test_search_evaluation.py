from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.data import ImageSet
from zoo.errors import ZooError
from zoo.models import build_model
from zoo.pruning.graph import channel_groups
from zoo.search import evaluation
from zoo.search.evaluation import (
    Evaluator,
    Fidelity,
    Task,
    check_tasks,
    cut,
    make_task,
    recalibrate,
    recalibrated_accuracy,
    recalibration,
    sample,
    short_finetune,
    short_finetune_accuracy,
)
from zoo.search.ledger import Ledger
from zoo.training import Recipe, finetune


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


def halves(task: Task) -> tuple[int, ...]:
    return tuple(size // 2 for size in task.groups.sizes)


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
    first = recalibrated_accuracy(task, halves(task), seed=3, calibration_images=256)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert recalibrated_accuracy(task, halves(task), seed=3, calibration_images=256) == first
    assert not task.module.training
    for key, tensor in task.module.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", ["cnet", "resnet"])
def test_recalibration_repairs_what_pruning_broke(name, request):
    task = request.getfixturevalue(name)
    broken, repaired = [], []
    for seed in range(4):
        module = cut(task, halves(task), seed)
        broken.append(evaluation.evaluate(module, task.val).accuracy)
        recalibrate(module, task.module, task.train)
        repaired.append(evaluation.evaluate(module, task.val).accuracy)
    assert sum(repaired) > sum(broken)
    whole = recalibrated_accuracy(task, task.groups.sizes, seed=0)
    assert whole == pytest.approx(task.base_accuracy, abs=0.05)


def test_batch_norm_statistics_are_those_of_the_calibration_images(resnet):
    module = cut(resnet, halves(resnet), 0)
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


def test_without_batch_norm_inputs_are_rescaled_by_what_their_producer_kept(cnet, monkeypatch):
    monkeypatch.setattr(evaluation, "_small_steps", lambda *_: None)
    widths = (16, 8, 32, 16, 4, 16)
    plain, scaled = cut(cnet, widths, 1), cut(cnet, widths, 1)
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
    calls = []

    def measure(_task, widths, seed):
        calls.append((widths, seed))
        return 0.5 + seed / 10

    fidelity, other = Fidelity("one", measure), Fidelity("other", measure)
    evaluator = Evaluator(Ledger(tmp_path / "ledger.jsonl"))
    assert [evaluator(cnet, halves(cnet), seed, fidelity) for seed in (1, 2, 1)] == [0.6, 0.7, 0.6]
    assert (len(calls), evaluator.measured, evaluator.replayed) == (2, 2, 1)
    again = Evaluator(Ledger(tmp_path / "ledger.jsonl"))
    assert again(cnet, halves(cnet), 2, fidelity) == 0.7
    assert len(calls) == 2
    again(cnet, halves(cnet), 2, other)
    again(cnet, (1,) * 6, 2, fidelity)
    assert len(calls) == 4


def test_fidelity_names_tell_their_settings_apart():
    recipe = Recipe(epochs=1)
    names = [
        recalibration().name,
        recalibration(1024).name,
        recalibration(2048, 500).name,
        short_finetune(recipe).name,
        short_finetune(recipe, 500).name,
        short_finetune(Recipe(epochs=1, lr=0.01)).name,
    ]
    assert len(set(names)) == len(names)
    assert short_finetune(Recipe(epochs=1)).name == short_finetune(recipe).name


def test_an_interrupted_fine_tune_leaves_no_row(cnet, tmp_path, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    evaluator = Evaluator(Ledger(tmp_path / "ledger.jsonl"))
    recipe = Recipe(epochs=1, augment=False)
    accuracy = short_finetune_accuracy(cnet, halves(cnet), seed=0, recipe=recipe)
    assert 0 <= accuracy <= 1
    monkeypatch.setattr("zoo.training._train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluator(cnet, halves(cnet), 0, short_finetune(recipe))
    assert len(Ledger(tmp_path / "ledger.jsonl")) == 0
