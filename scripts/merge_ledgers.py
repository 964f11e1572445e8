"""Merge the ledgers of searches into registry/ledger/<architecture>.parquet.

    python scripts/merge_ledgers.py resnet20-16 RUN ...

Of a run over several architectures, the evaluations of those base networks are taken that
campaign-results/ or the architecture's ledger has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from zoo.common.digests import sha256_of
from zoo.errors import ZooError
from zoo.registry.store import folder_name
from zoo.search.ledger import read, write
from zoo.search.lookup import ledger_path
from zoo.search.summary import costs_of

BASES = Path(__file__).parent / "campaign-results" / "base"


@dataclass(frozen=True)
class Options:
    arch: Annotated[Positional[str], tyro.conf.arg(metavar="ARCH")]
    """architecture"""
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """folders or files of the ledgers"""
    all: bool = False
    """take every evaluation: the runs are of this architecture alone"""


def main(options: Options) -> None:
    """Merge, and print how many evaluations the ledger has now.

    Raises:
        ZooError: for evaluations that are not of the architecture.
    """
    target = ledger_path(options.arch)
    earlier = read([target]) if target.is_file() else []
    own = BASES / folder_name(options.arch)
    networks = {row.key.network for row in earlier}
    networks |= {sha256_of(path) for path in own.rglob("*.safetensors")}
    rows = read(options.runs)
    wanted = [row for row in rows if options.all or row.key.network in networks]
    costs_of(options.arch, wanted)
    count = write([*earlier, *wanted], target)
    left = len(rows) - len(wanted)
    print(
        f"{target.name}: {count:,} evaluations, {target.stat().st_size:,} bytes; {left:,} left out"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ZooError as error:
        raise SystemExit(str(error)) from None
