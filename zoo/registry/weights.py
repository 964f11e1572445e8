"""Trained weights that ship with the package, so that examples run at once. No torch.

`registry/weights/` holds a safetensors file for each, in half precision, and an index that says
what it was trained on and how well it does. `scripts/store_weights.py` writes both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zoo.common.digests import sha256_of
from zoo.common.documents import decode_document, read_json
from zoo.errors import DocumentError, unknown
from zoo.registry.store import registry_folder

__all__ = ["BundledWeights", "WeightsIndex", "list_weights", "weights_path"]

WEIGHTS = "weights"


@dataclass(frozen=True)
class BundledWeights:
    """The weights of one dense network.

    Attributes:
        reference: `bundled:<architecture>/<name>`, as `zoo.load` takes it.
        architecture: as `zoo.load` takes it.
        data: what it was trained on, without the validation split.
        num_classes, image_size: of the data.
        test_accuracy: top-1 in [0, 1] of these very weights on the test split.
        epochs, seed: of the training.
        sha256: of the file.
    """

    reference: str
    architecture: str
    data: str
    num_classes: int
    image_size: int
    test_accuracy: float
    epochs: int
    seed: int
    sha256: str

    @property
    def file(self) -> str:
        """Its name in `registry/weights/`."""
        return self.reference.removeprefix("bundled:").replace("/", "-") + ".safetensors"


@dataclass(frozen=True)
class WeightsIndex:
    weights: tuple[BundledWeights, ...]


def list_weights(arch: str | None = None) -> list[BundledWeights]:
    """The bundled weights, optionally of one architecture."""
    path = registry_folder() / WEIGHTS / "index.json"
    if not path.is_file():
        return []
    entries = decode_document(WeightsIndex, read_json(path), str(path)).weights
    return [entry for entry in entries if arch in (None, entry.architecture)]


def weights_path(reference: str) -> Path:
    """The file of `bundled:<architecture>/<name>`.

    Raises:
        ZooError: when there are no such weights, with those that exist.
        DocumentError: when the file is not the one that the index lists.
    """
    entries = {entry.reference: entry for entry in list_weights()}
    if reference not in entries:
        raise unknown("bundled weights", reference, entries)
    entry = entries[reference]
    path = registry_folder() / WEIGHTS / entry.file
    if not path.is_file() or sha256_of(path) != entry.sha256:
        raise DocumentError(f"{path} is not the file that the index of bundled weights lists.")
    return path
