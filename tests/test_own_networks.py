"""Networks of one's own: live ones, of other classes, of other images, made in inference mode."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import Net, Sorted, macs_of, same_tensors
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import zoo
from zoo.data.datasets import ImageSet
from zoo.models import build_model, parameter_count
from zoo.surgery.masking import masked
from zoo.tracing.graph import channel_groups
from zoo.training.finetuning import finetune
from zoo.training.recipes import Recipe


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return zoo.create_model("resnet20-16", 10)


# --- live networks --------------------------------------------------------------------------------


def test_plan_is_what_prune_cuts(dense: nn.Module) -> None:
    x = torch.zeros(1, 3, 16, 16)
    options = {"cf": 3, "profile": "greedy", "metric": "macs", "criterion": "l1", "seed": 9}
    pruned = zoo.prune(dense, x, **options)
    assert zoo.plan(dense, x, **options) == pruned.pruning.plan
    assert not hasattr(dense, "pruning")


def test_prune_and_load_agree_on_a_registered_network(dense: nn.Module) -> None:
    pruned = zoo.prune(dense, torch.zeros(1, 3, 32, 32), cf=4, profile="equal")
    loaded = zoo.load("resnet20-16", 4, dense, profile="equal")
    assert same_tensors(pruned, loaded)
    assert pruned.pruning.plan == loaded.pruning.plan


def test_the_size_of_the_example_batch_does_not_matter(dense: nn.Module) -> None:
    one, five = (zoo.plan(dense, torch.zeros(n, 3, 16, 16), cf=2, metric="macs") for n in (1, 5))
    assert one == five
    assert one.dense.macs == macs_of(dense.eval(), 16)


class Normalising(Net):
    """A network that overwrites its input with the normalised one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.sub_(0.4).div_(0.01))


def test_a_network_may_overwrite_its_input_but_not_the_callers(
    recwarn: pytest.WarningsRecorder,
) -> None:
    x = torch.rand(2, 3, 16, 16)
    given = x.clone()
    zoo.prune(Normalising(), x, cf=2, profile="equal")
    assert torch.equal(x, given)
    assert not [warning for warning in recwarn if "could not be verified" in str(warning.message)]


def test_every_layer_keeps_the_mode_it_was_in(dense: nn.Module) -> None:
    mine = copy.deepcopy(dense).train()
    mine.bn1.eval()
    mine.layer2.eval()
    modes = {name: layer.training for name, layer in mine.named_modules()}
    statistics = mine.layer1[0].bn1.running_mean.clone()
    pruned = zoo.prune(mine, torch.rand(4, 3, 16, 16), cf=2)
    assert {name: layer.training for name, layer in mine.named_modules()} == modes
    assert torch.equal(mine.layer1[0].bn1.running_mean, statistics)
    assert not any(layer.training for layer in pruned.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_live_network_keeps_its_data_type(dense: nn.Module, dtype: torch.dtype) -> None:
    mine, x = copy.deepcopy(dense).to(dtype), torch.zeros(1, 3, 16, 16, dtype=dtype)
    pruned = zoo.prune(mine, x, cf=2)
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert pruned(x).dtype == dtype


def test_frozen_parameters_stay_frozen(dense: nn.Module) -> None:
    mine = copy.deepcopy(dense)
    mine.conv1.requires_grad_(False)
    pruned = zoo.prune(mine, torch.zeros(1, 3, 16, 16), cf=2)
    trained = {name for name, p in pruned.named_parameters() if p.requires_grad}
    assert {name for name, _ in pruned.named_parameters()} - trained == {"conv1.weight"}


class Twice(Net):
    """One layer called twice: its inputs and outputs are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Conv2d(8, 8, 3, padding=1)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.mid(torch.relu(self.mid(x))))


class TiedWeights(Twice):
    """Two layers with one weight and two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.mid.weight

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.mid(x))))


class TiedModules(Twice):
    """One layer under two names, with another between its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Conv2d(8, 8, 1)
        self.second = self.mid

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.between(torch.relu(self.mid(x)))))


class Unused(Net):
    """A layer that the forward pass never calls, and that so stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Conv2d(8, 2, 1)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("kind", [Twice, TiedWeights, TiedModules, Unused])
@pytest.mark.parametrize("criterion", ["random", "l1", "taylor"])
def test_layers_that_are_shared_or_unused(kind: type[Net], criterion: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = kind().double().eval(), torch.rand(2, 3, 8, 8).double()
    data = DataLoader([(x, torch.tensor([1, 3]))], batch_size=None)
    pruned = zoo.prune(module, x, cf=2, criterion=criterion, data=data)
    plan = pruned.pruning.plan
    assert (plan.dense.params, plan.pruned.params) == (
        parameter_count(module),
        parameter_count(pruned),
    )
    assert plan.pruned.params < plan.dense.params
    assert (plan.dense.macs, plan.pruned.macs) == (
        macs_of(module.float(), 8),
        macs_of(copy.deepcopy(pruned).float(), 8),
    )
    module.double()
    expected = masked(module, channel_groups(module, x), plan)(x)
    assert torch.allclose(pruned(x), expected, rtol=0, atol=1e-12)
    if kind is TiedWeights:
        assert pruned.mid.weight is pruned.second.weight
    if kind is TiedModules:
        assert pruned.mid is pruned.second
    zoo.save(pruned, tmp_path / "m")
    again = zoo.load_pruned(tmp_path / "m", skeleton=module)
    assert torch.equal(again(x), pruned(x))


class Dense(Net):
    """Logits per position, (N, classes, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.stem(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_the_number_of_classes_is_that_of_the_channel_dimension() -> None:
    assert zoo.prune(Net(), torch.zeros(1, 3, 8, 8), cf=2).pruning.num_classes == 4
    assert zoo.prune(Dense(), torch.zeros(1, 3, 8, 8), cf=2).pruning.num_classes == 4


def test_a_pruned_network_can_be_pruned_again(dense: nn.Module) -> None:
    x = torch.zeros(1, 3, 16, 16)
    once = zoo.prune(dense, x, cf=2)
    twice = zoo.prune(once, x, cf=2)
    assert parameter_count(dense) / parameter_count(twice) == pytest.approx(4, rel=0.03)
    assert twice.pruning.plan.dense == once.pruning.plan.pruned


# --- a new classifier -----------------------------------------------------------------------------


def test_create_model_gives_a_checkpoint_of_other_classes_a_new_classifier() -> None:
    base = zoo.create_model("resnet20-16", 7, seed=1)
    model = zoo.create_model("resnet20-16", 3, pretrained=base, seed=2)
    assert torch.equal(model.conv1.weight, base.conv1.weight)
    assert torch.equal(model.fc.weight, zoo.create_model("resnet20-16", 3, seed=2).fc.weight)


@pytest.mark.parametrize("kept", ["backbone", "all"])
def test_a_new_classifier_is_cut_recorded_and_read_back(
    dense: nn.Module, kept: str, tmp_path: Path
) -> None:
    state = dense.state_dict()
    if kept == "backbone":
        state = {n: t for n, t in state.items() if not n.startswith("fc.")}
    options: dict = {"profile": "equal", "num_classes": 3, "criterion": "l1"}
    model = zoo.load("resnet20-16", 2, state, **options)
    assert model.pruning.num_classes == 3
    assert model.pruning.new_classifier
    assert model.pruning.plan.dense.params == parameter_count(zoo.create_model("resnet20-16", 3))
    assert same_tensors(zoo.load("resnet20-16", 2, state, **options), model)
    other = zoo.load("resnet20-16", 2, state, seed=1, **options)
    assert torch.equal(other.conv1.weight, model.conv1.weight)
    assert not torch.equal(other.fc.weight, model.fc.weight)
    folder = zoo.save(model, tmp_path / "m")
    again = zoo.load_pruned(folder)
    assert again.pruning == model.pruning
    assert same_tensors(again, model)
    assert "Classes: 3; the classifier is new" in (folder / "README.md").read_text()


def test_the_checkpoints_own_number_of_classes_is_no_news(dense: nn.Module, tmp_path: Path) -> None:
    model = zoo.load("resnet20-16", 2, dense, profile="equal", num_classes=10)
    assert same_tensors(model, zoo.load("resnet20-16", 2, dense, profile="equal"))
    assert not model.pruning.new_classifier
    folder = zoo.save(model, tmp_path / "m")
    assert "is new" not in (folder / "README.md").read_text()
    document = json.loads((folder / "pruning.json").read_text())
    del document["new_classifier"]  # as it was written before there was the field
    (folder / "pruning.json").write_text(json.dumps(document))
    assert zoo.load_pruned(folder).pruning == model.pruning


def test_rewound_weights_get_the_same_new_classifier(dense: nn.Module) -> None:
    early = zoo.create_model("resnet20-16", 10, seed=9)
    model = zoo.load(
        "resnet20-16",
        2,
        dense,
        profile="equal",
        num_classes=3,
        criterion="l1",
        init="rewound",
        rewind=early,
    )
    assert (model.pruning.num_classes, model.pruning.new_classifier) == (3, True)
    assert model.fc.out_features == 3


# --- images of other channels ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "channels", "side"), [("timm:resnet18", 1, 64), ("resnet20-16", 1, 16), ("cnet", 4, 8)]
)
def test_a_network_of_other_channels_is_cut_saved_padded_and_exported(
    arch: str, channels: int, side: int, tmp_path: Path
) -> None:
    base = build_model(arch, 5, in_channels=channels, image_size=side if arch == "cnet" else None)
    model = zoo.load(arch, 2, base.state_dict(), profile="equal", image_size=side)
    assert model.pruning.in_channels == channels
    assert model.pruning.plan.dense.macs == macs_of(base, side, channels)
    assert model.pruning.plan.pruned.macs == macs_of(model, side, channels)
    again = zoo.load_pruned(zoo.save(model, tmp_path / "m"))
    assert again.pruning == model.pruning
    assert same_tensors(again, model)
    result = zoo.export(again, tmp_path / "m.onnx")
    assert (result.pad, result.inputs) == (8, "noise")
    images = torch.rand(2, channels, side, side)
    session = zoo.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert torch.allclose(session(images), again(images), atol=1e-4)


def test_a_searched_profile_is_applied_to_images_of_one_channel() -> None:
    base = build_model("resnet20-16", 10, in_channels=1)
    model = zoo.load("resnet20-16", 4, base)
    colour = zoo.load("resnet20-16", 4, build_model("resnet20-16", 10))
    assert model.pruning.plan.widths == colour.pruning.plan.widths
    assert model.pruning.plan.kept == colour.pruning.plan.kept


def test_folders_from_before_the_channels_were_recorded_are_of_colour_images(
    dense: nn.Module, tmp_path: Path
) -> None:
    model = zoo.load("resnet20-16", 2, dense, profile="equal")
    folder = zoo.save(model, tmp_path / "m")
    document = json.loads((folder / "pruning.json").read_text())
    assert document.pop("in_channels") == 3
    (folder / "pruning.json").write_text(json.dumps(document))
    assert zoo.load_pruned(folder).pruning == model.pruning


# --- inside torch.inference_mode() ----------------------------------------------------------------


def losses_while_trained(module: nn.Module, data: Sorted) -> list[float]:
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.05)
    images, labels = data.images, torch.tensor(data.labels)
    losses = []
    for _ in range(5):
        loss = functional.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("how", "criterion"),
    [
        ("load", "random"),
        ("load", "taylor"),
        ("prune", "random"),
        ("prune", "taylor"),
        ("create", ""),
        ("load_pruned", "l1"),
    ],
)
def test_what_is_made_inside_inference_mode_is_the_same_and_trains(
    small: nn.Module, how: str, criterion: str, tmp_path: Path
) -> None:
    data, options = Sorted(), {"profile": "equal", "criterion": criterion}

    def make(weights: nn.Module, x: torch.Tensor) -> nn.Module:
        if how == "prune":
            return zoo.prune(weights, x, cf=2, data=data, **options)
        if how == "create":
            return zoo.create_model("cnet", 10, pretrained=weights)
        made = zoo.load("cnet", 2, weights, data=data, **options)
        if how == "load":
            return made
        zoo.save(made, tmp_path / "m")
        return zoo.load_pruned(tmp_path / "m")

    expected = make(small, torch.zeros(1, 3, 8, 8))
    with torch.inference_mode():
        inner = build_model("cnet", 10, image_size=8)  # its tensors cannot be trained
        models = [make(weights, torch.zeros(1, 3, 8, 8)) for weights in (small, inner)]
        assert torch.is_inference_mode_enabled()
    for model in models:
        assert same_tensors(model, expected)
        assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
        losses = losses_while_trained(model, data)
        assert losses == sorted(losses, reverse=True)
    # and so does pruning afterwards what was made there
    assert same_tensors(make(inner, torch.zeros(1, 3, 8, 8)), expected)


def test_a_network_loaded_inside_inference_mode_can_be_finetuned(
    small: nn.Module, toy_images: ImageSet
) -> None:
    with torch.inference_mode():
        model = zoo.load("cnet", 2, small, profile="equal")
    before = copy.deepcopy(model.state_dict())
    recipe = Recipe(epochs=3, batch_size=16, lr=0.02)
    images = dataclasses.replace(toy_images, classes=tuple("0123456789"))
    result = finetune(model, images, images, recipe=recipe, cpu=True)
    assert result.accuracy > result.initial
    assert not torch.equal(model.conv3.weight, before["conv3.weight"])
