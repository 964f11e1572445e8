"""A checkpoint as a dense network: every tensor in its place, or one error that names the rest."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from helpers import randomised, same_state

import zoo
from zoo.errors import CheckpointError
from zoo.models import build_model
from zoo.storage.artefacts import save_checkpoint
from zoo.storage.dense import Uninitialised, load_dense
from zoo.surgery.surgery import named_tensors


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("net.backbone.", {}),
        ("net.backbone.", {"net.head.weight": torch.ones(3), "scale": torch.ones(1)}),
        ("model.", {"loss.weight": torch.ones(7)}),
        ("teacher.model.", {f"queue.{n}": torch.ones(1) for n in range(200)}),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_network_inside_another_is_found(dense, prefix, others, adapted):
    state = dense.state_dict()
    own = {n.replace("downsample", "shortcut") if adapted else n: t for n, t in state.items()}
    stored = {prefix + name: tensor for name, tensor in own.items()} | others
    with pytest.warns(UserWarning, match="were taken") as warned:
        found = load_dense("resnet20-16", {"state_dict": stored})
    assert same_state(found.module, state)
    assert found.num_classes == 7
    (warning,) = warned
    said = str(warning.message)
    assert repr(prefix) in said
    assert (f", and {len(others)} others left out: " if others else "were taken.") in said
    assert all(name in said for name in list(others)[:3])


@pytest.mark.parametrize(
    "others",
    [
        {"criterion.pos_weight": torch.tensor(3.2)},
        {"val_best": torch.tensor(-float("inf")), "loss.weight": torch.full((7,), float("nan"))},
        {"scale": torch.eye(3).to_sparse()},
    ],
)
def test_what_is_beside_the_network_may_hold_anything(dense, others):
    stored = {f"model.{name}": tensor for name, tensor in dense.state_dict().items()} | others
    with pytest.warns(UserWarning, match=f"{len(others)} others left out: {next(iter(others))}"):
        found = load_dense("resnet20-16", {"state_dict": stored})
    assert same_state(found.module, dense.state_dict())


@pytest.mark.parametrize("prefix", ["model.", "net.backbone."])
def test_what_differs_under_a_prefix_is_named_there_with_what_is_beside(dense, prefix):
    state = dense.state_dict()
    state["conv1.weight"] = state["conv1.weight"][:8]
    stored = {prefix + name: tensor for name, tensor in state.items()}
    stored |= {"criterion.pos_weight": torch.tensor(3.2)}
    with pytest.raises(CheckpointError) as caught:
        load_dense("resnet20-16", stored)
    said = str(caught.value)
    assert f"Of the weights under {prefix!r}: 1 misshapen: conv1.weight" in said
    assert "Beside them: criterion.pos_weight." in said
    assert "missing" not in said


def test_another_architecture_under_a_prefix_is_named(dense):
    stored = {f"model.{name}": tensor for name, tensor in dense.state_dict().items()}
    stored["criterion.pos_weight"] = torch.tensor(3.2)
    with pytest.raises(CheckpointError, match=r"'model\.'.*criterion.*fits 'resnet20-16'"):
        load_dense("torchvision:resnet18", stored)
    with pytest.raises(CheckpointError, match=r"fits 'resnet20-16'"):
        load_dense("resnet110", stored)  # which has more tensors than there are


def test_two_networks_in_one_checkpoint_are_an_error_that_names_both(dense):
    state = dense.state_dict()
    stored = {f"{which}.{name}": t for which in ("student", "teacher") for name, t in state.items()}
    with pytest.raises(CheckpointError, match=r"'student\.' and under 'teacher\.'"):
        load_dense("resnet20-16", stored)
    stored["teacher.fc.weight"] = stored["teacher.fc.weight"][:, 1:]
    with pytest.warns(UserWarning, match=r"under 'student\.'"):
        load_dense("resnet20-16", stored)
    stored["student.fc.weight"] = stored["student.fc.weight"][:, 1:]
    with pytest.raises(CheckpointError, match=r"does not fit 'resnet20-16'.* unexpected: student"):
        load_dense("resnet20-16", stored)


def test_the_loaded_network_shares_nothing_with_the_callers(dense):
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    for weights in (dense, dense.state_dict()):
        module = load_dense("resnet20-16", weights).module
        with torch.no_grad():
            for tensor in named_tensors(module).values():
                tensor.zero_()
    assert same_state(dense, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dense, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in dense.state_dict().items()}
    module = load_dense("resnet20-16", state).module
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert torch.equal(module.conv1.weight, state["conv1.weight"].float())
    assert module.bn1.num_batches_tracked.dtype == torch.int64


def test_a_missing_batch_counter_is_no_mismatch(dense):
    state = {k: v for k, v in dense.state_dict().items() if "num_batches" not in k}
    module = load_dense("resnet20-16", state).module
    assert int(module.bn1.num_batches_tracked) == 0
    assert torch.equal(module.bn1.running_var, dense.bn1.running_var)


def test_buffers_that_no_checkpoint_holds_are_right():
    pytest.importorskip("timm")
    theirs = randomised(build_model("timm:resnetblur18", 3))
    hidden = {n for n, _ in theirs.named_buffers()} - theirs.state_dict().keys()
    assert hidden  # the blur kernels are not persistent
    for name in hidden:
        fresh = dict(build_model("timm:resnetblur18", 3).named_buffers())[name]
        dict(theirs.named_buffers())[name].copy_(fresh)
    found = load_dense("timm:resnetblur18", theirs.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.module(image), theirs(image))
    assert found.num_classes == 3


def test_image_size_from_the_classifier_the_argument_the_metadata_or_the_reference(dense, tmp_path):
    cnet = build_model("cnet", 10, image_size=16)
    for size in (None, 16):
        found = load_dense("cnet", cnet, image_size=size)
        assert (found.num_classes, found.image_size) == (10, 16)
    with pytest.raises(CheckpointError, match="16 pixels, not 32"):
        load_dense("cnet", cnet, image_size=32)
    path = tmp_path / "m.safetensors"
    save_checkpoint(dense, path, {"image_size": "16"})
    assert load_dense("resnet20-16", path).image_size == 16
    assert load_dense("resnet20-16", path, image_size=64).image_size == 64
    assert load_dense("resnet20-16", dense).image_size == 32
    save_checkpoint(dense, path, {"image_size": "big"})
    with pytest.raises(CheckpointError, match="'big'"):
        load_dense("resnet20-16", path)


def test_another_architectures_checkpoint_names_the_right_one():
    wide, cnet = build_model("resnet20-64", 5), build_model("cnet", 5, image_size=16)
    with pytest.raises(CheckpointError, match=r"fits 'resnet20-64'") as caught:
        load_dense("resnet20-16", wide)
    message = str(caught.value)
    assert "conv1.weight (expected (16, 3, 3, 3), got (64, 3, 3, 3))" in message
    assert "missing" not in message  # only shapes differ
    with pytest.raises(CheckpointError, match=r"unexpected.*fits 'cnet'"):
        load_dense("resnet20-16", cnet)
    with pytest.raises(CheckpointError, match=r"missing.*fits 'resnet20-64'"):
        load_dense("torchvision:vgg11", wide)


def test_a_mismatch_counts_and_names_three_of_each(dense):
    state = dict(dense.state_dict())
    for name in [n for n in state if n.startswith("layer3.2")][:5]:
        del state[name]
    state |= {f"head.{n}": torch.ones(1) for n in range(4)}
    state["bn1.weight"] = torch.ones(8)
    with pytest.raises(CheckpointError) as caught:
        load_dense("resnet20-16", state)
    message = str(caught.value)
    assert (
        "5 missing: layer3.2.conv1.weight, layer3.2.bn1.weight, layer3.2.bn1.bias, ..." in message
    )
    assert "4 unexpected: head.0, head.1, head.2, ..." in message
    assert "1 misshapen: bn1.weight (expected (16,), got (8,))." in message
    assert "fits" not in message.replace("does not fit", "")


def test_the_weights_of_a_pruned_network_are_told_from_others(dense):
    pruned = zoo.prune(dense, torch.zeros(1, 3, 16, 16), cf=2, profile="increasing").state_dict()
    with pytest.raises(CheckpointError, match=r"misshapen.*read by zoo\.load_pruned"):
        load_dense("resnet20-16", pruned)
    other = pruned | {"fc.weight": torch.zeros(7, 129)}
    with pytest.raises(CheckpointError, match="misshapen") as caught:
        load_dense("resnet20-16", other)
    assert "load_pruned" not in str(caught.value)


def test_building_for_a_checkpoint_leaves_the_random_state_alone(dense):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_dense("resnet20-16", dense)
    assert torch.equal(torch.rand(3), expected)


def test_building_without_initial_values_ends_where_drawing_repeats_until_it_fits() -> None:
    with Uninitialised():
        layer = torch.nn.Linear(4, 4)
        with torch.no_grad():
            layer.weight.fill_(100)
        torch.nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
        torch.nn.init.kaiming_uniform_(layer.bias[None])
    assert layer.weight.abs().max() <= 0.2


# --- another classifier ---------------------------------------------------------------------------

BACKBONES = {
    "resnet20-16": ("fc.",),
    "vgg16_bn-cifar-512": ("classifier.6.",),
    "torchvision:squeezenet1_1": ("classifier.1.",),
    "timm:mobilenetv3_small_050": ("classifier.",),
    "timm:regnetx_002": ("head.fc.",),
    "timm:deit_tiny_distilled_patch16_224": ("head.", "head_dist."),
}
"""Architecture -> how the names of its classifier's tensors begin."""


@pytest.mark.parametrize("arch", BACKBONES)
@pytest.mark.parametrize("classifier", ["none", "of other classes"])
def test_a_new_classifier_is_a_fresh_networks_and_the_rest_the_checkpoints(arch, classifier):
    state = randomised(build_model(arch, 7)).state_dict()
    if classifier == "none":
        state = {n: t for n, t in state.items() if not n.startswith(BACKBONES[arch])}
    found = load_dense(arch, state, num_classes=3, seed=5)
    assert (found.num_classes, found.new_classifier) == (3, True)
    assert not found.module.training
    fresh = build_model(arch, 3, seed=5).state_dict()
    for name, tensor in found.module.state_dict().items():
        new = name.startswith(BACKBONES[arch])
        assert torch.equal(tensor, (fresh if new else state)[name]), name


def test_as_many_classes_as_the_checkpoint_has_change_nothing(dense):
    found = load_dense("resnet20-16", dense, num_classes=7)
    assert not found.new_classifier
    assert same_state(found.module, dense.state_dict())


def test_a_flattened_maps_image_size_comes_from_the_old_classifier_or_the_argument():
    state = build_model("cnet", 10, image_size=16).state_dict()
    found = load_dense("cnet", state, num_classes=3)
    assert (found.image_size, found.num_classes) == (16, 3)
    backbone = {n: t for n, t in state.items() if not n.startswith("fc.")}
    assert load_dense("cnet", backbone, num_classes=3).image_size == 32
    found = load_dense("cnet", backbone, num_classes=3, image_size=16)
    assert found.module(torch.rand(1, 3, 16, 16)).shape == (1, 3)


def test_without_a_classifier_the_number_of_classes_is_asked_for(dense):
    backbone = {n: t for n, t in dense.state_dict().items() if not n.startswith("fc.")}
    with pytest.raises(
        CheckpointError, match=r"classifier is missing \(fc\.bias, fc\.weight\): pass num_classes="
    ):
        load_dense("resnet20-16", backbone)


@pytest.mark.parametrize(
    ("arch", "without", "named"),
    [
        ("resnet20-16", ("fc.", "layer3.2.bn2."), r"missing: layer3\.2\.bn2\.weight"),
        ("resnet20-16", ("fc.weight",), r"1 missing: fc\.weight"),
        ("vgg16_bn-cifar-512", ("classifier.",), r"6 missing: classifier\.0\.weight"),
    ],
)
@pytest.mark.parametrize("classes", [None, 3])
def test_nothing_but_the_whole_classifier_may_be_missing(arch, without, named, classes):
    state = build_model(arch, 7).state_dict()
    state = {n: t for n, t in state.items() if not n.startswith(without)}
    with pytest.raises(CheckpointError, match=named):
        load_dense(arch, state, num_classes=classes)


def test_what_differs_beside_the_classifier_is_refused_whatever_the_classes(dense):
    state = dict(dense.state_dict())
    state["conv1.weight"] = state["conv1.weight"][:8]
    for wrong in (state, {n: t for n, t in state.items() if not n.startswith("fc.")}):
        with pytest.raises(CheckpointError, match=r"1 misshapen: conv1\.weight"):
            load_dense("resnet20-16", wrong, num_classes=3)


def test_a_backbone_inside_another_network_is_found(dense):
    backbone = {n: t for n, t in dense.state_dict().items() if not n.startswith("fc.")}
    stored = {f"net.backbone.{n}": t for n, t in backbone.items()}
    stored["net.projection.weight"] = torch.ones(4, 4)
    with pytest.warns(UserWarning, match=r"under 'net\.backbone\.' were taken, and 1 other"):
        found = load_dense("resnet20-16", stored, num_classes=3)
    assert found.new_classifier
    assert torch.equal(found.module.layer3[2].bn2.bias, backbone["layer3.2.bn2.bias"])
    with (
        pytest.warns(UserWarning, match="were taken"),
        pytest.raises(CheckpointError, match="pass num_classes="),
    ):
        load_dense("resnet20-16", stored)
    stored |= {f"teacher.{n}": t for n, t in dense.state_dict().items()}
    with pytest.warns(UserWarning, match=r"under 'teacher\.'"):  # that is whole
        assert load_dense("resnet20-16", stored).num_classes == 7


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_classifiers_of_inner_layers_do_not_come_back():
    theirs = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    state = theirs.state_dict()
    for stored in (state, {n: t for n, t in state.items() if not n.startswith("fc.")}):
        found = load_dense("torchvision:googlenet", stored, num_classes=3)
        assert found.new_classifier
        assert found.module(torch.rand(1, 3, 64, 64)).shape == (1, 3)


# --- images of other channels ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "channels"),
    [
        ("timm:resnet18", 1),
        ("timm:repvgg_a0", 2),  # two convolutions see the images
        ("timm:tresnet_m", 1),  # the first sees sixteen pixels of every channel
        ("timm:vit_tiny_patch16_224", 4),
        ("torchvision:mobilenet_v2", 1),
        ("torchvision:densenet121", 5),
        ("resnet20-16", 1),
        ("resnet18-cifar", 2),
    ],
)
def test_the_channels_of_the_images_are_those_of_the_first_convolution(arch, channels):
    theirs = build_model(arch, 7, in_channels=channels).eval()
    state = theirs.state_dict()
    found = load_dense(arch, state)
    assert (found.in_channels, found.num_classes) == (channels, 7)
    assert same_state(found.module, state)
    images = torch.rand(1, channels, 224, 224)
    with torch.no_grad():
        assert torch.equal(found.module(images), theirs(images))
    assert load_dense(arch, build_model(arch, 7)).in_channels == 3


def test_a_torchvision_network_whose_first_convolution_was_replaced_is_read():
    theirs = torchvision.models.resnet18(num_classes=7)
    theirs.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        ours = load_dense("torchvision:resnet18", theirs.eval().state_dict()).module(images)
        assert torch.equal(ours, theirs(images))


def test_other_channels_and_another_classifier_and_a_prefix_together():
    state = build_model("resnet20-16", 7, in_channels=1).state_dict()
    stored = {f"net.{n}": t for n, t in state.items()} | {"loss.weight": torch.ones(7)}
    with pytest.warns(UserWarning, match=r"under 'net\.' were taken"):
        found = load_dense("resnet20-16", stored, num_classes=3, seed=5)
    assert (found.in_channels, found.num_classes, found.new_classifier) == (1, 3, True)
    assert torch.equal(found.module.conv1.weight, state["conv1.weight"])
    fresh = build_model("resnet20-16", 3, in_channels=1, seed=5)
    assert torch.equal(found.module.fc.weight, fresh.fc.weight)


@pytest.mark.parametrize("shape", [(16, 0, 3, 3), (16, 1, 5, 5), (8, 1, 3, 3), (16, 1, 3)])
def test_a_first_convolution_that_differs_otherwise_is_misshapen(shape):
    state = build_model("resnet20-16", 7).state_dict() | {"conv1.weight": torch.ones(shape)}
    with pytest.raises(CheckpointError, match=r"1 misshapen: conv1\.weight"):
        load_dense("resnet20-16", state)


def test_a_narrower_inner_convolution_is_not_taken_for_the_first():
    state = build_model("resnet20-16", 7).state_dict()
    state["layer1.0.conv2.weight"] = state["layer1.0.conv2.weight"][:, :8]
    with pytest.raises(CheckpointError, match=r"1 misshapen: layer1\.0\.conv2\.weight"):
        load_dense("resnet20-16", state)


def test_what_cannot_be_built_for_these_channels_says_so(monkeypatch):
    state = build_model("timm:resnet18", 7, in_channels=1).state_dict()
    create = timm.create_model

    def colour_alone(name, **options):
        if "in_chans" in options:
            raise TypeError("unexpected keyword argument 'in_chans'")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", colour_alone)
    with pytest.raises(
        CheckpointError,
        match=r"1 misshapen: conv1\.weight.* cannot be built for images of 1 channels: .*in_chans",
    ):
        load_dense("timm:resnet18", state)
