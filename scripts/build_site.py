"""Write the static site: `python scripts/build_site.py`, then open site/index.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.publishing.site import write_site

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    out: Path = ROOT / "site"
    """folder to write to; what it holds of an older site is replaced"""


def main(options: Options) -> None:
    pages = write_site(ROOT, options.out)
    print(f"Wrote {len(pages)} pages; open {options.out / 'index.html'}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
