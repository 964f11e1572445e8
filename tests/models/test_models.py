from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from zoo.errors import CheckpointError, ZooError
from zoo.models import ARCHITECTURES, architecture, build_model, parameter_count
from zoo.models.resnet import PaddedShortcut
from zoo.storage.dense import Uninitialised


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


COUNTS = {
    # cnet: 896 + 5 · 9,248 for the convolutions, 512 · 10 + 10 for the dense layer.
    "cnet": 52_266,
    # of the source paper
    "resnet20-16": 847_738,
    "resnet20-64": 13_513_162,
    # He et al., table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    # as is known of their repositories' networks
    "resnet20-b": 272_474,
    "resnet56-b": 855_770,
    "resnet110-b": 1_730_714,
    "resnet18-cifar": 11_173_962,
    "resnet50-cifar": 23_520_842,
    "vgg16_bn-cifar": 14_728_266,
    "vgg16_bn-cifar-512": 15_253_578,
    "mobilenet_v2-cifar": 2_236_682,
    "mobilenet_v2-cifar-projected": 2_296_922,
}


def count_of(arch: str) -> int:
    return parameter_count(build_model(arch, 10))


@pytest.mark.parametrize("arch", COUNTS)
def test_parameter_counts_at_ten_classes(arch):
    assert count_of(arch) == COUNTS[arch]


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_projections_cost_what_their_weights_and_norms_do(depth):
    stages = {"-b": (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64), "-b1": 16 * 16 + 2 * 16}
    padded, b, b1 = (count_of(f"resnet{depth}{suffix}") for suffix in ("", *stages))
    assert (b - padded, b1 - b) == tuple(stages.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_the_name_it_is_found_by_and_gives_logits(arch):
    assert architecture(arch).name == arch
    with Uninitialised():
        model = build_model(arch, 3).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_option_a_pads_the_new_channels_on_both_sides_and_takes_every_other_pixel():
    model = build_model("resnet20", 10)
    assert not [name for name in model.state_dict() if "downsample" in name]
    for stage, old in ((model.layer2, 16), (model.layer3, 32)):
        shortcut = stage[0].downsample
        assert (shortcut.before, shortcut.after, shortcut.stride) == (old // 2, old // 2, 2)
    image = torch.rand(2, 3, 5, 5)
    out = PaddedShortcut(before=1, after=2, stride=2)(image)
    assert out.shape == (2, 6, 3, 3)
    assert torch.equal(out[:, 1:4], image[:, :, [0, 2, 4]][..., [0, 2, 4]])
    assert not out[:, [0, 4, 5]].any()


@pytest.mark.parametrize(
    ("arch", "stages"),
    [
        ("resnet18-cifar", {"layer1": 32, "layer2": 16, "layer4": 4}),
        ("resnet18-cifar-maxpool", {"layer1": 16, "layer2": 8, "layer4": 2}),
        ("mobilenet_v2-cifar", {"features.0": 32, "features.3": 32, "features.18": 4}),
        ("mobilenet_v2-cifar-projected", {"layers.0": 32, "layers.2": 32, "layers.16": 4}),
    ],
)
def test_small_stems_keep_the_resolution(arch, stages):
    model, sizes = build_model(arch, 10).eval(), {}
    for name in stages:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: sizes.update({name: out.shape[-1]})
        )
    model(torch.zeros(1, 3, 32, 32))
    assert sizes == stages


@pytest.mark.parametrize(
    ("arch", "theirs"),
    [
        ("resnet18-cifar", "torchvision:resnet18"),
        ("resnet50-cifar", "torchvision:resnet50"),
        ("vgg16_bn-cifar-4096", "torchvision:vgg16_bn"),
        ("mobilenet_v2-cifar", "torchvision:mobilenet_v2"),
    ],
)
def test_small_stems_leave_torchvisions_key_names(arch, theirs):
    with torch.device("meta"):
        ours, standard = (shapes_of(build_model(name, 10)) for name in (arch, theirs))
    assert list(ours) == list(standard)
    differ = {name for name in ours if ours[name] != standard[name]}
    assert differ <= {"conv1.weight", "classifier.0.weight"}


def test_resnet20_has_torchvisions_key_names():
    # torchvision's own ResNet with three blocks in each of its first three stages.
    from torchvision.models.resnet import BasicBlock, ResNet

    theirs = {key for key in ResNet(BasicBlock, [3, 3, 3, 1]).state_dict() if "layer4" not in key}
    projection = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    projection.append("1.num_batches_tracked")
    first = {f"layer1.0.downsample.{part}" for part in projection}
    assert set(build_model("resnet20-16", 10).state_dict()) == theirs | first


def test_resnet20_stages_have_the_papers_widths_and_resolutions():
    model = build_model("resnet20-64", 100)
    sizes = {}
    for name in ("layer1", "layer2", "layer3"):
        stage = getattr(model, name)
        stage.register_forward_hook(
            lambda _m, _i, out, name=name: sizes.update({name: tuple(out.shape[1:])})
        )
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
    assert sizes == {"layer1": (64, 32, 32), "layer2": (128, 16, 16), "layer3": (512, 8, 8)}


def test_cnet_has_six_convolutions_of_32_and_no_batch_norm():
    model = build_model("cnet", 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [32] * 6
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (build_model("resnet20-16", 10, seed=s) for s in (3, 3, 4))
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_building_leaves_the_callers_random_state_alone():
    before = torch.random.get_rng_state()
    build_model("resnet20-16", 10, seed=123)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
@pytest.mark.parametrize(("classes", "size"), [(10, 32), (7, 16), (100, 64)])
def test_classes_and_image_size_are_inferred_from_a_checkpoint(arch, classes, size):
    with torch.device("meta"):
        model = build_model(arch, classes, image_size=size)
    known = architecture(arch)
    expected = size if known.flatten_stride else known.image_size
    assert known.infer(shapes_of(model)) == (classes, expected)


def test_a_checkpoint_without_the_classifier_is_refused():
    known = architecture("resnet20-16")
    with pytest.raises(CheckpointError, match=r"no classifier 'fc.weight'"):
        known.infer({"conv1.weight": (16, 3, 3, 3)})
    with pytest.raises(CheckpointError, match="2 dimensions"):
        known.infer({"fc.weight": (10, 128, 3, 3)})


def test_cnet_features_of_no_image_size_are_refused():
    with pytest.raises(CheckpointError, match="500 input features"):
        architecture("cnet").infer({"fc.weight": (10, 500)})


def test_an_unknown_architecture_names_the_nearest_one():
    with pytest.raises(ZooError, match=r"'resnet20_16'. Did you mean 'resnet20-16'\?"):
        build_model("resnet20_16", 10)
    for name, kind, near in (
        ("torchvision:resnet8", "torchvision", "torchvision:resnet18"),
        ("timm:resnet19", "timm", "timm:resnet18"),
        ("timm:esnet18", "timm", "timm:resnet18"),
        ("timm:resnet18.a1_in2k", "timm", "timm:resnet18.a1_in1k"),
    ):
        message = rf"Unknown {kind} architecture .* Did you mean '{near}'\?"
        with pytest.raises(ZooError, match=message) as caught:
            architecture(name)
        assert len(str(caught.value)) < 200  # not the thousand names of the library
        architecture(near)
    with pytest.raises(ZooError, match=r"timm architecture 'zzzz'\. timm's list_models\(\)"):
        architecture("timm:zzzz")


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("resnet18", r"'torchvision:resnet18' or 'timm:resnet18' or 'resnet18-cifar'\."),
        ("vgg16_bn", r"'torchvision:vgg16_bn' or 'timm:vgg16_bn' or 'vgg16_bn-cifar'\."),
        ("googlenet", r"'torchvision:googlenet'\."),
        ("convnextv2_atto", r"'timm:convnextv2_atto'\."),
    ],
)
def test_a_librarys_bare_name_is_answered_with_its_full_spellings(name, spellings):
    with pytest.raises(ZooError, match=f"Unknown architecture '{name}': write {spellings}"):
        build_model(name, 10)


@pytest.mark.parametrize("arch", ["torchvision:", "timm:", "keras:resnet50", ""])
def test_an_incomplete_or_foreign_name_is_refused(arch):
    with pytest.raises(ZooError, match="Unknown architecture"):
        architecture(arch)


@pytest.mark.parametrize(
    ("arch", "classifier"),
    [
        ("torchvision:resnet18", "fc"),
        ("torchvision:mobilenet_v2", "classifier.1"),
        ("timm:resnet18", "fc"),
        ("timm:mobilenetv3_small_050", "classifier"),
    ],
)
def test_library_architectures_know_their_classifier(arch, classifier):
    model = build_model(arch, 7)
    assert model.get_submodule(classifier).out_features == 7
    assert architecture(arch).infer(shapes_of(model)) == (7, 224)


def test_impossible_sizes_are_refused():
    with pytest.raises(ZooError, match="divisible by 8: 20"):
        build_model("cnet", 10, image_size=20)


@pytest.mark.parametrize("value", ["10", 2.5, 10.0, True, 0, -1, [10]])
def test_a_number_of_classes_or_pixels_that_is_none_is_refused(value):
    got = re.escape(f"must be an integer of at least 1, got {value!r}.")
    for arch in ("cnet", "resnet20-16"):
        with pytest.raises(ZooError, match=f"num_classes {got}"):
            build_model(arch, value)
        with pytest.raises(ZooError, match=f"image_size {got}"):
            build_model(arch, 10, image_size=value)


def test_numpys_integers_are_integers_and_no_size_is_the_references():
    model = build_model("cnet", np.int64(7), image_size=np.int32(16))
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 7)
    with pytest.raises(ZooError, match="num_classes must be an integer of at least 1, got None"):
        build_model("cnet", None)
    assert shapes_of(build_model("cnet", 7, image_size=None)) == shapes_of(build_model("cnet", 7))


@pytest.mark.parametrize("arch", [None, 18, ["cnet"], nn.ReLU()])
def test_an_architecture_that_is_no_name_is_refused(arch):
    with pytest.raises(ZooError, match=re.escape(f"such as 'cnet'; got {arch!r}")):
        build_model(arch, 10)
