"""Iterative pruning: the factor, nesting, and a record that says the whole cut; and rewinding."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import randomised
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import zoo
from zoo.data.datasets import ImageSet
from zoo.errors import CheckpointError, DataError, GraphError, ZooError
from zoo.iterative import IterativeResult, Schedule, prune_iteratively
from zoo.models import build_model, parameter_count
from zoo.spec.plans import Source, kept_positions
from zoo.surgery.surgery import apply, named_tensors
from zoo.tracing import operators, shape_rules
from zoo.tracing.graph import channel_groups
from zoo.training.recipes import Recipe

ONCE = Recipe(epochs=1, batch_size=32, lr=0.01, precision="fp32")
STILL = replace(ONCE, lr=0.0, weight_decay=0.0)


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


class Branches(nn.Module):
    """A concatenation, a residual sum, a depthwise convolution and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(14)
        self.deep = nn.Conv2d(14, 14, 3, padding=1, groups=14)
        self.narrow = nn.Conv2d(14, 8, 1)
        self.fc = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        x = torch.relu(self.norm(torch.cat([left, self.right(x)], 1)))
        x = torch.relu(self.narrow(self.deep(x)) + left)
        return self.fc(nn.functional.avg_pool2d(x, 2).flatten(1))


class Grouped(nn.Module):
    """Grouped convolutions, plain and transposed, beside a depthwise one, which a cut may equal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 64, 3, padding=1, groups=4)
        self.narrow, self.up = nn.Conv2d(64, 12, 1), nn.ConvTranspose2d(12, 12, 2, 2, groups=12)
        self.mix, self.out = nn.Conv2d(12, 8, 1), nn.ConvTranspose2d(8, 16, 2, groups=4)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(torch.relu(self.norm(self.stem(x))))
        x = self.mix(torch.relu(self.up(self.narrow(torch.relu(x)))))
        return self.fc(torch.relu(self.out(x)).mean((2, 3)))


def pruned(images: ImageSet, schedule: Schedule, module: nn.Module | None = None):
    live = module or randomised(Branches())
    return prune_iteratively(live, images, images, schedule, example_input=torch.zeros(1, 3, 8, 8))


def assert_sound(result: IterativeResult, steps: int, cf: float) -> None:
    """Factors are geometric and met, kept sets are nested, and the last plan is the record's."""
    plans = [step.plan for step in result.steps]
    assert len(plans) == steps
    assert result.model.pruning.plan == plans[-1]
    assert plans[-1].asked == cf
    for number, plan in enumerate(plans, 1):
        assert plan.got == pytest.approx(plans[-1].got ** (number / steps), rel=0.1)
    for before, after in itertools.pairwise(plans):
        assert after.got > before.got
        for name, kept in after.kept.items():
            assert set(kept) <= set(before.kept[name])
    assert parameter_count(result.model) == plans[-1].pruned.params


@pytest.mark.parametrize("criterion", ["random", "fpgm", "taylor"])
def test_a_live_network_is_cut_in_nested_steps(toy_images: ImageSet, criterion: str) -> None:
    module = randomised(Branches())
    before = copy.deepcopy(module.state_dict())
    schedule = Schedule(cf=4, steps=3, criterion=criterion, recipe=ONCE)
    result = pruned(toy_images, schedule, module)
    assert_sound(result, 3, 4)
    once = zoo.prune(module, torch.zeros(1, 3, 8, 8), cf=4).pruning.plan
    assert result.steps[-1].plan.widths == once.widths
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_the_callers_switched_off_gradients_do_not_matter(
    toy_images: ImageSet, switch: type[torch.no_grad]
) -> None:
    schedule = Schedule(cf=2, steps=2, criterion="taylor", recipe=ONCE)
    expected = pruned(toy_images, schedule, randomised(Branches())).model.state_dict()
    with switch():
        result = pruned(toy_images, schedule, randomised(Branches()))
    assert_sound(result, 2, 2)
    got = result.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


@pytest.mark.parametrize(("kind", "cf", "steps"), [(Branches, 3, 4), (Grouped, 8, 6)])
def test_in_steps_without_training_it_is_the_whole_cut_at_once(
    toy_images: ImageSet, kind: type[nn.Module], cf: float, steps: int
) -> None:
    """What is left equals surgery on the dense network with the composed indices, bit for bit."""
    module = randomised(kind())
    module.norm.momentum = 0.0
    schedule = Schedule(cf, steps, "equal", criterion="l2", recipe=STILL)
    result = pruned(toy_images, schedule, module)
    groups = channel_groups(module, torch.zeros(1, 3, 8, 8))
    at_once = apply(module, groups, result.steps[-1].plan)
    assert repr(result.model) == repr(at_once)
    for name, tensor in named_tensors(at_once).items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(named_tensors(result.model)[name], tensor), name


def test_a_registered_architecture_round_trips(toy_images: ImageSet, tmp_path: Path) -> None:
    dense = randomised(build_model("resnet20-16", 3))
    schedule = Schedule(cf=4, steps=2, profile="searched", criterion="l1", recipe=ONCE)
    result = prune_iteratively(
        dense.state_dict(), toy_images, toy_images, schedule, arch="resnet20-16"
    )
    plan, record = result.steps[-1].plan, result.model.pruning
    assert plan.widths == zoo.load("resnet20-16", 4, dense).pruning.plan.widths
    assert (record.architecture, record.source.reference) == ("resnet20-16", "state dict")
    images = torch.rand(4, 3, 32, 32)
    again = zoo.load_pruned(zoo.save(result.model, tmp_path / "model"))
    assert again.pruning == record
    assert torch.equal(again(images), result.model.cpu()(images))


def test_a_live_network_round_trips(toy_images: ImageSet, tmp_path: Path) -> None:
    result = pruned(toy_images, Schedule(cf=3, steps=2, recipe=ONCE))
    images = torch.rand(4, 3, 8, 8)
    again = zoo.load_pruned(zoo.save(result.model, tmp_path / "model"), skeleton=Branches())
    assert again.pruning == result.model.pruning
    assert torch.equal(again(images), result.model.cpu()(images))


def test_limits_and_metric_hold_in_steps(toy_images: ImageSet) -> None:
    schedule = Schedule(cf=2, steps=2, metric="macs", keep={"right": 0.5}, recipe=ONCE)
    result = pruned(toy_images, schedule)
    plan = result.steps[-1].plan
    assert_sound(result, 2, 2)
    assert plan.widths["right"] == 3
    assert plan.got == plan.dense.macs / plan.pruned.macs == pytest.approx(2, rel=0.1)
    even = pruned(toy_images, Schedule(cf=3, steps=3, align=2, recipe=ONCE)).steps[-1].plan
    assert all(width % 2 == 0 for width in even.widths.values())


def test_an_interrupted_training_is_the_last_step(
    toy_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: object, **_options: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.training.engine.Engine.train", interrupt)
    result = pruned(toy_images, Schedule(cf=4, steps=3, recipe=ONCE))
    (step,) = result.steps
    assert step.training.interrupted
    assert result.model.pruning.plan == step.plan
    assert step.plan.got < 2


def test_one_step_is_one_shot(toy_images: ImageSet) -> None:
    module = randomised(Branches())
    for profile in ("equal", "best"):
        asked = {"cf": 3, "seed": 5, "profile": profile}
        (step,) = pruned(toy_images, Schedule(steps=1, recipe=ONCE, **asked), module).steps
        at_once = zoo.plan(module, torch.zeros(1, 3, 8, 8), data=toy_images, **asked)
        assert step.plan == at_once


def test_what_cannot_be_meant_is_an_error(toy_images: ImageSet) -> None:
    network = Branches()
    with pytest.raises(ZooError, match="steps must be an integer of at least 1, got 0"):
        pruned(toy_images, Schedule(cf=2, steps=0))
    with pytest.raises(ZooError, match="arch= for a checkpoint, or example_input="):
        prune_iteratively(network, toy_images, toy_images, Schedule(cf=2))
    with pytest.raises(ZooError, match=r"Did you mean 'taylor'"):
        pruned(toy_images, Schedule(cf=2, criterion="tailor"))
    with pytest.raises(ZooError, match="Unknown recipe 'slow'"):
        pruned(toy_images, Schedule(cf=2, recipe="slow"))
    with pytest.raises(ZooError, match=r"a zoo\.Schedule, got dict"):
        pruned(toy_images, {"cf": 2})
    with pytest.raises(DataError, match=r"train data must be a torch Dataset or .*; got list"):
        pruned([], Schedule(cf=2))
    stream, example = DataLoader(Stream()), torch.zeros(1, 3, 8, 8)
    for train, val in ((stream, toy_images), (toy_images, stream)):
        with pytest.raises(DataError, match="has no length to plan a training by"):
            prune_iteratively(network, train, val, Schedule(cf=2), example_input=example)


def test_data_sets_go_by_their_names_as_in_finetune() -> None:
    network, schedule = build_model("cnet", 10, image_size=8), Schedule(cf=2, steps=1, recipe=ONCE)
    digits = zoo.load_data("digits", size=8)
    named, given = (
        prune_iteratively(network, train, val, schedule, example_input=torch.zeros(1, 3, 8, 8))
        for train, val in (("digits", "digits"), (digits.train, digits.val))
    )
    for name, tensor in named_tensors(named.model).items():
        assert torch.equal(tensor, named_tensors(given.model)[name])


# --- rewinding ------------------------------------------------------------------------------------


def test_rewound_weights_are_the_early_ones_of_the_channels_chosen_late(dense: nn.Module) -> None:
    early = build_model("resnet20-16", 7, seed=3)
    options = {"profile": "equal", "criterion": "l1"}
    late = zoo.load("resnet20-16", 3, dense, **options)
    model = zoo.load("resnet20-16", 3, dense, init="rewound", rewind=early, **options)
    assert (model.pruning.init, late.pruning.init) == ("rewound", "pretrained")
    assert (model.pruning.rewind, late.pruning.rewind) == (Source("module"), None)
    assert model.pruning.plan == late.pruning.plan
    assert model.pruning.plan != zoo.load("resnet20-16", 3, early, **options).pruning.plan
    groups = channel_groups(dense, torch.zeros(1, 3, 32, 32))
    kept = kept_positions(groups, model.pruning.plan.kept)
    for name, tensor in named_tensors(model).items():
        expected = named_tensors(early)[name].detach()
        for dim, index in kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(index))
        assert torch.equal(tensor, expected), name


def test_rewinding_and_its_checkpoint_need_each_other(dense: nn.Module) -> None:
    with pytest.raises(ZooError, match=r"init='rewound' without rewind="):
        zoo.load("resnet20-16", 2, dense, profile="equal", init="rewound")
    with pytest.raises(ZooError, match=r"init='random' with rewind="):
        zoo.load("resnet20-16", 2, dense, profile="equal", init="random", rewind=dense)
    early = build_model("resnet20-16", 3)
    with pytest.raises(ZooError, match="rewind= has 3 classes, weights= has 7"):
        zoo.load("resnet20-16", 2, dense, profile="equal", init="rewound", rewind=early)
    other = build_model("cnet", 7)
    with pytest.raises(CheckpointError, match="does not fit"):
        zoo.load("resnet20-16", 2, dense, profile="equal", init="rewound", rewind=other)


class Swapped(nn.Module):
    """The halves of a map change places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat(torch.tensor_split(self.a(x), (4,), 1)[::-1], 1)
        return self.fc(torch.relu(self.b(torch.relu(x))).mean((2, 3)))


def test_what_tracing_got_wrong_is_found_before_any_training(
    toy_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(operators.RULES, "tensor_split", shape_rules.parts)
    monkeypatch.setattr("zoo.iterative.finetune", lambda *_, **__: pytest.fail("trained"))
    schedule, x = Schedule(cf=1.5, steps=2, profile="equal", recipe=ONCE), torch.rand(2, 3, 8, 8)
    with pytest.raises(GraphError, match="does not compute what it computes with zeros"):
        prune_iteratively(Swapped(), toy_images, toy_images, schedule, example_input=x)
