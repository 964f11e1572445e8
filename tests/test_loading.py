"""load, prune, plan and create_model, as someone who does not believe the docstrings tries them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.cost import cost_model
from zoo.data import ImageSet
from zoo.errors import CheckpointError, DataError, DocumentError, FactorError, GraphError, ZooError
from zoo.models import ARCHITECTURES, Architecture
from zoo.profile import Profile, Reference
from zoo.pruning.graph import channel_groups
from zoo.pruning.masking import masked
from zoo.pruning.policies import policy_solution
from zoo.pruning.surgery import named_tensors
from zoo.registry import stored_groups


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


def edited(profile: Profile, name: str, kept: int, ratio: float = 1.0) -> Profile:
    return dataclasses.replace(
        profile,
        kept=profile.kept | {name: kept},
        keep_ratios=profile.keep_ratios | {name: ratio},
    )


def without(profile: Profile, name: str) -> Profile:
    kept = {key: count for key, count in profile.kept.items() if key != name}
    ratios = {key: ratio for key, ratio in profile.keep_ratios.items() if key != name}
    return dataclasses.replace(profile, kept=kept, keep_ratios=ratios)


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def macs_of(module: nn.Module, side: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, 3, side, side))
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
    assert (classes, side) == (10, 32) or plan.got != profile.got or arch != "cnet"
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


def test_a_given_profile_of_another_factor_or_metric_is_not_applied_silently(
    dense: nn.Module,
) -> None:
    profile = profile_of("resnet20-16")
    with pytest.raises(FactorError, match=r"is for 4x params, not 2x params: pass cf=4.*refit"):
        zoo.load("resnet20-16", 2, dense, profile=profile)
    with pytest.raises(FactorError, match="is for 4x params, not 4x macs"):
        zoo.load("resnet20-16", 4, dense, profile=profile, metric="macs")
    with pytest.raises(FactorError, match="is for 4x params, not 2x params"):
        zoo.prune(dense, torch.zeros(1, 3, 16, 16), cf=2, profile=profile)


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


class Scaled(nn.Module):
    """A network with a parameter of its own, which no layer knows how to initialise."""

    def __init__(self, classes: int, _: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, classes)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc((self.conv(x) * self.scale).mean((2, 3)))


def test_random_initialisation_does_not_keep_a_trained_parameter_silently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "scaled", Architecture("scaled", Scaled, "fc"))
    zoo.load("scaled", 2, Scaled(10, 0), profile="equal")
    with pytest.raises(ZooError, match=r"does not know how to initialise 'scale' of the Scaled"):
        zoo.load("scaled", 2, Scaled(10, 0), profile="equal", init="random")


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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs data"),
        ("digits", "Expected a torch Dataset or DataLoader, got str"),
        ([(torch.rand(2, 3, 8, 8), torch.arange(2))], "Dataset or DataLoader, got list"),
        (torch.utils.data.TensorDataset(torch.rand(4, 3, 8, 8)), r"\(image, label\)"),
        (torch.utils.data.TensorDataset(torch.rand(4, 3, 8, 8), torch.rand(4)), "labels as int"),
        (
            torch.utils.data.TensorDataset(torch.ones(4, 3, 8, 8).byte(), torch.arange(4)),
            "images as floating-point",
        ),
        (Sorted(0), "no batches"),
    ],
)
def test_data_that_taylor_cannot_use_is_named(small: nn.Module, data, message: str) -> None:
    with pytest.raises(ZooError, match=message) as caught:
        zoo.load("cnet", 2, small, profile="equal", criterion="taylor", data=data)
    assert data is None or isinstance(data, Sorted) or isinstance(caught.value, DataError)


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
    for name in ARCHITECTURES:
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


def registry_with(profiles: list[Profile], folder: Path) -> Path:
    import shutil

    from zoo.registry import registry_folder, write_index

    for name in ("cnet", "resnet20-16"):
        (folder / name).mkdir(parents=True)
        shutil.copy(registry_folder() / name / "groups.json", folder / name)
    for profile in profiles:
        profile.write(folder / profile.architecture / f"{profile.name}.json")
    write_index(folder)
    return folder


@pytest.fixture
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The registry module, with resnet20-16 at 2x and 4x params alone."""
    import zoo.registry

    profiles = [profile_of("resnet20-16", cf) for cf in (2.0, 4.0)]
    folder = registry_with(profiles, tmp_path / "registry")
    monkeypatch.setattr(zoo.registry, "registry_folder", lambda: folder)
    return zoo.registry


@pytest.mark.usefixtures("own_registry")
def test_load_takes_the_searched_profile_of_the_factor(dense: nn.Module) -> None:
    for cf in (2, 4.0):
        plan = zoo.load("resnet20-16", cf, dense).pruning.plan
        assert plan.profile == f"bundled:resnet20-16/params-cf{cf:g}"
        assert plan.widths == profile_of("resnet20-16", cf).kept


@pytest.mark.usefixtures("own_registry")
def test_a_factor_without_a_profile_names_those_that_exist_and_the_way_round(
    dense: nn.Module,
) -> None:
    with pytest.raises(FactorError, match=r"at 3x params: it has 2x params, 4x params\..*'equal'"):
        zoo.load("resnet20-16", 3, dense)
    with pytest.raises(FactorError, match=r"at 4x macs: it has 2x params, 4x params\..*'equal'"):
        zoo.load("resnet20-16", 4, dense, metric="macs")
    with pytest.raises(FactorError, match=r"cnet has none\. profile='equal'"):
        zoo.load("cnet", 4, "a file that is never read")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cf", [0.5, 0, -4, float("nan"), float("inf"), True, "4", [4], 1 + 2j])
@pytest.mark.parametrize("profile", ["equal", "searched"])
def test_a_factor_that_is_none_is_refused(dense: nn.Module, cf, profile: str) -> None:
    with pytest.raises(FactorError, match=r"finite number of at least 1, got "):
        zoo.load("resnet20-16", cf, dense, profile=profile)
    if profile == "equal":
        with pytest.raises(FactorError, match="finite number of at least 1"):
            zoo.plan(dense, torch.zeros(1, 3, 16, 16), cf=cf)


def test_a_factor_out_of_reach_names_the_range(dense: nn.Module) -> None:
    with pytest.raises(FactorError, match=r"factor of 1e\+09 cannot be reached.*reaches 1 to"):
        zoo.load("resnet20-16", 1e9, dense, profile="equal")
    with pytest.raises(FactorError, match="cannot be reached here: greedy reaches at most"):
        zoo.load("resnet20-16", 1e9, dense, profile="greedy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet-20-16"}, r"architecture 'resnet-20-16'\. Did you mean 'resnet20-16'\?"),
        ({"arch": "torchvision:resnet81"}, r"architecture 'resnet81'\. Did you mean 'resnet18'\?"),
        ({"profile": "eqaul"}, r"Did you mean 'equal'\?"),
        ({"profile": "serched"}, r"Did you mean 'searched'\?"),
        ({"profile": "my.json"}, r"names no source: write .*'file:my\.json'"),
        ({"profile": "resnet20-16/params-cf4"}, "names no source: write 'bundled:"),
        ({"profile": Path("my.json")}, "a reference such as 'file:<path>', or a Profile; got"),
        ({"profile": None}, "or a Profile; got None"),
        ({"profile": {"conv1": 0.5}}, "or a Profile; got {'conv1': 0.5}"),
        ({"profile": "file:/nowhere/p.json"}, "/nowhere/p.json does not exist"),
        ({"metric": "parms"}, r"metric 'parms'\. Did you mean 'params'\?"),
        ({"criterion": "tailor"}, r"Did you mean 'taylor'\?"),
        ({"init": "radnom"}, r"Did you mean 'random'\?"),
        ({"seed": None}, "The seed is an integer; got None"),
        ({"seed": 1.5}, "The seed is an integer; got 1.5"),
        ({"seed": True}, "The seed is an integer; got True"),
        ({"image_size": 0}, "at least 1; got 0"),
        ({"image_size": 32.5}, "at least 1; got 32.5"),
        ({"image_size": "32"}, "at least 1; got '32'"),
        ({"cf": None}, "'equal' needs a compression factor"),
    ],
)
def test_a_mistake_is_named_before_the_weights_are_read(options: dict, message: str) -> None:
    given = {"arch": "resnet20-16", "cf": 4, "profile": "equal", **options}
    with pytest.raises(ZooError, match=message):
        zoo.load(given.pop("arch"), given.pop("cf"), "/nowhere/never-read.pt", **given)


def test_prune_has_no_searched_profile_and_says_what_it_has(dense: nn.Module) -> None:
    with pytest.raises(ZooError, match=r"Unknown profile 'searched'\..*equal.*bundled:"):
        zoo.prune(dense, torch.zeros(1, 3, 16, 16), cf=4, profile="searched")
    with pytest.raises(FactorError, match="needs a compression factor"):
        zoo.prune(dense, torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["kept"].update(conv1="3"), r"kept\.conv1: expected an integer, got '3'"),
        (lambda raw: raw.update(keep_ratio={}), r"'keep_ratio'\. Did you mean 'keep_ratios'\?"),
        (lambda raw: raw["keep_ratios"].update(conv1=1.2), r"β of 'conv1' is 1\.2.*\(0, 1\]"),
        (lambda raw: raw["keep_ratios"].update(conv1=0), r"β of 'conv1' is 0\.0.*\(0, 1\]"),
        (lambda raw: raw["kept"].update(conv1=0), "keeps 0 channels"),
        (lambda raw: raw.update(cf=0.5), "at least 1"),
        (lambda raw: raw.update(metric="parms"), r"Did you mean 'params'\?"),
        (lambda raw: raw.pop("schema_version"), "schema_version"),
        (lambda raw: raw.pop("reference"), "'reference' is missing"),
    ],
)
def test_a_malformed_profile_file_is_refused(tmp_path: Path, change, message: str) -> None:
    raw = profile_of("resnet20-16").to_json()
    change(raw)
    (tmp_path / "p.json").write_text(json.dumps(raw))
    with pytest.raises(DocumentError, match=message):
        zoo.load("resnet20-16", 4, "never-read.pt", profile=f"file:{tmp_path / 'p.json'}")


def test_a_profile_that_does_not_fit_the_network_is_refused(dense: nn.Module) -> None:
    profile = profile_of("resnet20-16")

    def load(given: Profile, **options) -> None:
        zoo.load("resnet20-16", 4, dense, profile=given, **options)

    with pytest.raises(FactorError, match=r"is for cnet, not resnet20-16"):
        load(profile_of("cnet"))
    with pytest.raises(GraphError, match=r"'conv1' cannot keep 17 of 16 channels"):
        load(edited(profile, "conv1", 17))
    for options in ({}, {"refit": True}):
        with pytest.raises(GraphError, match=r"no keep ratio for the group 'conv1'"):
            load(without(profile, "conv1"), **options)
        with pytest.raises(GraphError, match=r"'conv0'\. Did you mean 'conv1'\?"):
            load(edited(profile, "conv0", 3, 0.2), **options)
    with pytest.raises(GraphError, match="Unknown channel group"):
        zoo.prune(zoo.create_model("cnet", 10), torch.zeros(1, 3, 32, 32), profile=profile)


def test_weights_of_another_architecture_name_the_one_they_fit(dense: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=r"The checkpoint fits 'resnet20-16'"):
        zoo.load("resnet20-64", 4, dense, profile="equal")
    with pytest.raises(CheckpointError, match=r"The checkpoint fits 'resnet20-16'"):
        zoo.create_model("cnet", 10, pretrained=dense)
    pruned = zoo.load("resnet20-16", 2, dense, profile="equal")
    with pytest.raises(CheckpointError, match="misshapen"):
        zoo.load("resnet20-16", 2, pruned, profile="equal")
    with pytest.raises(ZooError, match=r"has 10 classes; 7 were asked for"):
        zoo.create_model("resnet20-16", 7, pretrained=dense)


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
    with pytest.raises(GraphError, match=r"does not run on the example input of shape.*float32"):
        zoo.prune(mine, x.float(), cf=2)


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


class Pair(Net):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x), x


def test_the_number_of_classes_is_that_of_the_channel_dimension() -> None:
    assert zoo.prune(Net(), torch.zeros(1, 3, 8, 8), cf=2).pruning.num_classes == 4
    assert zoo.prune(Dense(), torch.zeros(1, 3, 8, 8), cf=2).pruning.num_classes == 4


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), torch.zeros(1, 3, 8, 8), "no channel g"),
        (nn.Flatten(), torch.zeros(1, 3, 8, 8), "Flatten has no channel group that can be pruned"),
        (Net(), torch.zeros(3, 8, 8), r"batch of images \(N, C, H, W\); got \(3, 8, 8\)"),
        (Net(), torch.zeros(1, 1, 3, 8, 8), r"batch of images .* got \(1, 1, 3, 8, 8\)"),
        (Net(), torch.zeros(0, 3, 8, 8), r"batch of images .* got \(0, 3, 8, 8\)"),
        (Net(), (1, 3, 8, 8), r"batch of images \(N, C, H, W\); got tuple"),
        (Net(), torch.zeros(1, 1, 8, 8), r"Net does not run on .* expected input.*3 channels"),
        (Net(), torch.zeros(1, 3, 8, 8).long(), r"does not run on .* torch\.int64"),
        (Pair(), torch.zeros(1, 3, 8, 8), r"Pair gives tuple, not logits"),
    ],
)
def test_a_network_or_input_that_cannot_be_pruned_says_why(module, x, message: str) -> None:
    for call in (zoo.prune, zoo.plan):
        with pytest.raises(GraphError, match=message):
            call(module, x, cf=2)


def test_prune_sends_checkpoints_to_load(dense: nn.Module) -> None:
    for weights in ("base.pt", dense.state_dict()):
        with pytest.raises(ZooError, match=r"nn\.Module.*zoo\.load takes checkpoints"):
            zoo.prune(weights, torch.zeros(1, 3, 8, 8), cf=2)


def test_a_compiled_network_is_refused_before_it_is_traced() -> None:
    with pytest.raises(GraphError, match=r"compiled: prune the network inside \(its _orig_mod\)"):
        zoo.prune(torch.compile(Net(), backend="eager"), torch.zeros(1, 3, 8, 8), cf=2)


class Bare(Net):
    """A convolution whose weight is a parameter of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(8, 8, 1, 1))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.conv2d(x, self.kernel))


def test_taylor_names_a_parameter_that_has_no_layer() -> None:
    module, x = Bare(), torch.rand(2, 3, 8, 8)
    assert zoo.plan(module, x, cf=2, criterion="l1").widths["kernel"] < 8
    with pytest.raises(ZooError, match="'kernel' is a parameter of no layer"):
        zoo.plan(module, x, cf=2, criterion="taylor", data=Sorted(classes=4))


def test_a_pruned_network_can_be_pruned_again(dense: nn.Module) -> None:
    x = torch.zeros(1, 3, 16, 16)
    once = zoo.prune(dense, x, cf=2)
    twice = zoo.prune(once, x, cf=2)
    assert size_of(dense) / size_of(twice) == pytest.approx(4, rel=0.03)
    assert twice.pruning.plan.dense == once.pruning.plan.pruned


def test_create_model_depends_on_its_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first = zoo.create_model("cnet", 10, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert same_tensors(first, zoo.create_model("cnet", 10, seed=1))
    assert not same_tensors(first, zoo.create_model("cnet", 10, seed=2))


@pytest.mark.parametrize("arch", ["resnet-20-16", "torchvision:resnet81", "timm:resnet1818", ""])
def test_create_model_names_what_it_does_not_know(arch: str) -> None:
    with pytest.raises(ZooError, match=r"Unknown (torchvision |timm )?architecture"):
        zoo.create_model(arch, 10)
