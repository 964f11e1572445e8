"""Write registry/published/ from channel counts that others published, and its index.

    python scripts/store_published.py [COUNTS.json]

COUNTS.json is a list of objects with the keys name, architecture, source, licence, claimed, note
and kept (channel group -> channels kept). The counts of timm's own pruned networks stay in timm.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from zoo.common.digests import sha256_of
from zoo.common.documents import decode, encode_document, read_json, write_json
from zoo.errors import ZooError
from zoo.models import architecture
from zoo.registry.published import TimmCounts, profile_of
from zoo.registry.store import stored_groups, write_published_index
from zoo.spec.profile import Publication, Reference

REGISTRY = Path(__file__).resolve().parent.parent / "registry"

MIIL = "Alibaba MIIL's pruned networks in timm"
KNAPSACK = (
    "Knapsack Pruning with Inner Distillation (Aflalo et al., 2020, arXiv:2002.08258), in timm"
)
TIMM = {
    "ecaresnet50d_pruned": (MIIL, ""),
    "ecaresnet101d_pruned": (MIIL, ""),
    "efficientnet_b1_pruned": (
        KNAPSACK,
        "78.3 % top-1 on ImageNet (github.com/huggingface/pytorch-image-models/pull/136)",
    ),
    "efficientnet_b2_pruned": (KNAPSACK, ""),
    "efficientnet_b3_pruned": (KNAPSACK, ""),
}
"""Name -> source, and what its authors claim, where that was found."""


def reference(arch: str) -> Reference:
    known = architecture(arch)
    return Reference(known.num_classes, known.image_size)


def write(name: str, document: object) -> None:
    write_json(REGISTRY / "published" / f"{name}.json", encode_document(document))
    print(name)


@dataclass(frozen=True)
class Counts:
    """One entry of COUNTS.json."""

    name: str
    architecture: str
    source: str
    licence: str
    claimed: str
    note: str
    kept: dict[str, int]


for number, raw in enumerate(read_json(Path(sys.argv[1])) if len(sys.argv) > 1 else ()):
    given = decode(Counts, raw, f"{sys.argv[1]}[{number}]")
    arch = given.architecture
    groups = stored_groups(arch)
    if groups is None:
        raise ZooError(f"The channel groups of {arch} are not stored: run store_groups.py first.")
    publication = Publication(given.source, given.licence, given.claimed, given.note)
    write(given.name, profile_of(arch, given.kept, groups, reference(arch), publication))
package = importlib.util.find_spec("timm").submodule_search_locations[0]
for name, (source, claimed) in TIMM.items():
    arch = f"timm:{name.removesuffix('_pruned')}"
    file = Path(package) / "models" / "_pruned" / f"{name}.txt"
    digest = sha256_of(file)
    publication = Publication(source, "Apache-2.0", claimed, "read from the installed timm")
    write(name, TimmCounts(arch, file.name, digest, reference(arch), publication))
write_published_index(REGISTRY)
