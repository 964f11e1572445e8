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
    rows = re.findall(r"^(naive|engine).* ([\d.]+) s a candidate +([\d.]+)x$", shown, re.M)
    assert [side for side, _, _ in rows] == ["naive", "naive", "engine", "engine"]
    ratios = [float(ratio) for _, _, ratio in rows]
    assert max(ratios[:2]) == 1.0
    assert all(ratio > 0 for ratio in ratios)
