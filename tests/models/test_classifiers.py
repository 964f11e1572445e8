"""Classifiers that are not one dense layer at the end."""

from __future__ import annotations

import pytest
import torch
import torchvision

import zoo
from zoo.errors import GraphError


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_classifiers_of_inner_layers_are_left_out() -> None:
    theirs = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    ours = zoo.load("torchvision:googlenet", 2, theirs.state_dict(), profile="equal")
    assert not [name for name, _ in ours.named_parameters() if name.startswith("aux")]
    assert ours.train()(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(GraphError, match=r"'aux1\..*is not used in eval mode"):
        zoo.prune(theirs, torch.rand(1, 3, 64, 64), cf=2)


def test_a_classifier_may_be_a_convolution() -> None:
    theirs = torchvision.models.squeezenet1_1(num_classes=5).eval()
    images = torch.rand(2, 3, 64, 64)
    ours = zoo.create_model("torchvision:squeezenet1_1", 5, pretrained=theirs.state_dict())
    assert torch.equal(ours.eval()(images), theirs(images))
    pruned = zoo.load("torchvision:squeezenet1_1", 2, theirs, profile="equal")
    assert pruned(images).shape == (2, 5)
