"""Library networks with more than tensors show: other classifiers, or inputs that they scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import zoo
from zoo.errors import CheckpointError, GraphError
from zoo.models import build_model
from zoo.storage.artefacts import MODEL
from zoo.storage.checkpoints import read_safetensors
from zoo.tracing.contract import randomised


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_classifiers_of_inner_layers_are_left_out(tmp_path: Path) -> None:
    theirs = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    ours = zoo.load("torchvision:googlenet", 2, theirs.state_dict(), profile="equal")
    assert not [name for name, _ in ours.named_parameters() if name.startswith("aux")]
    assert zoo.load_pruned(zoo.save(ours, tmp_path / "m")).transform_input
    assert ours.train()(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(GraphError, match=r"'aux1\..*is not used in eval mode"):
        zoo.prune(theirs, torch.rand(1, 3, 64, 64), cf=2)


@pytest.mark.parametrize("arch", ["torchvision:squeezenet1_1", "timm:resnetv2_18", "timm:dla34"])
def test_a_classifier_may_be_a_convolution(arch: str, tmp_path: Path) -> None:
    theirs = build_model(arch, 5, seed=1).eval()
    images = torch.rand(2, 3, 64, 64)
    ours = zoo.create_model(arch, 5, pretrained=theirs.state_dict())
    assert torch.equal(ours(images), theirs(images))
    assert zoo.create_model(arch, 3, pretrained=theirs)(images).shape == (2, 3)
    pruned = zoo.load(arch, 2, theirs, profile="equal")
    again = zoo.load_pruned(zoo.save(pruned, tmp_path / "m"))
    assert torch.equal(again(images), pruned(images))
    assert pruned(images).shape == (2, 5)


def test_a_convolution_is_no_classifier_of_an_architecture_with_a_dense_one() -> None:
    state = build_model("resnet20", 10).state_dict()
    state["fc.weight"] = state["fc.weight"][..., None, None]
    with pytest.raises(CheckpointError, match=r"expected \(10, 64\), got \(10, 64, 1, 1\)"):
        zoo.create_model("resnet20", 10, pretrained=state)


@pytest.mark.parametrize("member", ["googlenet", "inception_v3"])
def test_inputs_are_scaled_as_torchvisions_weights_need_or_as_a_live_network_does(
    member: str,
) -> None:
    arch, images = f"torchvision:{member}", torch.rand(2, 3, 96, 96)
    build = getattr(torchvision.models, member)
    for scaled in (True, False):
        theirs = build(num_classes=5, aux_logits=False, init_weights=False, transform_input=scaled)
        theirs = randomised(theirs).float()
        for live in (theirs, nn.DataParallel(theirs)):
            ours = zoo.create_model(arch, 5, pretrained=live)
            assert torch.equal(ours(images), theirs(images))
        ours = zoo.create_model(arch, 5, pretrained=theirs.state_dict())
        assert torch.equal(ours(images), theirs(images)) == scaled
    assert build_model(arch, 5, in_channels=1).eval()(images[:, :1]).shape == (2, 5)


def test_a_saved_network_scales_its_inputs_as_before(tmp_path: Path) -> None:
    theirs = build_model("torchvision:googlenet", 5)
    theirs.transform_input = False
    ours = zoo.load("torchvision:googlenet", 2, randomised(theirs).float(), profile="equal")
    folder = zoo.save(ours, tmp_path / "m")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(zoo.load_pruned(folder)(images), ours(images))
    tensors, metadata = read_safetensors(folder / MODEL)
    assert metadata.pop("transform_input") == "False"
    save_file(tensors, folder / MODEL, metadata)  # as it was before the setting was written
    assert torch.equal(zoo.load_pruned(folder)(images), ours(images))
