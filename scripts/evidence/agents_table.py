"""Print how near every agent comes to a known optimum, in equally many evaluations.

python scripts/evidence/agents_table.py --episodes 320 --seeds 5
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from synthetic import Synthetic

from zoo.search.agents import AGENTS, agent


@dataclass(frozen=True, kw_only=True)
class AgentsTable:
    episodes: int = 320
    """evaluations of every search"""
    seeds: int = 5
    """number of seeds of problem and agent, from 0 on"""
    agents: tuple[str, ...] = tuple(AGENTS)
    """which ones; random search always runs, for comparison"""


def shares(name: str, problem: Synthetic, episodes: int) -> tuple[float, float]:
    """Shares of the optimum: of the best episode, and the mean of the agent's final proposals."""
    rewards: list[float] = []
    proposed = agent(name)(
        problem.env(),
        episodes,
        seed=problem.seed,
        on_episode=lambda episode: rewards.append(episode["reward"]),
    )
    final = statistics.mean(episode["reward"] for episode in proposed)
    return max(rewards) / problem.optimum, final / problem.optimum


def summary(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


def main(table: AgentsTable) -> None:
    problems = [Synthetic(seed, base_accuracies=(0.9,)) for seed in range(table.seeds)]
    print(
        f"{problems[0].arch}, {problems[0].cf:g}x parameters, synthetic accuracy, one task; shares "
        f"of the optimum after {table.episodes} evaluations, mean ± sd of {table.seeds} seeds.\n"
        f"Equal profile: {summary([p.equal / p.optimum for p in problems])}.\n"
    )
    random = [shares("random", problem, table.episodes)[1] for problem in problems]
    print("| agent | best found | what it proposes | against random search |")
    print("|---|---:|---:|---|")
    for name in table.agents:
        best, final = zip(*(shares(name, p, table.episodes) for p in problems), strict=True)
        won = sum(mine > other for mine, other in zip(final, random, strict=True))
        beats = statistics.mean(final) > statistics.mean(random)
        verdict = f"{'beats it' if beats else 'does not beat it'}, {won} of {table.seeds} seeds"
        print(
            f"| {name} | {summary(best)} | {summary(final)} "
            f"| {'itself' if name == 'random' else verdict} |",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(AgentsTable))
