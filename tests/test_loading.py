"""load, prune, plan and create_model do what they say; test_loading_errors.py has the mistakes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.flop_counter import FlopCounterMode

import zoo
import zoo.registry.store as registry
from zoo.data.datasets import ImageSet
from zoo.errors import FactorError, GraphError
from zoo.models import ARCHITECTURES, build_model
from zoo.planning.policies import policy_solution
from zoo.registry.store import stored_groups
from zoo.spec.cost import cost_model
from zoo.spec.profile import Profile, Reference
from zoo.surgery.masking import masked
from zoo.surgery.surgery import named_tensors
from zoo.tracing.graph import channel_groups
from zoo.training.finetuning import finetune
from zoo.training.recipes import Recipe


def profile_of(arch: str, cf: float = 4.0, metric: str = "params") -> Profile:
    """An uneven profile at the architecture's reference, as a search would write it."""
    groups = stored_groups(arch)
    assert groups is not None
    solved = policy_solution("greedy", cost_model(groups), cf, metric)
    return Profile(
        architecture=arch,
        metric=metric,
        cf=cf,
        got=solved.got,
        reference=Reference(10, 32),
        keep_ratios=dict(zip(groups.names, solved.keep_ratios, strict=True)),
        kept=dict(zip(groups.names, solved.widths, strict=True)),
    )


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def macs_of(module: nn.Module, side: int, channels: int = 3) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, channels, side, side))
    return counter.get_total_flops() // 2


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    left, right = named_tensors(a), named_tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return zoo.create_model("resnet20-16", 10)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """cnet for 8-pixel images."""
    return zoo.create_model("cnet", 10, image_size=8)


class Sorted(Dataset):
    """Labelled noise sorted by class, as an image folder is; notes the labels that are read."""

    def __init__(self, count: int = 64, side: int = 8, classes: int = 10) -> None:
        self.images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
        self.labels = (torch.arange(count) * classes // count).tolist()
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.seen.append(self.labels[index])
        return self.images[index], self.labels[index]


# --- a profile is applied verbatim ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "classes", "side"),
    [("resnet20-16", 37, 32), ("resnet20-16", 10, 24), ("cnet", 37, 32), ("cnet", 10, 64)],
)
@pytest.mark.parametrize("given", ["object", "file"])
def test_a_profile_is_applied_verbatim_to_another_network(
    arch: str, classes: int, side: int, given: str, tmp_path: Path
) -> None:
    profile = profile_of(arch)
    profile.write(tmp_path / "p.json")
    reference = profile if given == "object" else f"file:{tmp_path / 'p.json'}"
    base = zoo.create_model(arch, classes, image_size=side)
    model = zoo.load(arch, 4, base, profile=reference, image_size=side)
    plan = model.pruning.plan
    assert plan.widths == profile.kept
    assert plan.asked == 4
    assert plan.got == size_of(base) / size_of(model)
    assert (plan.dense.params, plan.pruned.params) == (size_of(base), size_of(model))
    assert (plan.dense.macs, plan.pruned.macs) == (macs_of(base, side), macs_of(model, side))
    assert model(torch.zeros(2, 3, side, side)).shape == (2, classes)


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_at_its_reference_a_profile_gives_the_factor_it_states(
    dense: nn.Module, metric: str
) -> None:
    profile = profile_of("resnet20-16", metric=metric)
    plan = zoo.load("resnet20-16", 4, dense, profile=profile, metric=metric).pruning.plan
    assert plan.got == profile.got
    assert plan.metric == metric


@pytest.mark.parametrize(
    ("arch", "classes", "side", "metric"),
    [
        ("cnet", 37, 64, "params"),
        ("cnet", 1000, 32, "params"),
        ("resnet20-16", 1000, 32, "params"),
        ("resnet20-16", 37, 64, "macs"),
    ],
)
def test_refit_meets_the_factor_for_this_network(
    arch: str, classes: int, side: int, metric: str
) -> None:
    profile = profile_of(arch, 3.0, metric)
    base = zoo.create_model(arch, classes, image_size=side)
    given = {"profile": profile, "metric": metric, "image_size": side}
    verbatim = zoo.load(arch, 3, base, **given).pruning.plan
    refitted = zoo.load(arch, 3, base, refit=True, **given)
    plan = refitted.pruning.plan
    assert plan.asked == 3
    assert plan.got == pytest.approx(3, rel=0.02)
    if metric == "params":
        assert verbatim.got != pytest.approx(3, rel=0.02)
        assert plan.got == size_of(base) / size_of(refitted)
    # one common factor: whoever keeps the larger share still does
    names = sorted(profile.keep_ratios, key=profile.keep_ratios.__getitem__)
    ratios = [plan.keep_ratios[name] for name in names]
    assert all(b >= a - 1 / 16 for a, b in itertools.pairwise(ratios))


def test_refit_rescales_to_another_factor_and_metric(dense: nn.Module) -> None:
    profile = profile_of("resnet20-16")
    plan = zoo.load(
        "resnet20-16", 2, dense, profile=profile, metric="macs", refit=True
    ).pruning.plan
    assert (plan.metric, plan.asked) == ("macs", 2)
    assert plan.got == plan.dense.macs / plan.pruned.macs == pytest.approx(2, rel=0.02)


def test_prune_takes_factor_and_metric_from_the_profile(dense: nn.Module) -> None:
    profile = profile_of("resnet20-16", 2.0, "macs")
    plan = zoo.plan(dense, torch.zeros(1, 3, 32, 32), profile=profile)
    assert (plan.asked, plan.metric, plan.got) == (2, "macs", profile.got)
    assert plan.widths == profile.kept


# --- which weights --------------------------------------------------------------------------------


def test_kept_weights_are_the_dense_ones_at_the_kept_indices(dense: nn.Module) -> None:
    model = zoo.load("resnet20-16", 4, dense, profile="equal", seed=3)
    kept = model.pruning.plan.kept
    rows, columns = kept["layer2.0.conv2"], kept["layer2.0.conv1"]
    assert 1 < len(rows) < 32
    expected = torch.stack(
        [torch.stack([dense.layer2[0].conv2.weight[r, c] for c in columns]) for r in rows]
    )
    assert torch.equal(model.layer2[0].conv2.weight, expected)
    # the projection writes the same channels and reads those of stage 1
    shortcut = dense.layer2[0].downsample[0].weight
    expected = torch.stack(
        [torch.stack([shortcut[r, c] for c in kept["layer1.0.conv2"]]) for r in rows]
    )
    assert torch.equal(model.layer2[0].downsample[0].weight, expected)
    assert torch.equal(
        model.layer2[0].bn2.running_mean, dense.layer2[0].bn2.running_mean[list(rows)]
    )
    assert torch.equal(model.fc.weight, dense.fc.weight[:, list(kept["layer3.0.conv2"])])
    assert torch.equal(model.fc.bias, dense.fc.bias)


def test_a_flattened_map_keeps_all_positions_of_a_kept_channel() -> None:
    base = zoo.create_model("cnet", 5, image_size=24)  # a map of 3 x 3 per channel
    model = zoo.load("cnet", 2, base, profile="equal")
    columns = [9 * channel + n for channel in model.pruning.plan.kept["conv6"] for n in range(9)]
    assert torch.equal(model.fc.weight, base.fc.weight[:, columns])


def test_the_seed_decides_the_channels_and_nothing_else_does(dense: nn.Module) -> None:
    first = zoo.load("resnet20-16", 4, dense, profile="equal", seed=1)
    torch.manual_seed(123)
    again = zoo.load("resnet20-16", 4, dense, profile="equal", seed=np.int64(1))
    other = zoo.load("resnet20-16", 4, dense, profile="equal", seed=2)
    assert same_tensors(first, again)
    assert first.pruning == again.pruning
    assert other.pruning.plan.widths == first.pruning.plan.widths
    pairs = zip(first.pruning.plan.kept.values(), other.pruning.plan.kept.values(), strict=True)
    assert all(a != b for a, b in pairs)


@pytest.mark.parametrize("kind", ["module", "state dict", "nested"])
def test_the_callers_weights_are_neither_changed_nor_shared(dense: nn.Module, kind: str) -> None:
    mine = copy.deepcopy(dense).train()
    weights = {"module": mine, "state dict": mine.state_dict(), "nested": {"model": mine}}[kind]
    before = copy.deepcopy(mine.state_dict())
    model = zoo.load("resnet20-16", 1, weights, profile="equal")  # 1x: nothing is cut
    assert same_tensors(model, dense)
    with torch.no_grad():
        for tensor in named_tensors(model).values():
            tensor.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())
    assert mine.training
    assert not model.training
    assert not hasattr(mine, "pruning")


def test_random_initialisation_keeps_the_plan_and_none_of_the_weights(dense: nn.Module) -> None:
    def load(**options) -> nn.Module:
        return zoo.load("resnet20-16", 4, dense, profile="equal", **options)

    state = torch.random.get_rng_state()
    fresh, again, other = load(init="random"), load(init="random"), load(init="random", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    pretrained = load()
    assert (fresh.pruning.init, pretrained.pruning.init) == ("random", "pretrained")
    assert fresh.pruning.plan == pretrained.pruning.plan
    assert same_tensors(fresh, again)
    for name, parameter in fresh.named_parameters():
        if parameter.ndim > 1:
            assert not torch.isclose(parameter, pretrained.get_parameter(name)).all(), name
            assert not torch.equal(parameter, other.get_parameter(name)), name
    assert torch.equal(fresh.bn1.running_mean, torch.zeros_like(fresh.bn1.running_mean))


# --- criteria that need data ----------------------------------------------------------------------


def test_taylor_keeps_the_channels_the_loss_depends_on(small: nn.Module) -> None:
    base = copy.deepcopy(small)
    with torch.no_grad():
        base.conv5.weight[::2] = 0  # these channels are zero: the loss does not depend on them
        base.conv5.bias[::2] = 0
    model = zoo.load("cnet", 6, base, profile="equal", criterion="taylor", data=Sorted())
    kept = model.pruning.plan.kept["conv5"]
    assert 8 < len(kept) < 16
    assert all(channel % 2 for channel in kept)


def test_taylor_sees_all_classes_of_a_sorted_dataset_and_no_more_than_it_needs(
    small: nn.Module,
) -> None:
    data = Sorted(4000)
    first = zoo.load("cnet", 2, small, profile="equal", criterion="taylor", data=data)
    assert 1024 <= len(data.seen) < 1024 + 128
    assert set(data.seen) == set(range(10))
    again = zoo.load("cnet", 2, small, profile="equal", criterion="taylor", data=data)
    assert first.pruning.plan == again.pruning.plan


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.rand(3, 8, 8), n % 10) for n in range(32)])


def test_taylor_takes_every_kind_of_labelled_images(small: nn.Module, toy_images: ImageSet) -> None:
    for data in (toy_images, Sorted(), DataLoader(Sorted(), batch_size=7), Stream()):
        model = zoo.load("cnet", 2, small, profile="equal", criterion="taylor", data=data)
        assert model.pruning.plan.criterion == "taylor"
        assert model.pruning.plan.got == pytest.approx(2, rel=0.05)


def test_taylor_leaves_network_data_and_random_state_alone(small: nn.Module) -> None:
    base = copy.deepcopy(small).train().requires_grad_(False)
    base.conv2.eval()  # a user may have frozen a part
    modes = {name: layer.training for name, layer in base.named_modules()}
    images, state = torch.rand(8, 3, 8, 8), torch.random.get_rng_state()
    batches = DataLoader([(images, torch.arange(8))], batch_size=None)
    with torch.no_grad():
        zoo.plan(base, images, cf=2, criterion="taylor", data=batches)
    zoo.plan(base, images, cf=2, criterion="taylor", data=Sorted())
    assert not images.requires_grad
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert {name: layer.training for name, layer in base.named_modules()} == modes
    torch.random.set_rng_state(state)
    zoo.plan(base, images, cf=2, criterion="taylor", data=Sorted())
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the record -----------------------------------------------------------------------------------


def test_the_record_is_complete(dense: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "base.pt"
    torch.save({"state_dict": dense.state_dict(), "epoch": 3}, path)
    model = zoo.load("resnet20-16", 2, path, profile="random", seed=5, criterion="l1")
    record = model.pruning
    assert (record.architecture, record.num_classes, record.image_size) == ("resnet20-16", 10, 32)
    assert record.source.reference == str(path)
    assert record.source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record.versions == {
        name: importlib.metadata.version(name)
        for name in ("prunezoo", "torch", "torchvision", "timm")
    }
    plan = record.plan
    assert (plan.profile, plan.criterion, plan.seed, plan.metric) == ("random", "l1", 5, "params")
    assert plan.asked == 2
    assert zoo.load("resnet20-16", 2, dense, profile="equal").pruning.source.sha256 is None


def test_what_numpy_passes_can_be_saved_and_read_back(small: nn.Module, tmp_path: Path) -> None:
    model = zoo.load(
        "cnet", np.float32(2), small, profile="equal", seed=np.int32(4), image_size=np.int64(8)
    )
    zoo.save(model, tmp_path / "m")
    again = zoo.load_pruned(tmp_path / "m")
    assert again.pruning == model.pruning
    assert json.loads((tmp_path / "m" / "pruning.json").read_text())["plan"]["seed"] == 4


# --- no tracing -----------------------------------------------------------------------------------


def test_registered_architectures_are_never_traced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(torch.export, "export", refuse)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    for name in (*list(ARCHITECTURES)[::4], "torchvision:resnet18", "timm:resnet18"):
        base = zoo.create_model(name, 3)
        model = zoo.load(name, 4, base, profile="equal", criterion="l1")
        zoo.save(model, tmp_path / name)
        assert same_tensors(zoo.load_pruned(tmp_path / name), model)
    with pytest.raises(GraphError, match="traced"):  # so the patch does forbid it
        zoo.plan(base, torch.zeros(1, 3, 32, 32), cf=2)


def test_a_torchvision_network_end_to_end(tmp_path: Path) -> None:
    base = zoo.create_model("torchvision:resnet18", 7)
    model = zoo.load(
        "torchvision:resnet18", 4, base.state_dict(), profile="equal", criterion="l1", image_size=64
    )
    record = model.pruning
    assert (record.architecture, record.num_classes) == ("torchvision:resnet18", 7)
    assert record.plan.got == size_of(base) / size_of(model) == pytest.approx(4, rel=0.02)
    assert record.plan.pruned.macs == macs_of(model, 64)
    zoo.save(model, tmp_path / "m")
    again = zoo.load_pruned(tmp_path / "m")
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    assert again.pruning == record


# --- the searched profile -------------------------------------------------------------------------


def test_load_takes_the_searched_profile_of_the_factor(
    dense: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "resnet20-16"
    folder.mkdir()
    shutil.copy(registry.registry_folder() / folder.name / "groups.json", folder)
    for cf in (2.0, 4.0):
        profile = profile_of("resnet20-16", cf)
        profile.write(folder / f"{profile.name}.json")
    registry.write_index(tmp_path)
    monkeypatch.setattr(registry, "registry_folder", lambda: tmp_path)
    for cf in (2, 4.0):
        plan = zoo.load("resnet20-16", cf, dense).pruning.plan
        assert plan.profile == f"bundled:resnet20-16/params-cf{cf:g}"
        assert plan.widths == profile_of("resnet20-16", cf).kept
    with pytest.raises(FactorError, match=r"at 4x macs: it has 2x params, 4x params\..*'equal'"):
        zoo.load("resnet20-16", 4, "never-read.pt", metric="macs")


# --- live networks --------------------------------------------------------------------------------


def test_plan_is_what_prune_cuts(dense: nn.Module) -> None:
    x = torch.zeros(1, 3, 16, 16)
    options = {"cf": 3, "profile": "greedy", "metric": "macs", "criterion": "l1", "seed": 9}
    pruned = zoo.prune(dense, x, **options)
    assert zoo.plan(dense, x, **options) == pruned.pruning.plan
    assert not hasattr(dense, "pruning")


def test_prune_and_load_agree_on_a_registered_network(dense: nn.Module) -> None:
    pruned = zoo.prune(dense, torch.zeros(1, 3, 32, 32), cf=4)
    loaded = zoo.load("resnet20-16", 4, dense, profile="equal")
    assert same_tensors(pruned, loaded)
    assert pruned.pruning.plan == loaded.pruning.plan


def test_the_size_of_the_example_batch_does_not_matter(dense: nn.Module) -> None:
    one, five = (zoo.plan(dense, torch.zeros(n, 3, 16, 16), cf=2, metric="macs") for n in (1, 5))
    assert one == five
    assert one.dense.macs == macs_of(dense.eval(), 16)


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


class Net(nn.Module):
    """A stem of 8 channels and a head; the subclasses differ in what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(torch.relu(self.stem(x))).mean((2, 3)))


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
    assert (plan.dense.params, plan.pruned.params) == (size_of(module), size_of(pruned))
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
    assert size_of(dense) / size_of(twice) == pytest.approx(4, rel=0.03)
    assert twice.pruning.plan.dense == once.pruning.plan.pruned


def test_create_model_is_the_registered_network_of_the_seed() -> None:
    assert same_tensors(zoo.create_model("cnet", 10, seed=1), build_model("cnet", 10, seed=1))


def test_create_model_gives_a_checkpoint_of_other_classes_a_new_classifier() -> None:
    base = zoo.create_model("resnet20-16", 7, seed=1)
    model = zoo.create_model("resnet20-16", 3, pretrained=base, seed=2)
    assert torch.equal(model.conv1.weight, base.conv1.weight)
    assert torch.equal(model.fc.weight, zoo.create_model("resnet20-16", 3, seed=2).fc.weight)


# --- a new classifier -----------------------------------------------------------------------------


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
    assert model.pruning.plan.dense.params == size_of(zoo.create_model("resnet20-16", 3))
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
