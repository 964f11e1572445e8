"""Measure how well every criterion ranks channels: Spearman's correlation with the oracle.

    python scripts/evidence/oracle_table.py --arch cnet --weights base.safetensors --data digits \
        --size 16
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from zoo.criteria.oracle import oracle, spearman
from zoo.criteria.scores import CRITERIA, channel_scores, labelled_batches
from zoo.data.datasets import load_data
from zoo.errors import ZooError
from zoo.storage.dense import load_dense
from zoo.tracing.known_groups import groups_of


@dataclass(frozen=True, kw_only=True)
class OracleTable:
    arch: str
    """architecture of the checkpoint"""
    weights: str
    """dense checkpoint"""
    data: str
    """data set whose training images the oracle and the criteria see"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    size: int | None = None
    """pixels per side; by default the checkpoint's, or the architecture's reference"""
    images: int = 512
    """at least this many training images are used, or all there are"""
    seed: int = 0
    """of the choice of images, and of the random criterion"""


def main(table: OracleTable) -> None:
    dense = load_dense(table.arch, table.weights, image_size=table.size)
    module, size = dense.module, dense.image_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train = load_data(table.data, table.data_dir, size=size).train
    groups = groups_of(table.arch, module, size, dense.in_channels)
    module.to(device)
    batches = list(labelled_batches(train, device, table.seed, table.images))
    truth = oracle(module, groups, batches)
    units = sum(groups.sizes)
    print(f"{table.arch}: {units} channels, {sum(len(labels) for _, labels in batches)} images\n")
    print("| criterion | mean per layer | overall |\n|---|---:|---:|")
    for name in CRITERIA:
        try:
            found = spearman(channel_scores(name, module, groups, table.seed, batches), truth)
        except ZooError as error:
            print(f"| {name} | {error} | |")
        else:
            print(f"| {name} | {found.mean:.2f} | {found.overall:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(OracleTable, description=__doc__))
