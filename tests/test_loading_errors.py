"""load, prune, plan and create_model refuse what they cannot do with one error that names it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import Net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zoo
from zoo.errors import CheckpointError, DataError, DocumentError, FactorError, GraphError, ZooError
from zoo.models import ARCHITECTURES, Architecture, build_model
from zoo.registry.store import stored_groups
from zoo.spec.profile import Profile, Reference

IMAGES = torch.zeros(1, 3, 16, 16)


def profile_of(arch: str, **kept: int) -> Profile:
    """Half of every group at a stated 4x params, but for the counts in `kept`."""
    groups = stored_groups(arch)
    assert groups is not None
    counts = {name: size // 2 for name, size in zip(groups.names, groups.sizes, strict=True)}
    counts |= kept
    ratios = dict.fromkeys(counts, 0.5)
    return Profile(arch, "params", 4.0, 4.0, Reference(10, 32), ratios, counts)


def without(profile: Profile, name: str) -> Profile:
    kept = {key: count for key, count in profile.kept.items() if key != name}
    return dataclasses.replace(profile, kept=kept, keep_ratios=dict.fromkeys(kept, 0.5))


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize("cf", [0.5, 0, -4, float("nan"), float("inf"), True, "4", [4], 1 + 2j])
def test_a_factor_that_is_none_is_refused(small: nn.Module, cf) -> None:
    for profile in ("equal", "searched", profile_of("cnet")):
        with pytest.raises(FactorError, match=r"finite number of at least 1, got "):
            zoo.load("cnet", cf, "/nowhere/never-read.pt", profile=profile)
    with pytest.raises(FactorError, match="finite number of at least 1"):
        zoo.plan(small, IMAGES, cf=cf)


@pytest.mark.parametrize("keep", [["conv1"], "conv1", {1: 0.5}, 0.5])
def test_pins_that_are_no_dict_by_name_are_refused(small: nn.Module, keep) -> None:
    with pytest.raises(ZooError, match="a dict from module names to keep ratios is needed"):
        zoo.load("cnet", 2, "/nowhere/never-read.pt", profile="equal", keep=keep)
    with pytest.raises(ZooError, match="a dict from module names to keep ratios is needed"):
        zoo.plan(small, IMAGES, cf=2, keep=keep)


def test_what_is_no_path_and_no_network_is_refused_by_name() -> None:
    with pytest.raises(ZooError, match="folder's path, not 3"):
        zoo.load_pruned(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="got None"):
        zoo.load_data(None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="and 3"):
        zoo.load_data("cifar10", 3)  # type: ignore[arg-type]
    with pytest.raises(ZooError, match=r"not str: zoo\.load_pruned reads a folder"):
        zoo.evaluate("pruned", zoo.load_data("digits", size=8).val)  # type: ignore[arg-type]


def test_a_data_set_prints_in_one_line() -> None:
    shown = repr(zoo.load_data("digits", size=8))
    assert len(shown) < 400
    assert "10 classes" in shown


def test_a_factor_out_of_reach_names_the_range(small: nn.Module) -> None:
    for policy in ("equal", "greedy"):
        with pytest.raises(FactorError, match=r"factor of 1e\+09 cannot .*reaches 1 to \d+"):
            zoo.load("cnet", 1e9, small, profile=policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet-20-16"}, r"architecture 'resnet-20-16'\. Did you mean 'resnet20-16'\?"),
        ({"arch": None}, "An architecture is a name, such as .*; got None"),
        ({"profile": "eqaul"}, r"Did you mean 'equal'\?"),
        ({"profile": "serched"}, r"Did you mean 'searched'\?"),
        ({"profile": "searched", "cf": 3.21}, r"No searched profile .* at 3\.21x params.*'equal'"),
        ({"profile": "my.json"}, r"names no source: write .*'file:my\.json'"),
        ({"profile": "resnet20-16/params-cf4"}, "names no source: write 'bundled:"),
        ({"profile": Path("my.json")}, "a reference such as 'file:<path>', or a Profile; got"),
        ({"profile": None}, "or a Profile; got None"),
        ({"profile": {"conv1": 0.5}}, "or a Profile; got {'conv1': 0.5}"),
        ({"profile": "file:/nowhere/p.json"}, "/nowhere/p.json does not exist"),
        ({"profile": profile_of("cnet")}, "is for cnet, not resnet20-16"),
        ({"metric": "parms"}, r"metric 'parms'\. Did you mean 'params'\?"),
        ({"criterion": "tailor"}, r"Did you mean 'taylor'\?"),
        ({"init": "radnom"}, r"Did you mean 'random'\?"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"seed": True}, "seed must be an integer, got True"),
        ({"image_size": 0}, "image_size must be an integer of at least 1, got 0"),
        ({"image_size": 32.5}, "image_size must be an integer of at least 1, got 32.5"),
        ({"image_size": "32"}, "image_size must be an integer of at least 1, got '32'"),
        ({"cf": None}, "'equal' needs a compression factor"),
    ],
)
def test_a_mistake_is_named_before_the_weights_are_read(options: dict, message: str) -> None:
    given = {"arch": "resnet20-16", "cf": 4, "profile": "equal", **options}
    with pytest.raises(ZooError, match=message):
        zoo.load(given.pop("arch"), given.pop("cf"), "/nowhere/never-read.pt", **given)


def test_prune_has_no_searched_profile_and_says_what_it_has(small: nn.Module) -> None:
    with pytest.raises(ZooError, match=r"'searched' is the profile of an architecture.*bundled:"):
        zoo.prune(small, IMAGES, cf=4, profile="searched")
    with pytest.raises(FactorError, match="needs a compression factor"):
        zoo.prune(small, IMAGES)


# --- profiles that do not fit ---------------------------------------------------------------------


def test_a_profile_of_another_factor_or_metric_is_not_applied_silently(small: nn.Module) -> None:
    profile = profile_of("cnet")
    with pytest.raises(FactorError, match=r"is for 4x params, not 2x params: pass cf=4.*refit"):
        zoo.load("cnet", 2, small, profile=profile)
    with pytest.raises(FactorError, match="is for 4x params, not 4x macs"):
        zoo.load("cnet", 4, small, profile=profile, metric="macs")
    with pytest.raises(FactorError, match=r"not 2x params: pass cf=4, metric='params'\."):
        zoo.prune(small, IMAGES, cf=2, profile=profile)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["kept"].update(conv1="3"), r"p\.json\.kept\.conv1: expected an integer"),
        (lambda raw: raw.update(keep_ratio={}), r"'keep_ratio'\. Did you mean 'keep_ratios'\?"),
    ],
)
def test_a_malformed_profile_file_is_refused(tmp_path: Path, change, message: str) -> None:
    raw = profile_of("cnet").to_json()
    change(raw)
    (tmp_path / "p.json").write_text(json.dumps(raw))
    with pytest.raises(DocumentError, match=message):
        zoo.load("cnet", 4, "/nowhere/never-read.pt", profile=f"file:{tmp_path / 'p.json'}")


@pytest.mark.parametrize("refit", [False, True])
def test_a_profile_of_other_groups_is_refused(dense: nn.Module, refit: bool) -> None:
    profile = profile_of("resnet20-16")
    for given, message in (
        (without(profile, "conv1"), r"no keep ratio for the group 'conv1'"),
        (profile_of("resnet20-16", conv0=3), r"'conv0'\. Did you mean 'conv1'\?"),
    ):
        with pytest.raises(GraphError, match=message):
            zoo.load("resnet20-16", 4, dense, profile=given, refit=refit)


def test_a_profile_of_wider_groups_or_another_network_is_refused(
    dense: nn.Module, small: nn.Module
) -> None:
    wide = profile_of("resnet20-16", conv1=17)
    with pytest.raises(GraphError, match=r"'conv1' cannot keep 17 of 16 channels"):
        zoo.load("resnet20-16", 4, dense, profile=wide)
    with pytest.raises(GraphError, match="Unknown channel group"):
        zoo.prune(small, torch.zeros(1, 3, 8, 8), profile=profile_of("resnet20-16"))


# --- weights --------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_refused(dense: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=r"The checkpoint fits 'resnet20-16'"):
        zoo.create_model("cnet", 7, pretrained=dense)
    with pytest.raises(ZooError, match="num_classes must be an integer of at least 1, got 0"):
        zoo.load("resnet20-16", 2, dense, profile="equal", num_classes=0)
    early: dict = {"init": "rewound", "rewind": zoo.create_model("resnet20-16", 5)}
    with pytest.raises(ZooError, match="rewind= has 5 classes, weights= has 7"):
        zoo.load("resnet20-16", 2, dense, profile="equal", num_classes=7, **early)
    early["rewind"] = build_model("resnet20-16", 7, in_channels=1)
    with pytest.raises(ZooError, match=r"rewind= is for .* 1 channels, weights= for those of 3"):
        zoo.load("resnet20-16", 2, dense, profile="equal", **early)
    pruned = zoo.load("resnet20-16", 2, dense, profile="equal")
    with pytest.raises(CheckpointError, match="misshapen"):
        zoo.load("resnet20-16", 2, pruned, profile="equal")


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


# --- data -----------------------------------------------------------------------------------------


def labelled(images: torch.Tensor, *labels: float) -> TensorDataset:
    return TensorDataset(images, torch.tensor(labels))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, ZooError, "needs data"),
        ("digits", DataError, "Expected a torch Dataset or DataLoader, got str"),
        ([(torch.rand(2, 3, 8, 8), torch.arange(2))], DataError, "Dataset or DataLoader, got list"),
        (TensorDataset(torch.rand(2, 3, 8, 8)), DataError, r"\(image, label\)"),
        (labelled(torch.rand(2, 3, 8, 8), 0.0, 1.0), DataError, r"integers \(N,\), .*float32"),
        (labelled(torch.ones(2, 3, 8, 8).byte(), 0, 1), DataError, r"are torch\.uint8, not floats"),
        (labelled(torch.rand(2, 3, 8, 8), 3, 10), DataError, "from 3 to 10, .* has 10 outputs"),
        (labelled(torch.rand(2, 3, 8, 8), -1, 3), DataError, "from -1 to 3, .* has 10 outputs"),
        (labelled(torch.rand(0, 3, 8, 8)), ZooError, "no batches"),
    ],
)
def test_data_that_taylor_cannot_use_is_named(
    small: nn.Module, data, error: type[ZooError], message: str
) -> None:
    with pytest.raises(error, match=message):
        zoo.load("cnet", 2, small, profile="equal", criterion="taylor", data=data)


# --- live networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), torch.zeros(1, 3, 8, 8), "no channel g"),
        (nn.Flatten(), torch.zeros(1, 3, 8, 8), "Flatten has no channel group that can be pruned"),
        (
            Net(),
            torch.zeros(3, 8, 8),
            r"run on .* \(3, 8, 8\) of float32: .* batch of one: x\[No",
        ),
        (Net(), torch.zeros(0, 3, 8, 8), r"batch of images .* got \(0, 3, 8, 8\)"),
        (Net(), (1, 3, 8, 8), r"batch of images \(N, C, H, W\), or .*; got \[int, int, int, int\]"),
        (Net(), torch.zeros(1, 1, 8, 8), r"Net does not run on .* expected input.*3 channels"),
        (Net(), torch.zeros(1, 3, 8, 8).double(), r"does not run on .* of float64"),
    ],
)
def test_a_network_or_input_that_cannot_be_pruned_says_why(module, x, message: str) -> None:
    for call in (zoo.prune, zoo.plan):
        with pytest.raises(GraphError, match=message):
            call(module, x, cf=2)


def test_prune_sends_checkpoints_to_load(small: nn.Module) -> None:
    for weights in ("base.pt", small.state_dict()):
        with pytest.raises(ZooError, match=r"nn\.Module.*zoo\.load takes checkpoints"):
            zoo.prune(weights, IMAGES, cf=2)


def test_a_compiled_network_is_refused_before_it_is_traced() -> None:
    with pytest.raises(GraphError, match=r"compiled: prune the network inside \(its _orig_mod\)"):
        zoo.prune(torch.compile(Net(), backend="eager"), IMAGES, cf=2)


class Bare(Net):
    """A convolution whose weight is a parameter of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(8, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.relu(torch.conv2d(torch.relu(self.stem(x)), self.kernel))
        return self.head(features.mean((2, 3)))


def test_taylor_names_a_parameter_that_has_no_layer() -> None:
    module, x = Bare(), torch.rand(2, 3, 8, 8)
    data = DataLoader([(x, torch.tensor([1, 3]))], batch_size=None)
    assert zoo.plan(module, x, cf=2, criterion="l1").widths["kernel"] < 8
    with pytest.raises(ZooError, match="'kernel' is a parameter of no layer"):
        zoo.plan(module, x, cf=2, criterion="taylor", data=data)


class Auxiliary(Net):
    """A head that only training uses, and that takes maps of eight pixels and more."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(8, 4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.stem(x))
        if self.training:
            return self.head(maps.mean((2, 3))) + self.auxiliary(maps).mean((2, 3))
        return self.head(maps.mean((2, 3)))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_head_that_only_training_uses_is_not_cut_off_at_any_size(size: int) -> None:
    with pytest.raises(GraphError, match=r"'auxiliary\.weight' is not used in eval mode, and"):
        zoo.prune(Auxiliary(), torch.rand(1, 3, size, size), cf=2)


def test_a_network_that_cannot_be_trained_at_the_size_of_the_example_says_so() -> None:
    with pytest.raises(GraphError, match=r"whether surgery would break it .*: Calculated padded"):
        zoo.prune(Auxiliary(), torch.rand(1, 3, 1, 1), cf=2)
