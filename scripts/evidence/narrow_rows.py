"""Could the ledgers be from an AVX2 machine, whose gradients were once wrong?

python scripts/evidence/narrow_rows.py

Counts the rows of resnet20-16 that version 1 of the training code fine-tuned, with fewer than 8
channels in front of a strided 1x1 convolution, then trains some of their networks for 20 steps as
such a machine did: one thread, oneDNN limited to AVX2, `zoo.common.strides` switched off.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet

LEDGERS = Path(__file__).parents[2] / "registry" / "ledger"
SHORTCUT_INPUTS = ("layer1.0.conv2", "layer2.0.conv2")
BLOCK = 8
SAMPLE = 16
EARLIER = "49a9517157a3", "fab2ed31b84d"
"""Digests of version 1's recipes, in its rows' fidelities; later versions go around the fault."""


def main() -> None:
    """Print how many rows are narrow, and how many of the sample's processes die."""
    from zoo.registry.store import stored_groups

    groups = stored_groups("resnet20-16")
    assert groups is not None
    places = [groups.names.index(name) for name in SHORTCUT_INPUTS]
    narrow: list[tuple[int, ...]] = []
    for file in sorted(LEDGERS.glob("resnet20-16*.parquet")):
        rows = parquet.read_table(file).to_pylist()
        tuned = [tuple(r["widths"]) for r in rows if any(d in r["fidelity"] for d in EARLIER)]
        own = [widths for widths in tuned if min(widths[at] for at in places) < BLOCK]
        print(f"{file.name}: {len(own)} of {len(tuned)} rows fine-tuned by version 1 are narrow")
        narrow += own
    some = random.Random(0).sample(sorted(set(narrow)), SAMPLE)
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    dead = 0
    for widths in some:
        command = [sys.executable, __file__, json.dumps(widths)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
            if done.returncode > 0:  # an exception of this script's own; signals are negative
                raise RuntimeError(done.stderr.decode())
            dead += done.returncode < 0
        except subprocess.TimeoutExpired:
            dead += 1
    print(f"{len(set(narrow))} networks; of a sample of {len(some)}, {dead} die in 20 steps")


def train(widths: list[int]) -> None:
    """Train a network of these widths for 20 steps, with torch's own gradients."""
    import torch

    import zoo
    import zoo.common.strides
    from zoo.criteria.scores import channel_scores
    from zoo.data.datasets import ImageSet
    from zoo.errors import ZooError
    from zoo.models import build_model
    from zoo.registry.store import stored_groups
    from zoo.spec.plans import make_plan
    from zoo.surgery import surgery

    zoo.common.strides._BLOCK = 0
    torch.set_num_threads(1)
    dense, groups = build_model("resnet20-16", 10), stored_groups("resnet20-16")
    assert groups is not None
    plan = make_plan(
        groups,
        dict(zip(groups.names, widths, strict=True)),
        channel_scores("random", dense, groups, 0, None),
        profile="ledger",
        metric="params",
        asked=4,
        criterion="random",
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20 * 128, 3, 16, 16), dtype=torch.uint8, generator=generator)
    names, half = tuple("0123456789"), (0.5,) * 3
    data = ImageSet("noise", pixels, torch.arange(len(pixels)) % 10, names, half, half)
    recipe = zoo.Recipe(epochs=1, lr=0.05, precision="fp32")
    module = surgery.apply(dense, groups, plan)
    try:
        zoo.finetune(module, data, None, teacher=None, recipe=recipe)
    except (RuntimeError, ZooError):  # overwritten memory may be noticed before it is fatal
        os.abort()


if __name__ == "__main__":
    train(json.loads(sys.argv[1])) if sys.argv[1:] else main()
