"""The criterion `reinforce`: an agent reads the filters and learns by trial which to keep.

Huang et al., 2018, "Learning to prune filters in convolutional neural networks".
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

from zoo.common.seeding import seeded
from zoo.criteria.data_scores import Batches
from zoo.criteria.weight_scores import Scores, along
from zoo.data.batches import check_labels
from zoo.errors import ZooError, integer
from zoo.spec.groups import ChannelGroups, Group
from zoo.surgery.masking import without
from zoo.surgery.surgery import named_tensors

__all__ = ["FilterAgent", "reinforce_scores"]


@dataclass(frozen=True)
class FilterAgent:
    """Settings of `reinforce_scores`, which takes groups · updates · samples forward passes."""

    updates: int = 100
    """maximum updates of each agent; it stops earlier when it has converged"""
    samples: int = 6
    """decisions tried per update"""
    images: int = 64
    """maximum images per measurement of the accuracy"""
    bound: float = 0.2
    """drop of accuracy above which pruning is punished"""
    start: float = 0.7
    """approximate keep probability of every channel before the first update"""
    learning_rate: float = 0.16
    """of gradient descent; divided by the number of channels, because the gradient grows with it"""
    certainty: float = 0.98
    """an agent has converged when the likelier decisions have this mean probability"""

    def __post_init__(self) -> None:
        integer("samples", self.samples, 2)


def reinforce_scores(
    module: nn.Module,
    groups: ChannelGroups,
    seed: int,
    batches: Batches,
    settings: FilterAgent | None = None,
) -> Scores:
    """The keep probabilities that a policy network per channel group learns by REINFORCE.

    As in the paper, each agent sees the filters that produce its group's channels, and decides on
    them alone: the rest of the network is whole. Each update draws some decisions and masks the
    channels that they drop. The reward is (b - (A - A')) / b · log(N / C): A and A' are the
    accuracies of the whole and the masked network on one batch, b bounds their difference, and C of
    N channels are kept.

    Unlike in the paper, the policy network is a dense layer on each filter and two dense layers on
    the results, no convolution, because the order of filters means nothing. No network is
    fine-tuned before its reward, so b is larger. No group is cut before the next one is learnt.

    Args:
        module: the network, not edited; a copy is evaluated in eval mode.
        groups: its channel groups.
        seed: of the policy networks and the decisions.
        batches: (images, labels) on the module's device, used in turn.
        settings: of the agents; by default `FilterAgent()`.

    Raises:
        DataError: when a label does not fit the network's outputs.
        ZooError: when there are no batches.
    """
    settings = settings or FilterAgent()
    batches = [
        part
        for images, labels in batches
        for part in zip(images.split(settings.images), labels.split(settings.images), strict=True)
    ]
    if not batches:
        raise ZooError("The criterion 'reinforce' needs data, and there are no batches.")
    network = copy.deepcopy(module).eval().requires_grad_(False)
    whole = [_accuracy(network, *batch) for batch in batches]
    scores = []
    for group in groups.groups:
        with seeded(seed):
            trials = itertools.cycle(zip(batches, whole, strict=True))
            scores.append(_learn(network, group, trials, settings).tolist())
    return scores


def _learn(
    network: nn.Module,
    group: Group,
    trials: Iterator[tuple[tuple[Tensor, Tensor], float]],
    settings: FilterAgent,
) -> Tensor:
    """The keep probability of each unit of `group`, (size,); the network ends unchanged."""
    tensors = named_tensors(network)
    filters = _filters(tensors, group)
    policy = _policy(filters, settings.start)
    optimizer = torch.optim.SGD(policy.parameters(), settings.learning_rate / group.size)
    with torch.enable_grad():
        for (images, labels), whole in itertools.islice(trials, settings.updates):
            keep = Bernoulli(logits=policy(filters))
            if torch.maximum(keep.probs, 1 - keep.probs).mean() >= settings.certainty:
                break
            decisions = keep.sample((settings.samples,))
            rewards = []
            for decision in decisions:
                with without(tensors, group, (decision == 0).nonzero().flatten().tolist()):
                    drop = whole - _accuracy(network, images, labels)
                efficiency = math.log(group.size / max(1, int(decision.sum())))
                rewards.append((1 - drop / settings.bound) * efficiency)
            advantages = _standardised(torch.tensor(rewards, dtype=torch.float64))
            loss = -(advantages * keep.log_prob(decisions).sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.sigmoid(policy(filters)).detach()


def _filters(tensors: dict[str, Tensor], group: Group) -> Tensor:
    """All the weights that produce each unit, standardised, (size, weights of one unit)."""
    rows = []
    for slot in group.filter_slots:
        index = [list(slot.positions(unit)) for unit in range(group.size)]
        filters = along(tensors[slot.tensor].detach().cpu().double(), slot)
        rows.append(filters[torch.tensor(index)].flatten(1))
    return _standardised(torch.cat(rows, 1))


def _standardised(values: Tensor) -> Tensor:
    """`values` with mean 0 and standard deviation 1, or all 0 if they are equal."""
    return (values - values.mean()) / values.std(correction=0).clamp(min=1e-12)


def _policy(filters: Tensor, start: float) -> nn.Module:
    """A network: filters (size, weights) -> logits (size,) of keep probabilities near `start`."""
    size, weights = filters.shape
    last = nn.Linear(64, size)
    nn.init.constant_(last.bias, math.log(start / (1 - start)))
    return nn.Sequential(
        nn.Linear(weights, 16), nn.ReLU(), nn.Flatten(0), nn.Linear(16 * size, 64), nn.ReLU(), last
    ).double()


def _accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        logits = network(images)
    check_labels(labels, logits)
    return (logits.argmax(1) == labels).double().mean().item()
