"""The README runs, and its numbers are the registry's."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import campaign
import examine
import pytest
import torch
import tyro

import zoo
from zoo.cli import COMMANDS, main
from zoo.data.datasets import ImageSet
from zoo.models import build_model

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_images: ImageSet
) -> None:
    example = EXAMPLES[0]
    monkeypatch.chdir(tmp_path)
    torch.save(build_model("resnet20-16", 3).state_dict(), "my_ckpt.pt")
    names = {"train_set": toy_images, "val_set": toy_images}
    exec(example, names)
    assert Path("pruned.onnx").is_file()
    again = zoo.load_pruned("pruned")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), names["model"](x))


def test_the_example_for_any_network_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(build_model("timm:resnet50", 3).state_dict(), "my_ckpt.pth")
    network = build_model("torchvision:resnet18", 3)
    names = {"my_network": network, "images": torch.zeros(1, 3, 64, 64)}
    exec(EXAMPLES[1], names)
    small = names["small"]
    assert small.layer1[0].conv1.out_channels == 64
    assert small.layer4[0].conv1.out_channels % 8 == 0
    assert small.pruning.plan.got == pytest.approx(2, rel=0.1)
    assert capsys.readouterr().out == "{}\n"
    assert len(EXAMPLES) == 2


def test_the_tables_are_the_registrys() -> None:
    tables = runpy.run_path(str(ROOT / "scripts" / "evidence" / "evidence_table.py"))
    summary, details = tables["table"](), tables["details"]()
    assert summary in README
    assert details in (ROOT / "EVIDENCE.md").read_text(encoding="utf-8")
    assert len(summary.splitlines()) > 6
    assert details.count("| searched |") == len(summary.splitlines()) - 2


SCRIPTS = {
    "examine": lambda given: tyro.cli(examine.Examination, args=given),
    "campaign": lambda given: tyro.extras.subcommand_cli_from_dict(campaign.STEPS, args=given),
}


def test_the_command_lines_are_ones_that_the_program_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.split(r"^```.*$", README, flags=re.MULTILINE)[1::2]
    lines = "\n".join(blocks).replace("\\\n", " ").replace("DIR", ".").splitlines()
    lines = [line.partition(" # ")[0].replace("--seed N", "--seed 1") for line in lines]
    given = [shlex.split(line) for line in lines if line.startswith(("zoo ", "python "))]
    taken = []
    for name, (flags, _) in COMMANDS.items():
        monkeypatch.setitem(COMMANDS, name, (flags, taken.append))
    for program, command, *arguments in given:
        if program == "zoo" and arguments != ["--help"]:
            assert main([command, *arguments]) == 0, capsys.readouterr()
        elif program == "python":
            assert (ROOT / command).is_file()
            assert Path(command).parts[0] == "scripts"
            taken.append(SCRIPTS[Path(command).stem](arguments))
    assert len(taken) == len(given) - 1 > 14
