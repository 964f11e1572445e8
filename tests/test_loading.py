"""load, prune, plan and create_model do what they say.

test_own_networks.py has networks of one's own, and test_loading_errors.py the mistakes.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Sorted, macs_of, same_tensors
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import zoo
import zoo.registry.store as registry
from zoo.data.datasets import ImageSet
from zoo.errors import FactorError, GraphError
from zoo.models import ARCHITECTURES, build_model, parameter_count
from zoo.planning.policies import policy_solution
from zoo.registry.store import stored_groups
from zoo.spec.cost import cost_model
from zoo.spec.profile import Profile, Reference
from zoo.surgery.surgery import named_tensors


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


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return zoo.create_model("resnet20-16", 10)


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
    assert plan.got == parameter_count(base) / parameter_count(model)
    assert (plan.dense.params, plan.pruned.params) == (
        parameter_count(base),
        parameter_count(model),
    )
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
        assert plan.got == parameter_count(base) / parameter_count(refitted)
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


def test_create_model_is_the_registered_network_of_the_seed() -> None:
    assert same_tensors(zoo.create_model("cnet", 10, seed=1), build_model("cnet", 10, seed=1))


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
    assert (
        record.plan.got
        == parameter_count(base) / parameter_count(model)
        == pytest.approx(4, rel=0.02)
    )
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
        zoo.load("resnet20-16", 4, "never-read.pt", metric="macs", profile="searched")
