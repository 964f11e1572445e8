"""What fine-tuning gives back: the best weights, whatever happens, and what it says of them."""

from __future__ import annotations

import copy
import math
import random
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from toy import QUICK, network, same, weights

from zoo.data.datasets import ImageSet
from zoo.errors import DivergenceError, ZooError
from zoo.training import engine
from zoo.training import finetuning as training
from zoo.training.finetuning import evaluate, finetune
from zoo.training.recipes import RECIPES


def modes(model: nn.Module) -> list[bool]:
    return [layer.training for layer in model.modules()]


def scripted_accuracies(monkeypatch, *accuracies: float) -> list[dict[str, torch.Tensor]]:
    """Make validation report `accuracies` in turn; the list collects the weights it saw."""
    snapshots: list[dict[str, torch.Tensor]] = []

    def scripted(model: nn.Module, *_: object, **__: object) -> training.Evaluation:
        snapshots.append(weights(model))
        return training.Evaluation(accuracies[len(snapshots) - 1], 0.0, 1)

    monkeypatch.setattr(training, "evaluate", scripted)
    return snapshots


def test_a_separable_set_is_learned_and_the_result_says_so(toy_images):
    model = network()
    before = evaluate(model, toy_images).accuracy
    result = finetune(model, toy_images, toy_images, recipe=replace(QUICK, epochs=8), cpu=True)
    assert result.initial == before < 0.8
    assert result.accuracy == evaluate(model, toy_images).accuracy == 1.0
    assert [record.epoch for record in result.history] == list(range(1, 9))
    assert result.history[-1].loss < result.history[0].loss
    assert not result.interrupted
    assert result.device == "cpu"
    assert not model.training


def test_the_best_weights_are_kept_though_later_epochs_are_worse(toy_images, monkeypatch):
    snapshots = scripted_accuracies(monkeypatch, 0.1, 0.5, 0.9, 0.3, 0.2)
    model = network()
    result = finetune(model, toy_images, toy_images, recipe=replace(QUICK, epochs=4))
    assert (result.initial, result.accuracy, result.epoch) == (0.1, 0.9, 2)
    assert [record.accuracy for record in result.history] == [0.5, 0.9, 0.3, 0.2]
    assert same(weights(model), snapshots[2])
    assert not same(weights(model), snapshots[4])


def test_without_validation_nothing_is_measured_and_the_last_weights_stay(toy_images, monkeypatch):
    measured, unmeasured = network(), network()
    finetune(measured, toy_images, toy_images, recipe=QUICK)
    monkeypatch.setattr("zoo.training.finetuning.evaluate", None)
    result = finetune(unmeasured, toy_images, None, recipe=QUICK)
    assert (result.initial, result.accuracy, result.epoch) == (None, None, QUICK.epochs)
    assert [record.accuracy for record in result.history] == [None] * QUICK.epochs
    assert same(weights(unmeasured), weights(measured))  # QUICK's last epoch is its best


def test_training_that_only_harms_gives_the_first_weights_back(toy_images, monkeypatch):
    scripted_accuracies(monkeypatch, 0.9, 0.5, 0.4, 0.3)
    model = network()
    before = weights(model)
    assert finetune(model, toy_images, toy_images, recipe=QUICK).epoch == 0
    assert same(weights(model), before)


def test_ctrl_c_keeps_the_best_weights_so_far(toy_images, monkeypatch):
    snapshots = scripted_accuracies(monkeypatch, 0.1, 0.7, 0.6)
    model = network()
    steps = 0

    def interrupt(*_: object) -> None:
        nonlocal steps
        steps += model.training
        if steps == 15:  # six steps an epoch: in the middle of the third
            raise KeyboardInterrupt

    model[0].register_forward_hook(interrupt)
    result = finetune(model, toy_images, toy_images, recipe=QUICK)
    assert result.interrupted
    assert (result.accuracy, result.epoch, len(result.history)) == (0.7, 1, 2)
    assert same(weights(model), snapshots[1])
    assert not model.training


def test_ctrl_c_while_an_epoch_is_noted_leaves_the_one_before_whole(toy_images, monkeypatch):
    scripted_accuracies(monkeypatch, 0.1, 0.5, 0.7)
    kept, original = [], training._snapshot

    def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(original(model))
        return kept[-1]

    monkeypatch.setattr(training, "_snapshot", snapshot)
    model = network()
    result = finetune(model, toy_images, toy_images, recipe=QUICK)
    assert (result.accuracy, result.epoch, len(result.history)) == (0.5, 1, 1)
    assert same(weights(model), kept[1])


def test_a_loss_that_is_not_finite_is_an_error_with_the_best_weights_in_place(
    toy_images, monkeypatch
):
    snapshots = scripted_accuracies(monkeypatch, 0.1, 0.7)
    model = network()
    steps = 0

    def poison(*arguments):
        nonlocal steps
        steps += model.training
        return arguments[-1] * math.nan if steps > 8 else None

    model[-1].register_forward_hook(poison)
    with pytest.raises(ZooError, match=r"loss became nan in epoch 2.*epoch 1.*smaller learning"):
        finetune(model, toy_images, toy_images, recipe=QUICK)
    assert same(weights(model), snapshots[1])


def test_a_learning_rate_that_diverges_leaves_finite_weights(toy_images):
    model = network()
    wild = replace(QUICK, lr=1e30, clip_norm=None)
    with pytest.raises(ZooError, match=r"became (nan|inf)"):
        finetune(model, toy_images, toy_images, recipe=wild)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_an_unknown_recipe_names_the_nearest_one(toy_images):
    with pytest.raises(ZooError, match=r"recipe 'standart'. Did you mean 'standard'\?"):
        finetune(network(), toy_images, toy_images, recipe="standart")


class Noisy(Dataset):
    """Images with noise from the three global generators."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self.labels = images.normalise(images.images), images.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return self.images[index] + noise, self.labels[index]


@pytest.mark.parametrize("kind", ["image set", "dataset", "loader"])
def test_the_callers_random_state_is_left_alone(toy_images, kind):
    data = toy_images if kind == "image set" else Noisy(toy_images)
    if kind == "loader":
        data = DataLoader(data, 16, shuffle=True)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    finetune(network(), data, data, recipe=replace(QUICK, epochs=1))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["image set", "dataset"])
def test_training_switches_gradients_on_for_itself(toy_images, switch, kind):
    data = toy_images
    if kind == "dataset":
        data = TensorDataset(toy_images.normalise(toy_images.images), toy_images.labels)
    recipe = replace(QUICK, ema=0.5)
    results = []
    for around in (nullcontext, switch):
        model, teacher = network(), network(seed=9)
        with around():
            finetune(model, data, data, teacher=teacher, recipe=recipe, cpu=True)
            assert torch.is_grad_enabled() == (around is nullcontext)
            assert torch.is_inference_mode_enabled() == (around is torch.inference_mode)
        results.append(weights(model))
        model(torch.zeros(1, 3, 8, 8)).sum().backward()  # it trains on, outside too
    assert same(*results)


def test_a_network_of_inference_tensors_is_one_clear_error(toy_images):
    with torch.inference_mode():
        model = network()
    with pytest.raises(ZooError, match=r"made in torch\.inference_mode\(\).*copy\.deepcopy"):
        finetune(model, toy_images, None, recipe=QUICK)
    trained = copy.deepcopy(model)
    finetune(trained, toy_images, None, teacher=model, recipe=QUICK)
    assert not same(weights(model), weights(trained))


@pytest.mark.parametrize("kind", ["image set", "dataset", "noisy loader"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(toy_images, kind):
    data = toy_images
    if kind == "dataset":
        data = TensorDataset(toy_images.normalise(toy_images.images), toy_images.labels)
    if kind == "noisy loader":
        data = DataLoader(Noisy(toy_images), 16, shuffle=True)
    results = []
    for seed in (4, 4, 5):
        torch.manual_seed(len(results))  # what the caller's generator holds must not matter
        model = network()
        finetune(model, data, data, recipe=replace(QUICK, epochs=1), seed=seed, cpu=True)
        results.append(weights(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_evaluation_restores_the_mode_and_changes_nothing(toy_images):
    model = network().train()
    model[1].eval()  # frozen statistics stay frozen
    before, own = weights(model), modes(model)
    evaluate(model, toy_images)
    assert modes(model) == own
    assert same(weights(model), before)


def test_evaluation_equals_a_plain_count(toy_images):
    model = network().eval()
    with torch.no_grad():
        logits = model(toy_images.normalise(toy_images.images))
    measured = evaluate(model, toy_images, batch_size=7)
    assert measured.accuracy == (logits.argmax(1) == toy_images.labels).double().mean().item()
    assert measured.loss == pytest.approx(
        functional.cross_entropy(logits, toy_images.labels).item(), rel=1e-5
    )


def test_distillation_comes_closer_to_the_teacher_than_plain_training(toy_images):
    teacher = network(seed=9)
    finetune(teacher, toy_images, toy_images, recipe=replace(QUICK, epochs=8))
    # Labels without meaning: only the teacher knows what the images are.
    shuffled = replace(toy_images, labels=toy_images.labels.roll(1))
    frozen = weights(teacher)

    def distance(recipe_teacher: nn.Module | None) -> float:
        student = network(seed=1)
        finetune(student, shuffled, toy_images, teacher=recipe_teacher, recipe=QUICK)
        inputs = toy_images.normalise(toy_images.images)
        with torch.no_grad():
            ours, theirs = student(inputs).log_softmax(1), teacher(inputs).log_softmax(1)
        return functional.kl_div(ours, theirs, log_target=True, reduction="batchmean").item()

    assert distance(teacher) < distance(None)
    assert same(weights(teacher), frozen)


@pytest.mark.parametrize("training_mode", [True, False])
def test_a_teacher_teaches_in_eval_mode_and_is_in_its_own_afterwards(toy_images, training_mode):
    teacher = network(seed=9).train(training_mode)
    teacher[1].train(not training_mode)
    before, frozen, seen = modes(teacher), weights(teacher), []
    layout = teacher[0].weight.stride()

    def look(*_: object) -> None:
        seen.extend(modes(teacher))
        assert teacher[0].weight.is_contiguous(memory_format=torch.channels_last)

    teacher.register_forward_hook(look)
    finetune(network(), toy_images, toy_images, teacher=teacher, recipe=replace(QUICK, epochs=1))
    assert seen
    assert not any(seen)
    assert modes(teacher) == before
    assert teacher[0].weight.stride() == layout
    assert same(weights(teacher), frozen)


def test_named_recipes_differ_by_their_length():
    assert RECIPES["quick"].epochs < RECIPES["standard"].epochs < RECIPES["long"].epochs


def test_no_progress_bar_is_drawn_unless_asked(toy_images, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    finetune(network(), toy_images, toy_images, recipe=replace(QUICK, epochs=1))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    finetune(network(), toy_images, toy_images, recipe=replace(QUICK, epochs=1), progress=True)
    assert "img/s" in capsys.readouterr().err


@pytest.mark.gpu
def test_training_runs_on_cuda_and_cpu_in_one_process(toy_images: ImageSet):
    for cpu, kind in ((False, "cuda"), (True, "cpu"), (False, "cuda")):
        model = network()
        result = finetune(model, toy_images, toy_images, recipe=replace(QUICK, epochs=8), cpu=cpu)
        assert result.device.startswith(kind)
        assert next(model.parameters()).device.type == kind
        assert result.accuracy > 0.95


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"compile": True},
        {"compile": True, "accumulate": 2},
        {"ema": 0.5},
        {"mixup": 0.4, "cutmix": 1.0},
        {"rand_augment": 5},
        {"distill": 0.5},
        {"accumulate": 2},
    ],
    ids=str,
)
def test_every_ingredient_learns_on_cuda_and_resumes(toy_images, tmp_path, monkeypatch, change):
    recipe = replace(QUICK, epochs=16, **change)
    teacher = network(seed=9)
    finetune(teacher, toy_images, toy_images, recipe=replace(QUICK, epochs=8))
    options = {"recipe": recipe, "teacher": teacher if "distill" in change else None}
    model = network()
    result = finetune(model, toy_images, toy_images, **options)
    assert result.device.startswith("cuda")
    assert result.accuracy > 0.95
    assert evaluate(model, toy_images).accuracy == result.accuracy
    original, passes = engine.Engine.train, 0

    def interrupted(self: engine.Engine, tell: object) -> float:
        nonlocal passes
        passes += 1
        if passes == 4:
            raise KeyboardInterrupt
        return original(self, tell)

    again = network()
    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "train", interrupted)
        finetune(again, toy_images, toy_images, checkpoint=tmp_path, **options)
    resumed = finetune(again, toy_images, toy_images, checkpoint=tmp_path, resume=True, **options)
    assert len(resumed.history) == 16
    assert resumed.accuracy > 0.95


class Exploding(nn.Module):
    """Outputs that are not finite in eval mode, as of half-precision statistics gone wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images) / (1.0 if self.training else 0.0)


def test_outputs_or_weights_that_are_not_finite_are_never_the_best(toy_images, monkeypatch):
    with pytest.raises(DivergenceError, match="validation loss is nan before training"):
        finetune(Exploding(), toy_images, toy_images, recipe=QUICK)
    before = weights(model := network())
    step = engine.Engine._step

    def last_step_explodes(self):
        step(self)
        if self._schedule.last_epoch == len(self.batches):
            self.model[0].weight.data[0] = math.inf

    monkeypatch.setattr(engine.Engine, "_step", last_step_explodes)
    with pytest.raises(DivergenceError, match=r"0\.weight is not finite after epoch 1"):
        finetune(model, toy_images, None, recipe=replace(QUICK, epochs=1))
    assert same(before, weights(model))


def test_any_whole_seed_is_taken(toy_images):
    for seed in (2**63, -1):
        finetune(network(), toy_images, None, recipe=replace(QUICK, epochs=1), seed=seed)
    with pytest.raises(ZooError, match="seed must be an integer"):
        finetune(network(), toy_images, None, recipe=QUICK, seed=0.5)
