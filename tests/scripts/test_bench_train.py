from __future__ import annotations

import re

import pytest
import torch
from bench_train import Train, bench_train

from zoo.planning.latency import device_name


def test_both_sides_and_a_whole_training_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    bench_train(Train(images=70, val_images=20, size=8, batch_size=32, epochs=2, rounds=1))
    shown = capsys.readouterr().out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert shown.startswith(device_name(device))
    rows = dict(re.findall(r"^(\S+) .* images/s +([\d.]+)x$", shown, re.M))
    assert float(rows["textbook"]) == float(rows["in"]) == 1
    assert float(rows["zoo.finetune"]) > 0
    assert float(rows["zoo.evaluate"]) > 0
    assert re.search(r"^2 epochs of 70 images, .* on 20 after each: [\d.]+ s$", shown, re.M)
    share = re.search(r"([\d.]+)% is outside convolution", shown)
    assert share
    assert 0 < float(share[1]) < 100
