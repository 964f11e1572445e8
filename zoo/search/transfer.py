"""Training of the learned policy: PPO over several networks, metrics and factors at once.

An episode is one `zoo.planning.decisions.Decisions`: one step per channel group, whose action is
the correction. Its reward is the accuracy above that of the zero actions, which are the known
policy's widths with the same channels and images, in units of the dense network's accuracy above
chance. So episodes of different networks can be mixed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.criteria.weight_scores import Scores
from zoo.errors import FactorError, ZooError
from zoo.planning.decisions import FEATURES, Decisions
from zoo.planning.learned import LearnedPolicy, Training
from zoo.planning.rankings import BEST_RANKING, RANKINGS
from zoo.search.evaluation import Evaluate
from zoo.search.tasks import SEARCH_SEEDS, Candidate, Task, say
from zoo.spec.cost import CostModel, cost_model

try:
    import gymnasium
except ImportError:
    raise ZooError("The search needs gymnasium: pip install 'prunezoo[search]'.") from None

__all__ = ["Case", "Played", "TransferEnv", "TransferSettings", "cases", "learn"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class TransferSettings:
    """What the policy is trained on, and how."""

    metrics: tuple[str, ...] = ("macs", "params")
    """what is compressed"""
    factors: tuple[float, ...] = (2.0, 4.0, 6.0)
    """compression factors"""
    draws: int = 4
    """random choices of channels per network; every episode has one of them"""
    episodes: int = 2000
    """to play, in whole rounds"""
    round_steps: int = 512
    """decisions between two updates"""
    epochs: int = 10
    """passes over a round's decisions in an update"""
    lr: float = 1e-3
    """learning rate"""
    std: float = 0.3
    """initial standard deviation of the corrections"""
    hidden: int = 64
    """units of each of the two tanh layers"""
    seed: int = 0
    """of the policy, its actions and the order of the cases"""


@dataclass(frozen=True)
class Case:
    """What an episode is played on.

    Attributes:
        arch: name of the network, for the reports.
        task, cost: the base network with its data, and its costs.
        metric, cf: what to reach.
        scores: of its channels by the ranking's criterion; None to go without.
        seed: of the channels kept.
    """

    arch: str
    task: Task
    cost: CostModel
    metric: str
    cf: float
    scores: Scores | None
    seed: int


@dataclass(frozen=True)
class Played:
    """A finished episode: the case, its actions, and both accuracies."""

    case: Case
    actions: tuple[float, ...]
    widths: tuple[int, ...]
    known: float
    accuracy: float
    reward: float


def cases(tasks: Sequence[tuple[str, Task]], settings: TransferSettings) -> list[Case]:
    """Every task by every metric and factor, with and without scores, by every draw of channels.

    Cases whose factor the known policy cannot reach are left out.

    Args:
        tasks: pairs (architecture, task); the architectures may differ.
        settings: of the training.
    """
    found = list[Case]()
    for arch, task in tasks:
        cost = cost_model(task.groups)
        for metric in settings.metrics:
            told = task.scores(RANKINGS[BEST_RANKING[metric]].criterion)
            for cf in settings.factors:
                for scores in (told, None):
                    try:
                        Decisions(task.groups, cost, cf, metric, scores=scores)
                    except FactorError as error:
                        say(f"{arch}: {error}")
                        continue
                    for draw in range(settings.draws):
                        seed = SEARCH_SEEDS[0] + draw
                        found.append(Case(arch, task, cost, metric, cf, scores, seed))
    return found


@dataclass
class TransferEnv(gymnasium.Env[Array, Array]):
    """Episodes over the cases, in an order that is drawn anew after each pass over them.

    Args:
        cases: to play.
        evaluate: candidates -> accuracies.
        seed: of the order.
        on_episode: called with every finished episode.
    """

    cases: Sequence[Case]
    evaluate: Evaluate
    seed: int = 0
    on_episode: Callable[[Played], None] = lambda _: None
    _waiting: list[Case] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.cases:
            raise ZooError("No case to learn from: no factor can be reached on any task.")
        self._random = random.Random(f"cases:{self.seed}")
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-2.0, 2.0, (len(FEATURES),), np.float32)

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode on the next case."""
        super().reset(seed=seed)
        if not self._waiting:
            self._waiting = self._random.sample(list(self.cases), len(self.cases))
        self._case = case = self._waiting.pop()
        self._decisions = Decisions(
            case.task.groups, case.cost, case.cf, case.metric, scores=case.scores
        )
        return self._decisions.observe(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Correct the next group by `action`, of shape (1,)."""
        decisions = self._decisions
        decisions.decide(float(np.asarray(action).item()))
        if not decisions.finished:
            return decisions.observe(), 0.0, False, False, {}
        played = self._played()
        self.on_episode(played)
        return decisions.observe(), played.reward, True, False, {}

    def _played(self) -> Played:
        case, decisions = self._case, self._decisions
        try:
            widths = decisions.solution().widths
        except FactorError:  # corrections so far apart that no common scale reaches the factor
            widths = decisions.known.widths
        known, accuracy = self.evaluate(
            [Candidate(case.task, each, case.seed) for each in (decisions.known.widths, widths)]
        )
        scale = case.task.base_accuracy - 1 / len(case.task.val.classes)
        reward = (accuracy - known) / scale
        return Played(case, tuple(decisions.corrections), widths, known, accuracy, reward)


def learn(
    cases: Sequence[Case],
    evaluate: Evaluate,
    settings: TransferSettings,
    *,
    fidelity: str,
    command: str,
    on_episode: Callable[[Played], None] = lambda _: None,
) -> LearnedPolicy:
    """Train a policy on the cases; it begins with corrections of zero.

    Args:
        cases: to learn from.
        evaluate: candidates -> accuracies.
        settings: of the training.
        fidelity, command: for the record of the training.
        on_episode: called with every finished episode, in order.

    Raises:
        ZooError: when Stable-Baselines3 is not installed.
    """
    from zoo.search.agents.ppo import PPOSettings, train_corrections

    env = TransferEnv(cases, evaluate, settings.seed, on_episode)
    own = PPOSettings(
        epochs=settings.epochs, lr=settings.lr, std=settings.std, hidden=settings.hidden,
        target_kl=0.05,
    )  # fmt: skip
    actor = train_corrections(
        env, settings.episodes, steps=settings.round_steps, seed=settings.seed, settings=own
    )
    tensors = {
        f"{number}.{kind}": tensor.detach().numpy().astype(np.float32).copy()
        for number, layer in enumerate(actor)
        for kind, tensor in (("weight", layer.weight), ("bias", layer.bias))
    }
    tasks = {id(case.task): case for case in cases}.values()
    training = Training(
        features=FEATURES,
        known={metric: BEST_RANKING[metric] for metric in settings.metrics},
        architectures=_once(case.arch for case in tasks),
        networks=_once(case.task.network for case in tasks),
        data=_once(case.task.val.name for case in tasks),
        metrics=settings.metrics,
        factors=settings.factors,
        episodes=settings.episodes,
        fidelity=fidelity,
        command=command,
    )
    return LearnedPolicy(tensors, training)


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
