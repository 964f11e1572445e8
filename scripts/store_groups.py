"""Write registry/<architecture>/groups.json for registered architectures, and the index.

python scripts/store_groups.py [ARCHITECTURE ...]     without names, for all of them
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from zoo.models import ARCHITECTURES, STORED, architecture, build_model
from zoo.registry.store import store_groups, write_index
from zoo.tracing.fingerprint import fingerprint
from zoo.tracing.graph import channel_groups

REGISTRY = Path(__file__).resolve().parent.parent / "registry"

for name in sys.argv[1:] or (*ARCHITECTURES, *STORED):
    known = architecture(name)
    module = build_model(name, known.num_classes)
    groups = channel_groups(module, torch.zeros(1, 3, known.image_size, known.image_size))
    store_groups(name, replace(groups, fingerprint=fingerprint(module)), REGISTRY)
    print(f"{name}: {len(groups.groups)} channel groups")
write_index(REGISTRY)
