"""Write the model cards from the registry, or say which are out of date.

python scripts/write_cards.py
python scripts/write_cards.py --check
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.publishing.cards import stale_cards, write_cards

CARDS = Path(__file__).resolve().parents[1] / "model_cards"


@dataclass(frozen=True)
class Options:
    check: bool = False
    """write nothing; fail if a card is out of date"""


def main(options: Options) -> int:
    if not options.check:
        print(f"Wrote {len(write_cards(CARDS))} files to {CARDS.name}/.")
        return 0
    stale = stale_cards(CARDS)
    for line in stale:
        print(f"{CARDS.name}/{line}", file=sys.stderr)
    if stale:
        print("Run `make cards`.", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
