"""Search a profile, measure it beside its rivals on a base network no search saw, and bundle both.

    python scripts/campaign.py --search.arch resnet20-16 --search.cf 4 --search.size 16 \
        --search.data-dir DIR --search.tasks s0.safetensors s1.safetensors --search.out runs/cf4 \
        --held-back s3.safetensors

`evidence.json` beside the profile survives an interruption: what is measured is not measured again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.cost import cost_model
from zoo.data import load_data
from zoo.documents import decode, read_json, write_json
from zoo.errors import FactorError
from zoo.profile import Evidence
from zoo.pruning.policies import policy_solution
from zoo.registry import folder_name, stored_groups, write_index
from zoo.search.campaign import SearchConfig, load_tasks, search_profile
from zoo.search.evidence import evidence
from zoo.training import Recipe

REGISTRY = Path(__file__).resolve().parent.parent / "registry"


@dataclass(frozen=True)
class Campaign:
    search: SearchConfig
    """the search"""
    held_back: str
    """checkpoint of a base network that no search saw"""
    rivals: tuple[str, ...] = ("equal", "greedy", "increasing")
    """policies measured beside the searched profile, where they reach its factor"""
    epochs: int = 3
    """of the fine-tune that every policy gets"""
    lr: float = 0.05
    """its peak learning rate"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the channels kept and of the training"""


def main(campaign: Campaign) -> None:
    config = campaign.search
    profile = search_profile(config)
    groups = stored_groups(config.arch)
    assert groups is not None
    widths = {"searched": tuple(profile.kept[name] for name in groups.names)}
    for policy in campaign.rivals:
        try:
            solution = policy_solution(policy, cost_model(groups), config.cf, config.metric)
            widths[policy] = solution.widths
        except FactorError as error:
            print(f"{policy}: {error}")
    (base,) = load_tasks(dataclasses.replace(config, tasks=(campaign.held_back,)))
    test = load_data(config.data, config.data_dir, size=config.size).test
    recipe = Recipe(epochs=campaign.epochs, lr=campaign.lr, precision="fp32")
    store = config.out / "evidence.json"
    rows = [decode(Evidence, row, str(store)) for row in read_json(store)] if store.exists() else []
    for policy, kept in widths.items():
        if policy not in {row.policy for row in rows}:
            new = evidence(config.arch, {policy: kept}, base, test, recipe, campaign.seeds)
            rows += new if not rows else new[1:]
            write_json(store, rows)
    profile = dataclasses.replace(profile, evidence=tuple(rows))
    profile.write(REGISTRY / folder_name(config.arch) / f"{profile.name}.json")
    write_index(REGISTRY)
    for row in rows:
        print(f"{row.policy:<12}{row.params:>10,} params  {row.mean:.2%} ± {row.sd:.2%}")


if __name__ == "__main__":
    main(tyro.cli(Campaign, description=__doc__))
