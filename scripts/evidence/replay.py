"""How well every agent searches where the registry's evaluations stand in for the network.

    python scripts/evidence/replay.py --arch resnet20-16 --cf 4 --metric macs

A search of 640 evaluations takes seconds to a minute: nothing is trained. What is counted is the
accuracy that a Gaussian process, fitted to a ledger, predicts for the best profile so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro
from evaluations_to_score import cell

from zoo.errors import ZooError
from zoo.search.agents import SCREENED, agent
from zoo.search.ledger_benchmark import LedgerBenchmark


@dataclass(frozen=True, kw_only=True)
class Options:
    arch: str = "resnet20-16"
    """architecture"""
    cf: float = 4.0
    """factor to reach"""
    metric: Literal["params", "macs"] = "params"
    """of the factor"""
    network: str = ""
    """first digits of the sha256 of a base network; by default that of most evaluations"""
    fidelity: str = ""
    """how the fidelity begins; by default that of most evaluations"""
    near: bool = False
    """predict from profiles within a tenth of the factor alone"""
    agents: tuple[str, ...] = (
        "random", "cma-es", "cma-es, surrogate", "annealing", "genetic", "swarm", "ppo", "ddpg",
        "gnn",
    )  # fmt: skip
    """agents; with `, surrogate` a random forest chooses among four proposals for each played"""
    at: tuple[int, ...] = (40, 160, 640)
    """numbers of evaluations at which the best is looked at; searches have the last one"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of the agents"""


def curve(name: str, benchmark: LedgerBenchmark, options: Options, seed: int) -> list[float]:
    """The predicted accuracy of the best profile after each number of evaluations of `at`."""
    kind, _, screened = name.partition(", ")
    played: list[tuple[float, float]] = []
    own = {"screen": 4} if screened and kind in SCREENED else {}
    agent(kind)(
        benchmark.env(options.cf, options.metric),
        max(options.at),
        seed=seed,
        on_episode=lambda episode: played.append((episode["reward"], episode["accuracy"])),
        **own,
    )
    return [max(played[:count])[1] for count in options.at]


def replay(options: Options) -> None:
    """Print the table, a line for each agent as it is done."""
    for name in options.agents:
        agent(name.partition(", ")[0])
    for name, numbers, least in (("--at", options.at, 1), ("--seeds", options.seeds, 0)):
        if not numbers or min(numbers) < least:
            raise ZooError(f"{name} must be numbers of at least {least}, got {numbers}.")
    near = (options.metric, options.cf) if options.near else None
    benchmark = LedgerBenchmark(
        options.arch, network=options.network, fidelity=options.fidelity, near=near
    )
    of, (rho, better) = benchmark.measurement, benchmark.held_out()
    print(
        f"{options.arch}, {options.cf:g}x {options.metric}; base network {of.network[:8]}, "
        f"{of.classes} classes at {of.image_size}x{of.image_size}, {of.fidelity}. Predicted from "
        f"{len(benchmark.profiles):,} profiles; rank correlation with held-out ones {rho:.2f}, in "
        f"the better half {better:.2f}. Mean ± sd of {len(options.seeds)} seeds.\n"
    )
    print(f"| agent | {' | '.join(f'after {count}' for count in options.at)} |")
    print("|---|" + "---:|" * len(options.at))
    for name in options.agents:
        curves = [curve(name, benchmark, options, seed) for seed in options.seeds]
        print(f"| {name} | {' | '.join(map(cell, zip(*curves, strict=True)))} |", flush=True)


def main(options: Options) -> None:
    try:
        replay(options)
    except ZooError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
