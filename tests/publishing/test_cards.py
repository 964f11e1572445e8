"""The cards are the registry's, are fresh, and their code runs as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from zoo.publishing.cards import FIGURES, stale_cards, write_cards
from zoo.publishing.catalogue import catalogue
from zoo.publishing.usage import CHECKPOINT
from zoo.registry.hub import card_parts

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
NAMES = sorted(path.stem for path in CARDS.glob("*.md"))
QUICK = ("resnet20",)
"""Cards whose code runs in `make test` too."""

DRIVER = f"""
import re, shlex, sys, torch
from pathlib import Path
from zoo.cli import main
torch.set_num_threads(1)
card = Path(sys.argv[1]).read_text(encoding="utf-8")
names = {{}}
for block in re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL):
    exec(block, names)
if "dense" in names:
    torch.save(names["dense"].state_dict(), {CHECKPOINT!r})
use = card.partition("\\n## Use\\n")[2].partition("\\n## ")[0]
lines = [line for block in re.findall(r"```sh\\n(.*?)```", use, flags=re.DOTALL)
         for line in block.splitlines()]
assert lines
for line in lines:
    program, *arguments = shlex.split(line)
    assert program == "zoo" and main(arguments) == 0, line
"""


def test_the_cards_are_fresh() -> None:
    assert stale_cards(CARDS) == []


def test_a_change_of_a_number_a_missing_and_a_foreign_file_are_found(tmp_path: Path) -> None:
    write_cards(tmp_path)
    assert stale_cards(tmp_path) == []
    card, picture = tmp_path / "cnet.md", tmp_path / FIGURES / "cnet-params-cf2.svg"
    text = card.read_text(encoding="utf-8")
    changed = re.sub(r"\d(\d\.\d\d)%", r"0\1%", text, count=1)
    assert changed != text
    card.write_text(changed, encoding="utf-8")
    picture.unlink()
    (tmp_path / "alexnet.md").write_text("# alexnet\n", encoding="utf-8")
    lines = stale_cards(tmp_path)
    assert lines == [
        "cnet.md is out of date",
        f"{FIGURES}/cnet-params-cf2.svg is missing",
        "alexnet.md is of nothing in the registry",
    ]
    write_cards(tmp_path)
    assert stale_cards(tmp_path) == []


def test_another_spelling_of_the_front_matter_is_not_stale(tmp_path: Path) -> None:
    write_cards(tmp_path)
    card = tmp_path / "cnet.md"
    text = card.read_text(encoding="utf-8")
    line = "library_name: prunezoo\n"
    quoted = "---\nlibrary_name: 'prunezoo'\n"
    moved = text.replace(line, "", 1).replace("---\n", quoted, 1)
    assert moved != text
    card.write_text(moved, encoding="utf-8")
    assert stale_cards(tmp_path) == []


def test_every_architecture_with_a_profile_or_weights_has_a_card() -> None:
    assert sorted(of.folder for of in catalogue() if of.has_card) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_reads_the_front_matter(name: str) -> None:
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    data = huggingface_hub.ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("prunezoo", "image-classification")
    (of,) = [of for of in catalogue() if of.folder == name]
    measured = [exam for found in of.profiles for exam in found.exams]
    assert len(data.eval_results or ()) == len(measured) + len(of.weights)
    licences = {found.profile.published.licence for found in of.profiles if found.profile.published}
    assert data.license == (
        "other" if len(licences) > 1 else "".join(licences or ["apache-2.0"]).lower()
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_is_there_and_every_claim_is_marked(name: str) -> None:
    text = card_parts((CARDS / f"{name}.md").read_text(encoding="utf-8"))[1]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (CARDS / target).is_file(), target
    (of,) = [of for of in catalogue() if of.folder == name]
    for found in of.profiles:
        origin = found.profile.published
        if origin is not None and origin.claimed:
            assert f"**The authors' claim, not measured here:** {origin.claimed}" in text
        for exam in found.exams:
            for row in exam.rows:
                assert f"| {row.evidence.mean:.2%}" in text
    assert "/tmp/" not in text
    assert "/home/" not in text


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_the_code_of_the_card_runs(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", DRIVER, str(CARDS / f"{name}.md")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d+\.\d\dx (params|macs)$", done.stdout, flags=re.MULTILINE)
    assert (tmp_path / "pruned" / "pruning.json").is_file()
    assert (tmp_path / "smaller" / "pruning.json").is_file()
