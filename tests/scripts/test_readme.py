"""The README and the guides run, and their numbers are the registry's."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import campaign
import pytest
import torch
import tyro
from torch.utils.data import TensorDataset

import zoo
from zoo.cli import COMMANDS, main
from zoo.data.datasets import ImageSet
from zoo.models import build_model

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "scripts/README.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
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
    train_set = TensorDataset(torch.rand(8, 3, 64, 64), torch.arange(8) % 3)
    names = {"my_network": network, "images": torch.zeros(1, 3, 64, 64), "train_set": train_set}
    exec(EXAMPLES[1], names)
    small = names["small"]
    assert small.layer1[0].conv1.out_channels == 64
    assert small.layer4[0].conv1.out_channels % 8 == 0
    assert small.pruning.plan.got == pytest.approx(2, rel=0.1)
    assert capsys.readouterr().out == "{}\n"
    assert len(EXAMPLES) == 2
    assert EXAMPLES[1] in (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")


def test_the_tables_are_the_registrys() -> None:
    tables = runpy.run_path(str(ROOT / "scripts" / "evidence" / "evidence_table.py"))
    summary, proven, details = (tables[name]() for name in ("table", "certificates", "details"))
    assert summary in EVIDENCE
    assert proven in EVIDENCE
    profiles = [zoo.get_profile(entry.reference) for entry in zoo.list_profiles()]
    assert len(summary.splitlines()) - 2 == sum(
        len({row.data for row in profile.evidence}) for profile in profiles
    )
    assert len(proven.splitlines()) - 2 == sum(bool(each.certificate) for each in profiles)
    assert details.count("| searched |") == sum(
        len({row.exam for row in profile.evidence}) for profile in profiles
    )


def test_the_figure_shows_the_registrys_accuracies() -> None:
    drawn = (ROOT / "docs" / "accuracy.svg").read_text(encoding="utf-8")
    for entry in zoo.list_profiles(arch="resnet20-16", metric="params"):
        rows = [row for row in zoo.get_profile(entry.reference).evidence if "CIFAR" in row.data]
        for row in rows:
            if row.policy in ("searched", "greedy", "equal"):
                assert f">{row.mean:.1%}<" in drawn


def test_every_link_and_file_that_a_document_names_is_there() -> None:
    links = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            assert (document.parent / target).exists(), (document.name, target)
            links += 1
        for target in re.findall(r"`((?:zoo|scripts|tests|registry|docs)/[\w./-]+)`", text):
            assert (ROOT / target).exists(), (document.name, target)
            links += 1
    assert links > 60


SCRIPTS = {
    "campaign": lambda given: tyro.extras.subcommand_cli_from_dict(campaign.STEPS, args=given),
}


def test_the_command_lines_are_ones_that_the_program_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guides = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    blocks = re.split(r"^```.*$", guides, flags=re.MULTILINE)[1::2]
    lines = "\n".join(blocks).replace("\\\n", " ").replace("DIR", ".").splitlines()
    lines = [line.partition(" # ")[0].replace("--seed N", "--seed 1") for line in lines]
    given = [shlex.split(line) for line in lines if line.startswith(("zoo ", "python "))]
    taken = []
    for name, (flags, _) in COMMANDS.items():
        monkeypatch.setitem(COMMANDS, name, (flags, taken.append))
    for program, command, *arguments in given:
        if program == "zoo":
            assert main([command, *arguments]) == 0, capsys.readouterr()
        elif program == "python":
            assert (ROOT / command).is_file()
            assert Path(command).parts[0] == "scripts"
            taken.append(SCRIPTS[Path(command).stem](arguments))
    assert len(taken) == len(given) > 14
