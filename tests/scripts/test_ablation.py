from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

import ablation
import torch

import zoo
from zoo.models import build_model
from zoo.planning.latency import device_name
from zoo.storage.artefacts import save_checkpoint

METADATA = {"architecture": "cnet", "num_classes": "10", "image_size": "8"}


def test_the_table_has_every_arm_and_a_rerun_trains_only_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, dense = tmp_path / "dense.safetensors", build_model("cnet", 10, image_size=8)
    save_checkpoint(dense, path, METADATA)
    config = ablation.Ablation(
        weights=str(path), out=tmp_path / "out", arch="cnet", data="digits", size=8, cf=2.0,
        images=256, epochs=1, seeds=(0, 1), arms=("plain", "+KD", "all"),
    )  # fmt: skip
    ablation.main(config)
    shown = capsys.readouterr().out
    assert "1 epochs of 256 images" in shown
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) ± [\d.]+ \| ([\d.]+) ± [\d.]+ \|$", shown, re.M)
    assert [arm for arm, *_ in rows] == ["plain", "+KD", "all"]
    before = zoo.evaluate(dense, zoo.load_data("digits", size=8).test).accuracy
    assert f"The dense network has {100 * before:.2f}." in shown
    assert device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")) in shown
    assert re.search(r"^all: label_smoothing=0\.1, ema=0\.99, .*distill=0\.7$", shown, re.M)

    trained: list[str] = []

    def measure(_: object, __: object, arm: str, *___: object) -> float:
        trained.append(arm)
        return 0.5

    monkeypatch.setattr(ablation, "measure", measure)
    ablation.main(config)
    assert capsys.readouterr().out in shown
    assert not trained
    teacher, recipe = ablation.ARMS["all"]
    monkeypatch.setitem(ablation.ARMS, "all", (teacher, replace(recipe, ema=0.9)))
    ablation.main(config)
    assert trained == ["all"] * 4
    save_checkpoint(build_model("cnet", 10, image_size=8, seed=1), path, METADATA)
    ablation.main(config)
    assert trained[4:] == ["plain", "+KD", "all"] * 4
