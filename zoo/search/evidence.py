"""Evidence for profiles: every policy fine-tuned alike on a base network that no search saw."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.cost import cost_model
from zoo.data import ImageSet
from zoo.profile import Evidence
from zoo.pruning.known_groups import reference_groups
from zoo.search.evaluation import Task, cut, recalibrate, sample, say
from zoo.training import Recipe, evaluate, finetune

__all__ = ["evidence"]

Widths = tuple[int, ...]


def evidence(
    arch: str,
    policies: Mapping[str, Widths],
    base: Task,
    test: ImageSet,
    recipe: Recipe,
    seeds: Sequence[int],
    train_images: int | None = None,
) -> tuple[Evidence, ...]:
    """Test accuracy of every policy after the same fine-tune, and of the dense network as it is.

    Args:
        arch: the architecture; costs are stated at its reference.
        policies: name -> channels to keep, per group in order.
        base: a base network that no search saw, and its data.
        test: the split that accuracies are measured on.
        recipe: of the fine-tune on `base.train`; the best epoch is chosen on `base.val`.
        seeds: of the channels kept and of the training, the same for every policy.
        train_images: of the fine-tune; all by default.

    Returns:
        `base` first, then the policies in order. Standard deviations divide by n - 1.
    """
    model = cost_model(reference_groups(arch))
    start = evaluate(base.module, test).accuracy
    rows = [
        _evidence("base", model.sizes, model, [start], [0], (), "dense, as trained", test),
    ]
    fidelity = (
        f"fine-tuned {recipe.epochs} epochs of {train_images or len(base.train)} images "
        f"({recipe.optimizer}, batch {recipe.batch_size}, lr {recipe.lr:g}), random channels"
    )
    train = sample(base.train, train_images)
    for policy, widths in policies.items():
        before, after = [], []
        for seed in seeds:
            module = cut(base, widths, seed).to(next(base.module.parameters()).device)
            recalibrate(module, base.module, sample(base.train, 2048))
            before.append(evaluate(module, test).accuracy)
            module = cut(base, widths, seed)
            if finetune(
                module, train, base.val, recipe=recipe, seed=seed, progress=False
            ).interrupted:
                raise KeyboardInterrupt
            after.append(evaluate(module, test).accuracy)
            say(f"{policy}, seed {seed}: {before[-1]:.2%} before, {after[-1]:.2%} after")
        rows.append(_evidence(policy, widths, model, after, seeds, before, fidelity, test))
    return tuple(rows)


def _evidence(
    policy: str,
    widths: Widths,
    model: Any,
    accuracies: Sequence[float],
    seeds: Sequence[int],
    before: Sequence[float],
    fidelity: str,
    test: ImageSet,
) -> Evidence:
    cost = model(widths)
    return Evidence(
        policy=policy,
        params=cost.params,
        macs=cost.macs,
        mean=statistics.mean(accuracies),
        sd=statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        seeds=tuple(seeds),
        accuracies=tuple(accuracies),
        fidelity=fidelity,
        data=f"{test.name}, test split",
        before=tuple(before),
    )
