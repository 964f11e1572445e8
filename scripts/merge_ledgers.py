"""Merge the ledgers of searches into registry/ledger/<name>.parquet.

python scripts/merge_ledgers.py NAME RUN/ledger.jsonl ...
"""

import sys
from pathlib import Path

from zoo.search.ledger import Ledger, merge, read_parquet

name, *files = sys.argv[1:]
target = Path(__file__).resolve().parent.parent / "registry" / "ledger" / f"{name}.parquet"
known = [read_parquet(target)] if target.exists() else []
count = merge([*known, *(Ledger(Path(file)) for file in files)], target)
print(f"{target.name}: {count} evaluations, {target.stat().st_size:,} bytes")
