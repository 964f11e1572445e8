"""Classifiers that are not one dense layer at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

import zoo
from zoo.errors import CheckpointError, GraphError
from zoo.models import build_model


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_classifiers_of_inner_layers_are_left_out() -> None:
    theirs = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    ours = zoo.load("torchvision:googlenet", 2, theirs.state_dict(), profile="equal")
    assert not [name for name, _ in ours.named_parameters() if name.startswith("aux")]
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
