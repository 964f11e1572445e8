"""Merge the ledgers of searches into registry/ledger/<name>.parquet.

python scripts/merge_ledgers.py NAME RUN ...
"""

import sys
from pathlib import Path

from zoo.search.ledger import merge

name, *files = sys.argv[1:]
target = Path(__file__).resolve().parent.parent / "registry" / "ledger" / f"{name}.parquet"
known = [target] if target.exists() else []
count = merge([*known, *map(Path, files)], target)
print(f"{target.name}: {count} evaluations, {target.stat().st_size:,} bytes")
