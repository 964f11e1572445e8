from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

import ablation

from zoo.artefacts import save_checkpoint
from zoo.models import build_model


def test_the_table_has_every_arm_and_a_rerun_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tmp_path / "dense.safetensors"
    metadata = {"architecture": "cnet", "num_classes": "10", "image_size": "8"}
    save_checkpoint(build_model("cnet", 10, image_size=8), dense, metadata)
    config = ablation.Ablation(
        weights=str(dense), out=tmp_path / "out", arch="cnet", data="digits", size=8, cf=2.0,
        images=256, epochs=1, seeds=(0, 1), arms=("plain", "+KD", "all"),
    )  # fmt: skip
    ablation.main(config)
    shown = capsys.readouterr().out
    assert "1 epochs of 256 images" in shown
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) ± [\d.]+ \| ([\d.]+) ± [\d.]+ \|$", shown, re.M)
    assert [arm for arm, *_ in rows] == ["plain", "+KD", "all"]
    monkeypatch.setattr(ablation, "measure", None)
    ablation.main(config)
    assert capsys.readouterr().out in shown
