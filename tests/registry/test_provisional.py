"""Standard-stem architectures take the profiles of their small-stem twins, and say so."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
import zoo.registry.store as registry
from zoo.cli import main
from zoo.errors import FactorError
from zoo.models import ARCHITECTURES, TWINS, architecture, build_model
from zoo.planning.borrowed import carried
from zoo.registry.store import find_profile, write_index
from zoo.spec.profile import Profile, Reference
from zoo.tracing.graph import channel_groups
from zoo.tracing.known_groups import reference_groups

TWIN = "bundled:resnet18-cifar/params-cf4"


@functools.cache
def sizes_of(arch: str) -> dict[str, int]:
    """Its channel groups' sizes, as they are stored, or else traced."""
    groups = registry.stored_groups(arch)
    if groups is None:
        groups = channel_groups(build_model(arch, 10), torch.zeros(1, 3, 32, 32))
    return dict(zip(groups.names, groups.sizes, strict=True))


@pytest.fixture(scope="module")
def profile() -> Profile:
    plan = zoo.plan(build_model("resnet18-cifar", 10), torch.zeros(1, 3, 32, 32), cf=4)
    return Profile(
        "resnet18-cifar", "params", 4.0, plan.got, Reference(10, 32), plan.keep_ratios, plan.widths
    )


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: Profile) -> Path:
    """A registry whose one profile is of resnet18-cifar, in place of the bundled one."""
    profile.write(tmp_path / "resnet18-cifar" / f"{profile.name}.json")
    write_index(tmp_path)
    monkeypatch.setattr(registry, "registry_folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize("arch", TWINS)
def test_twins_have_the_same_channel_groups(arch):
    known = architecture(arch)
    assert known.profiles_from == TWINS[arch]
    assert sizes_of(arch) == sizes_of(known.profiles_from)


def test_only_twins_share_profiles_and_a_weights_tag_changes_nothing():
    assert architecture("timm:resnet18.a1_in1k").profiles_from == "resnet18-cifar"
    for arch in ("torchvision:resnet34", "timm:resnet18d", "timm:mobilenetv2_100"):
        assert architecture(arch).profiles_from == ""
    lenders = {known.profiles_from for known in ARCHITECTURES.values()} | set(TWINS.values())
    assert all(not architecture(name).profiles_from for name in lenders if name)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("arch", ["torchvision:resnet18", "resnet18-cifar-maxpool"])
def test_a_standard_stem_is_pruned_by_its_twins_profile(arch, profile):
    dense = build_model(arch, 5)
    for asked in ("searched", TWIN, profile):
        model = zoo.load(arch, 4, dense, profile=asked, image_size=64)
        assert model.pruning.plan.widths == profile.kept
        assert model.pruning.architecture == arch
        assert "resnet18-cifar/params-cf4" in model.pruning.plan.profile
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.usefixtures("own")
def test_a_profile_of_another_architecture_is_still_refused():
    for arch in ("torchvision:resnet34", "resnet50-cifar"):
        with pytest.raises(FactorError, match=f"is for resnet18-cifar, not {arch}"):
            zoo.load(arch, 4, {}, profile=TWIN)
    with pytest.raises(FactorError, match=r"torchvision:resnet18 at 2x params: it has 4x params"):
        zoo.load("torchvision:resnet18", 2, {}, profile="searched")


def test_a_profile_of_its_own_comes_before_the_twins(own, profile):
    arch = "torchvision:resnet18"
    assert [entry.reference for entry in zoo.list_profiles(arch=arch)] == [TWIN]
    assert find_profile(arch, 4)[0] == TWIN
    mine = Profile(
        arch, "params", 4.0, 4.0, Reference(1000, 224), profile.keep_ratios, profile.kept
    )
    mine.write(own / "torchvision--resnet18" / "params-cf4.json")
    write_index(own)
    assert find_profile(arch, 4) == (f"bundled:{arch}/params-cf4", mine)
    assert [entry.architecture for entry in zoo.list_profiles(arch=arch)] == [arch]


@pytest.mark.usefixtures("own")
def test_the_commands_call_it_provisional(tmp_path, capsys):
    note = "Provisional for torchvision:resnet18"
    main(["list", "--arch", "torchvision:resnet18"])
    assert note in capsys.readouterr().out
    main(["show", "torchvision:resnet18", "--cf", "4"])
    assert note in capsys.readouterr().out
    for arguments in (["list"], ["list", "--arch", "resnet18-cifar"], ["show", TWIN]):
        main(arguments)
        out = capsys.readouterr().out
        assert "resnet18-cifar" in out
        assert "rovisional" not in out
    torch.save(build_model("torchvision:resnet18", 5).state_dict(), tmp_path / "m.pt")
    options = ["--cf", "4", "--size", "64", "--weights", str(tmp_path / "m.pt")]
    assert main(["prune", "torchvision:resnet18", *options, "--out", str(tmp_path / "out")]) == 0
    assert f"by {TWIN} (provisional): asked 4x" in capsys.readouterr().out


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_a_wider_network_takes_the_keep_ratios_of_a_narrow_one_at_its_own_factor(metric, capsys):
    dense = build_model("resnet20-64", 10)
    model = zoo.load("resnet20-64", 4, dense, metric=metric, profile="searched")
    narrow = zoo.get_profile(f"bundled:resnet20-16/{metric}-cf4")
    plan = model.pruning.plan
    assert plan.got == pytest.approx(4, rel=0.01)
    ratios = [width / sizes_of("resnet20-64")[name] for name, width in plan.widths.items()]
    scaled = np.array(ratios) / [narrow.keep_ratios[name] for name in plan.widths]
    assert np.std(scaled) < 0.15  # one common factor, but for the bounds and whole channels
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    main(["list", "--arch", "resnet20-64"])
    told = "Provisional for resnet20-64, whose layers differ in width or shortcut"
    assert told in capsys.readouterr().out
    main(["show", "resnet20-64", "--cf", "4", "--metric", metric])
    shown = capsys.readouterr().out
    assert told in shown
    assert f"{round(512 * narrow.keep_ratios['layer3.0.conv1'])}/512" in shown


def test_a_projected_shortcut_takes_what_the_padded_one_keeps_of_every_layer():
    padded, projected = reference_groups("resnet20"), reference_groups("resnet20-b1")
    kept = dict(zip(padded.names, padded.sizes, strict=True))
    assert set(carried(kept, padded, projected).values()) == {1.0}
    kept |= {"conv1": 4, "layer2.0.conv1": 8, "layer2.0.conv2": 1, "layer2.0.conv2[1]": 3}
    ratios = carried(kept, padded, projected)
    assert ratios["layer1.0.conv2"] == ratios["conv1"] == 4 / 16  # one stream beside the padding
    assert ratios["layer2.0.conv1"] == 8 / 32
    assert ratios["layer2.0.conv2"] == (4 + 1 + 3) / 32  # the stream of the stage before, and both
    assert ratios["layer3.0.conv2"] == (4 + 1 + 3 + 16 + 16) / 64  # sides of the padding
    assert {n for n, ratio in ratios.items() if ratio == 1} == {
        name for name in projected.names if "conv1" in name and name in kept
    } - {"conv1", "layer2.0.conv1"}


@pytest.mark.parametrize("arch", ["resnet20-b", "resnet20-b1"])
def test_a_projected_twin_is_pruned_at_its_own_factor_and_named_provisional(arch):
    plan = zoo.plan(build_model("resnet20", 10), torch.zeros(1, 3, 32, 32), cf=4, seed=1)
    found = Profile(
        "resnet20", "params", 4.0, plan.got, Reference(10, 32), plan.keep_ratios, plan.widths
    )
    model = zoo.load(arch, 4, build_model(arch, 10), profile=found)
    assert model.pruning.plan.got == pytest.approx(4, rel=0.01)
    assert model.pruning.plan.profile == "resnet20/params-cf4"
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(FactorError, match="is for resnet20, not resnet32-b"):
        zoo.load("resnet32-b", 4, {}, profile=found)
