"""Write registry/weights/ from checkpoints of small dense networks, and its index.

    BASES=scripts/campaign-results/base
    python scripts/store_weights.py --data-dir DIR --weights \
        "resnet20-16/cifar10=$BASES/resnet20-16/16/cifar10-0/base.safetensors" \
        "resnet20/cifar10=$BASES/resnet20/16/cifar10-0/base.safetensors" \
        "cnet/cifar10=$BASES/cnet/16/cifar10-0/base.safetensors"

They are rounded to half precision; the accuracy in the index is that of the rounded weights on the
test split of CIFAR-10.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from zoo.common.digests import sha256_of
from zoo.common.documents import encode_document, write_json
from zoo.data.datasets import load_data
from zoo.registry.weights import WEIGHTS, BundledWeights, WeightsIndex
from zoo.storage.artefacts import save_checkpoint
from zoo.storage.checkpoints import read_checkpoint
from zoo.storage.dense import load_dense
from zoo.training.finetuning import evaluate

FOLDER = Path(__file__).resolve().parent.parent / "registry" / WEIGHTS


@dataclass(frozen=True)
class Options:
    data_dir: Path
    """folder of CIFAR-10's files"""
    weights: tuple[str, ...]
    """ARCH/NAME=CHECKPOINT of each; what is not named leaves the index"""


def main(options: Options) -> None:
    FOLDER.mkdir(exist_ok=True)
    entries = []
    for text in options.weights:
        name, _, path = text.partition("=")
        entries.append(stored(name, Path(path), options.data_dir))
        print(f"{entries[-1].reference}: {entries[-1].test_accuracy:.2%}")
    kept = {entry.file for entry in entries}
    for file in FOLDER.glob("*.safetensors"):
        if file.name not in kept:
            file.unlink()
    write_json(FOLDER / "index.json", encode_document(WeightsIndex(tuple(entries))))


def stored(name: str, path: Path, data_dir: Path) -> BundledWeights:
    """The index entry of one network, whose file is written."""
    arch = name.partition("/")[0]
    metadata = read_checkpoint(path).metadata
    dense = load_dense(arch, path)
    module = dense.module.half()
    if not all(torch.isfinite(tensor).all() for tensor in module.state_dict().values()):
        raise SystemExit(f"{path} does not fit half precision.")
    data = load_data("cifar10", data_dir, size=int(metadata["image_size"]))
    accuracy = evaluate(module.float(), data.test).accuracy
    entry = BundledWeights(
        reference=f"bundled:{name}",
        architecture=arch,
        data=metadata["data"],
        num_classes=dense.num_classes,
        image_size=int(metadata["image_size"]),
        test_accuracy=round(accuracy, 4),
        epochs=int(metadata["epochs"]),
        seed=int(metadata["seed"]),
        sha256="",
    )
    kept = ("architecture", "data", "image_size", "num_classes", "split_digest", "epochs", "seed")
    file = FOLDER / entry.file
    save_checkpoint(module.half(), file, {key: metadata[key] for key in kept})
    return dataclasses.replace(entry, sha256=sha256_of(file))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
