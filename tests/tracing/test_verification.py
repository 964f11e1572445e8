"""What `zoo.prune` gives away was run beside the dense network, whatever made its groups."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from helpers import same_state
from odd import IMAGES, conv, net, param
from torch import Tensor, nn
from torch._subclasses import FakeTensor

import zoo
from zoo import loading
from zoo.errors import GraphError
from zoo.tracing import check, verification
from zoo.tracing.graph import analyse

WRONG = "does not compute what it computes with zeros for the removed channels"


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[None]:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def shuffled() -> nn.Module:
    """A normalisation in as many groups as the width says."""
    return net(lambda _, x: torch.group_norm(x, x.shape[1] // 2))


# --- what is caught -------------------------------------------------------------------------------


def test_groups_of_another_network_of_the_same_shapes_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As stale ones would be: the two layers of the residual lose different channels."""
    plain = net(lambda n, x: n.c(x), c=conv(8, 8))
    tied = net(lambda n, x: x + n.c(x), c=conv(8, 8))
    monkeypatch.setattr(loading, "traced_groups", lambda _, x: (None, analyse(plain, x)[1]))
    alike, uneven = ({"a": 0.5, "b": 0.5, "c": ratio} for ratio in (0.5, 0.75))
    with pytest.raises(GraphError, match=WRONG):
        zoo.prune(tied, IMAGES, cf=3.336, keep=alike)
    wrong = zoo.prune(tied, IMAGES, cf=3.336, keep=alike, verify=False)
    assert wrong(IMAGES).shape == (2, 4)
    with pytest.raises(GraphError, match=r"Net, pruned, does not run: .*verify=False"):
        zoo.prune(tied, IMAGES, cf=2.488, keep=uneven)


def test_a_number_that_changes_with_the_width_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the trace, which keeps such channels whole, left out."""
    zoo.prune(shuffled(), IMAGES, cf=2)
    monkeypatch.setattr(check, "_check_numbers", lambda *_: None)
    monkeypatch.setenv("ZOO_CACHE", "/dev/null")
    with pytest.raises(GraphError, match=WRONG):
        zoo.prune(shuffled(), IMAGES, cf=2)


def test_weights_that_hide_the_error_do_not_pass_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong branch starts at zero, as the last norm of a residual block may."""
    hidden = net(lambda n, x: x + n.scale * torch.group_norm(x, x.shape[1] // 2), scale=param(1))
    nn.init.zeros_(hidden.scale)
    monkeypatch.setattr(check, "_check_numbers", lambda *_: None)
    with pytest.raises(GraphError, match=WRONG):
        zoo.prune(hidden, IMAGES, cf=2)


# --- what passes ----------------------------------------------------------------------------------

PASSING = {
    "layer norm": net(lambda n, x: n.norm(x.movedim(1, -1)).movedim(-1, 1), norm=nn.LayerNorm(8)),
    "channel mean": net(lambda _, x: x * x.mean(1, keepdim=True)),
    "single precision inside": net(lambda n, x: x.float().mul(2).type_as(n.a.weight)),
    "single precision alone": net(lambda _, x: x.float().mul(2)),
    "a scale that must be positive": net(
        lambda n, x: x * n.scale.log(), scale=nn.Parameter(torch.tensor([3.0]))
    ),
}


@pytest.mark.parametrize("name", PASSING)
def test_networks_that_obey_pass_traced_and_from_the_cache(name: str) -> None:
    for _ in range(2):
        assert zoo.prune(PASSING[name], IMAGES, cf=2).pruning.plan.got > 1.9


def test_a_constant_batch_is_kept() -> None:
    fixed = net(lambda _, x: x.view(6, x.shape[1], 64).view(6, x.shape[1], 8, 8))
    assert zoo.prune(fixed, IMAGES.repeat(3, 1, 1, 1), cf=2).pruning.plan.got > 1.9


@pytest.mark.parametrize(
    "middle", [lambda _, x: torch.dropout(x, 0.5, True), lambda _, x: x + float("nan")]
)
def test_what_cannot_be_told_is_said(middle: object) -> None:
    with pytest.warns(UserWarning, match="Net could not be verified"):
        zoo.prune(net(middle), IMAGES, cf=2)
    zoo.prune(net(middle), IMAGES, cf=2, verify=False)


def test_what_has_no_numbers_cannot_be_verified() -> None:
    with pytest.warns(UserWarning, match="could not be verified"):
        pruned = zoo.prune(net().to("meta"), IMAGES.to("meta"), cf=2)
    assert next(pruned.parameters()).is_meta
    with pytest.raises(GraphError, match="'global-l2' ranks channels by their weights"):
        zoo.prune(net().to("meta"), IMAGES.to("meta"), cf=2, profile="global-l2")


def kept_by_itself(n: nn.Module, x: Tensor) -> Tensor:
    if n.grid is None:
        n.grid = torch.linspace(0, 1, 8)
    n.seen.append(x)
    n.last = {"x": x}
    return x + n.grid


@pytest.mark.parametrize("ran", [False, True])
def test_tensors_that_a_network_keeps_beside_its_own_are_no_obstacle(ran: bool) -> None:
    """Ones of a graph, of an earlier call, too; copies of the network have copies of them."""
    keeping = net(kept_by_itself, grid=None, seen=[], last={})
    if ran:
        keeping(IMAGES)
    pruned = zoo.prune(keeping, IMAGES, cf=2)
    assert pruned(IMAGES).shape == (2, 4)
    assert pruned.last["x"].shape[1] < keeping(IMAGES).shape[0] * 4
    assert pruned.seen is not keeping.seen
    assert not any(isinstance(x, FakeTensor) for x in (*keeping.seen, keeping.grid))


# --- what it costs --------------------------------------------------------------------------------


def test_nothing_is_changed_by_it() -> None:
    network = net(lambda n, x: torch.dropout(x, 0.5, n.training)).train()
    state = copy.deepcopy(network.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    zoo.prune(network, IMAGES, cf=2)
    assert torch.equal(torch.rand(3), expected)
    assert network.training
    assert same_state(network, state)


def test_two_items_of_a_large_batch_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = verification._run

    def counted(forward: object, inputs: Tensor, seed: int = 0) -> object:
        sizes.append(len(inputs))
        return run(forward, inputs, seed)

    monkeypatch.setattr(verification, "_run", counted)
    zoo.prune(net(), torch.rand(64, 3, 8, 8), cf=2)
    assert sizes
    assert set(sizes) == {2}
