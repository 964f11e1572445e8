"""The lines of docs/hub.md run as they are printed, against a Hub on loopback."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

import zoo
from zoo.cli import main
from zoo.data.datasets import Splits
from zoo.registry.store import registry_folder
from zoo.registry.weights import weights_path

GUIDE = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")


def test_the_lines_of_the_guide_run(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "load_data", lambda *_, **__: Splits(images, images, images))
    weights = weights_path("bundled:resnet20-16/cifar10").read_bytes()
    hub.add_repo("org/dense", {"model.safetensors": weights})
    files = {
        path.relative_to(registry_folder()).as_posix(): path.read_bytes()
        for path in registry_folder().rglob("*.json")
    }
    head = hub.add_repo("org/profiles", files, repo_type="dataset")
    pull, network, profiles = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    exec(pull, {})
    printed = capsys.readouterr().out.splitlines()[0]
    wanted = "hf:datasets/org/profiles/resnet20-16/params-cf4.json@"
    assert printed == f"{wanted}{head}"
    assert wanted in pull
    exec(network, {})
    (shell,) = re.findall(r"```\n(zoo publish .*?)```", GUIDE, re.S)
    for line in shell.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    assert hub.commits("org/net")[0].title == "Pruned network pruned"
    exec(profiles, {})
    assert zoo.list_profiles(source="hf:datasets/org/mine")[0].architecture == "cnet"
    assert hub.unknown == []
