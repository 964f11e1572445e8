"""Plot every reward over accuracy and compression (the paper's figures 9 to 11).

python scripts/evidence/landscapes.py --out plots
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.common.plots import reward_landscape, save
from zoo.search.reward import REWARDS, landscape


@dataclass(frozen=True)
class Landscapes:
    out: Path
    """folder of the images"""
    cf: float = 4.0
    """compression factor asked for"""


def main(config: Landscapes) -> None:
    for name in REWARDS:
        labels = "share of the base accuracy", "removed fraction"
        figure = reward_landscape(*landscape(name, config.cf), f"{name}, {config.cf:g}x", labels)
        path = config.out / f"{name}.png"
        save(figure, path)
        print(path)


if __name__ == "__main__":
    main(tyro.cli(Landscapes, description=__doc__))
