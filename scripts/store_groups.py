"""Write registry/<architecture>/groups.json for every registered architecture, and the index.

python scripts/store_groups.py
"""

from pathlib import Path

import torch

from zoo.models import ARCHITECTURES, build_model
from zoo.pruning.graph import channel_groups
from zoo.registry import store_groups, write_index

REGISTRY = Path(__file__).resolve().parent.parent / "registry"

for name, known in ARCHITECTURES.items():
    example = torch.zeros(1, 3, known.image_size, known.image_size)
    groups = channel_groups(build_model(name, known.num_classes), example)
    store_groups(name, groups, REGISTRY)
    print(f"{name}: {len(groups.groups)} channel groups")
write_index(REGISTRY)
