"""Scores from images on networks that compute in unusual ways, beside twins that do not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from odd import Net, conv
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import zoo
from zoo.criteria.scores import Scores, channel_scores, labelled_batches
from zoo.errors import GraphError
from zoo.tracing.graph import channel_groups

GENERATOR = torch.Generator().manual_seed(4)
IMAGES = torch.rand(6, 3, 6, 6, generator=GENERATOR)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])

Run = Callable[[nn.Module, Tensor], Tensor]


def network(run: Run) -> Net:
    torch.manual_seed(5)
    parts = {"a": conv(3, 8), "norm": nn.BatchNorm2d(8), "b": conv(8, 6), "head": nn.Linear(6, 3)}
    return Net(run, **parts)


def scored(criterion: str, run: Run, module: nn.Module | None = None) -> Scores:
    module = module or network(run)
    groups = channel_groups(network(plain), IMAGES[:1])
    return channel_scores(criterion, module, groups, 0, [(IMAGES.clone(), LABELS)])


def body(n: nn.Module, x: Tensor) -> Tensor:
    return n.b(n.norm(n.a(x)).relu()).relu()


def plain(n: nn.Module, x: Tensor) -> Tensor:
    return n.head(body(n, x).mean((2, 3)))


def two_calls(n: nn.Module, x: Tensor) -> Tensor:
    return n.head((body(n, x) + body(n, x.flip(-1))).mean((2, 3)))


def one_call(n: nn.Module, x: Tensor) -> Tensor:
    return n.head(sum(body(n, torch.cat([x, x.flip(-1)])).chunk(2)).mean((2, 3)))


@pytest.mark.parametrize(("criterion", "factor"), [("fisher", 1.0), ("taylor", 0.5)])
def test_parts_of_an_image_in_the_batch_dimension_are_that_images(
    criterion: str, factor: float
) -> None:
    together = scored(criterion, one_call)
    for row, expected in zip(together, scored(criterion, two_calls), strict=True):
        assert row == pytest.approx([factor * score for score in expected], rel=1e-4)


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "snip", "taylor_weight"])
def test_what_the_backward_pass_computes_again_it_computes_in_eval_mode(criterion: str) -> None:
    def again(n: nn.Module, x: Tensor) -> Tensor:
        return n.head(checkpoint(body, n, x, use_reentrant=False).mean((2, 3)))

    module = network(again)
    before = copy.deepcopy(module.state_dict())
    for row, expected in zip(
        scored(criterion, again, module), scored(criterion, plain), strict=True
    ):
        assert row == pytest.approx(expected, rel=1e-5)
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("criterion", ["taylor", "snip", "apoz"])
def test_a_network_that_overwrites_its_input_scores_like_one_that_does_not(criterion: str) -> None:
    module, images = network(lambda n, x: plain(n, x.sub_(0.5))), IMAGES.clone()
    groups = channel_groups(network(plain), IMAGES[:1])
    scores = channel_scores(criterion, module, groups, 0, [(images, LABELS)])
    assert torch.equal(images, IMAGES)
    assert scores == scored(criterion, lambda n, x: plain(n, x - 0.5))


def test_zeros_are_counted_in_a_layer_that_is_called_by_keyword() -> None:
    def named(n: nn.Module, x: Tensor) -> Tensor:
        return n.head(input=n.b(input=n.norm(n.a(x)).relu()).relu().mean((2, 3)))

    assert scored("apoz", named) == scored("apoz", plain)


class OwnLinear(nn.Module):
    """nn.Linear under another name."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


def _own_layer() -> Net:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        return n.head(n.own(n.a(x).relu().flatten(2).transpose(1, 2)).relu().mean(1))

    return Net(run, a=conv(3, 16), own=OwnLinear(16, 24), head=nn.Linear(24, 3))


def _own_parameter() -> Net:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        return n.head((n.a(x).relu().movedim(1, -1) @ n.own).relu().mean((1, 2)))

    own = nn.Parameter(torch.rand(16, 24))
    return Net(run, a=conv(3, 16), own=own, head=nn.Linear(24, 3))


def _frozen_start() -> Net:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = n.a(x).relu()
        return n.head(n.b(x).relu().mean((2, 3)))

    return Net(run, a=conv(3, 16), b=conv(16, 16), head=nn.Linear(16, 3))


def _frozen() -> Net:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        return n.head(n.b(n.a(x).relu()).relu().mean((2, 3))).detach()

    return Net(run, a=conv(3, 16), b=conv(16, 16), head=nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_own_layer, "'own' is a parameter of no layer, or of a module that is neither"),
        (_own_parameter, "'own' is a parameter of no layer"),
        (_frozen_start, "computes the layer 'a' without"),
        (_frozen, "computes its output without"),
    ],
)
def test_where_no_gradient_can_be_had_best_takes_a_policy_that_needs_none(
    build: Callable[[], nn.Module], message: str
) -> None:
    module, data = build(), TensorDataset(IMAGES, LABELS)
    with pytest.raises(GraphError, match=message):
        zoo.plan(module, IMAGES[:1], cf=2, profile="equal", criterion="taylor", data=data)
    assert zoo.plan(module, IMAGES[:1], cf=2, data=data).profile == "global-lamp"


def test_a_loader_gives_its_own_batches_and_the_random_state_is_left_alone() -> None:
    data = TensorDataset(torch.rand(40, 3, 8, 8), torch.arange(40) % 3)
    loader = DataLoader(data, 8, shuffle=True)
    before = torch.get_rng_state()
    taken = labelled_batches(loader, "cpu", seed=0, count=16)
    assert torch.equal(torch.get_rng_state(), before)
    for (images, labels), (expected, own) in zip(taken, loader, strict=False):
        assert torch.equal(images, expected)
        assert torch.equal(labels, own)
    assert len(taken) == 2
