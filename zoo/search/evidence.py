"""Evidence for profiles: all policies, fine-tuned equally on base networks that no search saw."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from zlib import crc32

from zoo.data.datasets import ImageSet
from zoo.errors import FactorError, GraphError
from zoo.planning.decisions import Decisions
from zoo.planning.learned import LEARNED, LearnedPolicy, learned_policy, play
from zoo.planning.policies import policy_solution
from zoo.planning.rankings import RANKINGS, ranking_solution
from zoo.search.evaluation import Evaluator
from zoo.search.fidelities import FineTuning, FromScratch, Recalibration
from zoo.search.tasks import Candidate, Task, say
from zoo.spec.cost import CostModel
from zoo.spec.profile import SIBLING, Evidence
from zoo.training.finetuning import evaluate

__all__ = ["evidence", "examined", "learned_widths", "policy_widths"]

Widths = tuple[int, ...]


def examined(task: Task, test: ImageSet) -> Task:
    """`task` with `test` for its validation images: for the final evidence, never for a search."""
    return dataclasses.replace(
        task,
        val=test,
        tested=True,
        split_digest=test.digest(),
        base_accuracy=evaluate(task.module, test).accuracy,
    )


def evidence(
    policies: Mapping[str, Widths],
    exam: Task,
    evaluator: Evaluator,
    fidelity: FineTuning,
    seeds: Sequence[int],
    cost: CostModel,
    *,
    sibling: FromScratch | None = None,
) -> tuple[Evidence, ...]:
    """Test accuracy of every policy after the same fine-tune, and of the dense network.

    Args:
        policies: name -> channels to keep, per group in order.
        exam: a task made by `examined`, whose base network no search saw.
        evaluator: measures, and keeps the results.
        fidelity: the fine-tune; its last weights are measured, so that nothing is chosen on the
            test split.
        seeds: seeds of the channels and of the training, the same for every policy.
        cost: cost model of the architecture's reference, for parameters and MACs.
        sibling: how to train a network of the widths of the policy `equal` from scratch; it should
            see as many images as the base network and the fine-tune together. It has nothing of
            the base network, so that it is trained once for each, with a seed of its own.

    Returns:
        `base` first, then the policies in order, then the sibling. Standard deviations divide by
        n - 1.
    """
    recipe, images = fidelity.recipe, fidelity.train_images
    description = (
        f"fine-tuned {recipe.epochs} epochs of {images or len(exam.train)} images "
        f"({recipe.optimizer}, batch {recipe.batch_size}, lr {recipe.lr:g}), random channels"
        f"{', the dense network as teacher' if fidelity.taught else ''}"
    )
    dense = [exam.base_accuracy]
    rows = [_row("base", cost.sizes, cost, dense, [0], (), "dense, as trained", exam)]
    candidates = [Candidate(exam, widths, seed) for widths in policies.values() for seed in seeds]
    sources = [policy for policy in policies for _ in seeds]
    before = evaluator(candidates, Recalibration(), sources)
    after = evaluator(candidates, fidelity, sources)
    for number, (policy, widths) in enumerate(policies.items()):
        own = slice(number * len(seeds), (number + 1) * len(seeds))
        rows.append(_row(policy, widths, cost, after[own], seeds, before[own], description, exam))
    if sibling is not None:
        widths = policies["equal"]
        seed = crc32(exam.network.encode()) % 2**31
        accuracies = evaluator([Candidate(exam, widths, seed)], sibling, "sibling")
        description = (
            f"trained from scratch {sibling.recipe.epochs} epochs of "
            f"{sibling.train_images or len(exam.train)} images"
        )
        rows.append(_row(SIBLING, widths, cost, accuracies, [seed], (), description, exam))
    return tuple(rows)


def policy_widths(
    policies: Iterable[str], task: Task, model: CostModel, cf: float, metric: str
) -> dict[str, Widths]:
    """Policy -> widths for the base network of `task`, in order; without those that give none.

    Policies that rank channels see the training images of the task.

    Raises:
        ZooError: for an unknown policy.
    """
    found: dict[str, Widths] = {}
    for name in policies:
        try:
            ranking = RANKINGS.get(name)
            if name.partition(":")[0] == LEARNED:
                found[name] = learned_widths(learned_policy(name), task, model, cf, metric)
                continue
            if ranking is None:
                found[name] = policy_solution(name, model, cf, metric).widths
                continue
            scores = task.scores(ranking.criterion)
            found[name] = ranking_solution(ranking, scores, model, cf, metric).widths
        except (FactorError, GraphError) as error:  # out of reach, or no batch norm to rank by
            say(f"{name}: {error}")
    return found


def learned_widths(
    policy: LearnedPolicy,
    task: Task,
    model: CostModel,
    cf: float,
    metric: str,
    *,
    data: bool = True,
) -> Widths:
    """The widths that a learned policy gives, with the task's training images or without.

    Raises:
        FactorError: when the policy that it corrects cannot reach the factor.
    """
    ranking = policy.ranking(metric)
    scores = task.scores(ranking.criterion) if data else None
    decisions = Decisions(task.groups, model, cf, metric, scores=scores, ranking=ranking)
    return play(policy, decisions).widths


def _row(
    policy: str,
    widths: Widths,
    model: CostModel,
    accuracies: Sequence[float],
    seeds: Sequence[int],
    before: Sequence[float],
    fidelity: str,
    exam: Task,
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
        data=f"{exam.val.name}, test split",
        before=tuple(before),
        network=exam.network,
    )
