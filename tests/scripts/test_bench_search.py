from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("torchvision")

from bench_search import Search, bench_search


def test_every_side_is_timed_beside_the_faster_naive_loop(capsys):
    threads = torch.get_num_threads()
    bench_search(Search(candidates=2, images=128, val_images=100, rounds=1, workers=1))
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    rows = re.findall(r"^((?:naive|engine).*?) +([\d.]+) s a candidate$", shown, re.M)
    seconds = {name: float(own) for name, own in rows}
    assert len(seconds) == 6
    ratios = re.findall(r" ([\d.]+)x the faster (naive loop, .*)$", shown, re.M)
    rounding = 0.00005
    sides = ("engine, an epoch", "engine, recalibration", "engine, recalibration")
    for (ratio, loop), side in zip(ratios, sides, strict=True):
        fastest = min(own for name, own in seconds.items() if name.startswith(loop))
        least = (fastest - rounding) / (seconds[side] + rounding)
        most = (fastest + rounding) / (seconds[side] - rounding)
        assert least - 0.006 < float(ratio) < most + 0.006
