"""The contract that surgery is held to, on small members of many families, and that it can fail."""

from __future__ import annotations

import pytest
import torch
from helpers import planned
from torch import nn

from zoo.models import build_model
from zoo.surgery import surgery
from zoo.surgery.masking import masked
from zoo.tracing import contract
from zoo.tracing.contract import masked_forward, randomised, violation
from zoo.tracing.graph import analyse

BOUND = 1e-9

FAMILIES = {
    "resnet20": 32,  # zero-padded shortcuts
    "mobilenet_v2-cifar": 32,
    "vgg16_bn-cifar": 32,
    "torchvision:shufflenet_v2_x0_5": 32,  # channel shuffles
    "torchvision:squeezenet1_1": 64,
    "timm:test_convnext": 32,  # layer normalisation over channels
    "timm:test_nfnet": 32,  # weights standardised, channel attention
    "timm:test_byobnet": 32,
    "timm:test_mambaout": 32,
    "timm:test_coatnet": 160,  # attention with relative positions
    "timm:res2next50": 32,  # split by a width that the module keeps
    "timm:dpn48b": 32,  # sliced by a width that the module keeps
    "timm:skresnet18": 32,
    "timm:resnest14d": 64,
    "timm:regnetx_002": 32,  # grouped convolutions
    "timm:ghostnet_050": 32,
    "timm:cs3darknet_focus_s": 64,
    "timm:inception_next_atto": 32,  # split into unequal parts
    "timm:mobilevit_xxs": 64,
    "timm:poolformerv2_s12": 32,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_network_computes_what_the_masked_dense_one_does(name: str) -> None:
    size = FAMILIES[name]
    # two images: torch's batch norm gives wrong gradients for one, where they come channels-last
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).double()
    module = randomised(build_model(name, 5))
    program, groups = analyse(module, images)
    plan = planned(module, groups, cf=2)
    assert plan.got == pytest.approx(2, rel=0.02)
    assert violation(module, program, groups, plan, images) <= BOUND


@pytest.mark.parametrize("name", ["cnet", "torchvision:resnet18", "torchvision:mobilenet_v2"])
def test_the_program_with_zeros_is_the_module_with_zeros(name: str) -> None:
    images = torch.rand(2, 3, 32, 32).double()
    module = randomised(build_model(name, 5))
    program, groups = analyse(module, images)
    plan = planned(module, groups, cf=2)
    zeroed = masked(module, groups, plan)
    assert torch.equal(masked_forward(program, groups, plan, zeroed)(images)[0], zeroed(images))


class Normalised(nn.Module):
    """Layer normalisation and a channel mean, which depend on how many channels there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x).mean((2, 3)))
        return self.head(x) * x.mean(1, keepdim=True)


def test_operators_over_channels_are_restricted_to_those_kept() -> None:
    images = torch.rand(2, 3, 6, 6).double()
    module = randomised(Normalised())
    program, groups = analyse(module, images)
    plan = planned(module, groups, cf=1.5)
    kept = list(plan.kept["conv"])
    features = module.conv(images).mean((2, 3))[:, kept]
    centred = features - features.mean(1, keepdim=True)
    normal = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    normal = normal * module.norm.weight[kept] + module.norm.bias[kept]
    expected = normal @ module.head.weight[:, kept].T + module.head.bias
    expected = expected * normal.mean(1, keepdim=True)
    (got,) = masked_forward(program, groups, plan, masked(module, groups, plan))(images)
    assert torch.allclose(got, expected, atol=1e-12)
    assert violation(module, program, groups, plan, images) <= BOUND


def test_the_wrong_channels_break_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 3, 32, 32).double()
    module = randomised(build_model("resnet20-16", 5))
    program, groups = analyse(module, images)
    plan, other = (planned(module, groups, seed=seed) for seed in (0, 1))
    assert plan.widths == other.widths
    right = surgery.apply
    monkeypatch.setattr(contract.surgery, "apply", lambda m, g, _: right(m, g, other))
    assert violation(module, program, groups, plan, images) > 1e-3
