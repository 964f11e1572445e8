"""What the commands refuse, in one line, and how they end when they are interrupted."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from learnt import TINY

import zoo
from zoo import cli
from zoo.cli import COMMANDS, main
from zoo.training import finetuning as training
from zoo.training.engine import Engine


def test_a_place_that_cannot_be_written_is_refused_before_the_training(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["finetune", str(pruned), *TINY, "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no pruned model" in capsys.readouterr().err
    assert main(["train", "--arch", "cnet", *TINY, "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err
    assert main(["train", "--arch", "cnet", *TINY, "--out", str(tmp_path / "base.pt")]) == 2
    assert "base.pt must end in .safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], r"Unknown command 'shwo'. Did you mean 'show'?"),
        (["show", "resnet20-16"], "Add --cf"),
        (["show", "bundled:resnet20-16/params-cf5"], "Unknown profile"),
        (["show", "resnet20-16", "--cf", "5"], "--profile best"),
        (["show", "file:/nowhere/p.json"], "does not exist"),
        (["show", "nosuch"], "Unknown architecture 'nosuch'"),
        (["show", "torchvision:resnet18"], "has no searched profile"),
        (["show", "torchvision:resnet50", "--cf", "2"], "Published by others: published:"),
        (["prune", "cnet", "--weights", "/no.pt", "--profile", "learned:", "--cf", "2", "--out",
          "OUT"], "names no folder"),
        (["list", "--arch", "resnet"], "Unknown architecture"),
        (["train", "--arch", "resnet20_16", *TINY, "--out", "OUT"], "Did you mean 'resnet20-16'?"),
        (["train", "--arch", "cnet", "--data", "digts", "--out", "OUT"], "Did you mean 'digits'?"),
        (["train", "--arch", "cnet", *TINY[:4], "--epochs", "0", "--out", "OUT"], "--epochs must"),
        (["prune", "cnet", "--cf", "2", "--weights", "/no.pt", "--profile=equal", "--out", "OUT"],
         "/no.pt does not exist"),
        (["finetune", "/nowhere", "--data", "digits"], "/nowhere"),
        (["evaluate", "/nowhere", "--data", "digits"], "/nowhere"),
    ],
)  # fmt: skip
def test_a_users_error_is_one_clear_line_and_exit_code_two(arguments, message, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    given = [str(out) if part == "OUT" else part for part in arguments]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("zoo: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert "Traceback" not in captured.out + captured.err
    assert not out.exists()


def test_a_warning_is_one_line_without_code(base, tmp_path):
    asked = ["--cf", "8", "--weights", str(base), "--profile", "learned"]
    command = [sys.executable, "-m", "zoo", "prune", "cnet", *asked, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = "zoo: warning: The learned policy was trained for factors of 2 to 6; 8 is outside.\n"
    assert done.stderr == told


def test_what_a_pipe_cannot_hold_is_shown_as_question_marks():
    command = [sys.executable, "-m", "zoo", "show", "resnet20-16", "--cf", "4"]
    shown = {}
    for encoding in ("latin-1", "utf-8"):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        done = subprocess.run(command, capture_output=True, env=environment, check=True)
        shown[encoding] = done.stdout.decode(encoding)
        assert not done.stderr
    assert "β" in shown["utf-8"]
    assert shown["latin-1"] == shown["utf-8"].encode("latin-1", "replace").decode("latin-1")


def test_images_of_other_classes_are_not_measured(base, capsys):
    assert main(["evaluate", str(base), "--data", "digits[:5]"]) == 2
    assert "has 5 classes, the network 10 outputs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["train", *TINY, "--arch", "cnet", "--out", "x"],
        ["prune", "cnet", "--weights", "x", "--out", "x"],
        ["finetune", "x", *TINY],
        ["benchmark", "x"],
        ["compare", "x"],
    ],
)
@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_no_generator_takes_is_refused_at_once(command, seed, capsys):
    assert main([*command, "--seed", str(seed)]) == 2
    assert capsys.readouterr().err.startswith("zoo: error: --seed must be of 64 bits")


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_a_bad_test_split_takes_no_training_away(pruned, tmp_path, monkeypatch, capsys, command):
    load = zoo.load_data

    def unlabelled(*arguments, **options):
        splits = load(*arguments, **options)
        test = dataclasses.replace(splits.test, labels=torch.full_like(splits.test.labels, -1))
        return dataclasses.replace(splits, test=test)

    out = tmp_path / "out.safetensors" if command == "train" else tmp_path / "out"
    network = ["--arch", "cnet"] if command == "train" else [str(pruned), "--teacher", "none"]
    asked = [command, *network, *TINY, "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(zoo, "load_data", unlabelled)
        assert main(asked) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"zoo: error: Wrote {out}, but cannot measure its test accuracy: ")
    assert "-1" in told
    assert told.count("\n") == 1
    assert main(["evaluate", str(out), "--data", "digits"]) == 0
    accuracy = capsys.readouterr().out.split()[0]
    assert float(accuracy.strip("%")) > 20
    monkeypatch.setattr(Engine, "train", lambda *_, **__: pytest.fail("trained"))
    assert main([*asked, "--resume"]) == 0
    assert f"test {accuracy}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["list", "--metric", "parms"], ["prune"], ["--nonsense"]])
def test_wrong_flags_exit_with_two_and_no_traceback(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_unwritable_output_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "finetune", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "x.safetensors")
    assert main(["train", "--arch", "cnet", *TINY, "--out", out]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("in_place", [False, True])
def test_ctrl_c_exits_with_130_and_keeps_the_best_weights(
    pruned, tmp_path, monkeypatch, capsys, in_place
):
    epoch = Engine.train
    count = 0

    def interrupted_in_the_third(*arguments, **options):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return epoch(*arguments, **options)

    monkeypatch.setattr(Engine, "train", interrupted_in_the_third)
    out = tmp_path / "tuned"
    flags = ["--data", "digits", "--epochs", "9", "--lr", "0.05", "--out", str(out)]
    if in_place:
        shutil.copytree(pruned, out)
    assert main(["finetune", str(out if in_place else pruned), *flags]) == 130
    assert "after 2 of 9 epochs" in capsys.readouterr().out
    val = zoo.load_data("digits", size=8).val
    assert zoo.evaluate(zoo.load_pruned(out), val) != zoo.evaluate(zoo.load_pruned(pruned), val)


@pytest.mark.parametrize("kind", ["train", "finetune"])
def test_ctrl_c_leaves_another_network_that_was_there(
    base, pruned, tmp_path, monkeypatch, capsys, kind
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    if kind == "train":
        out, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
        asked = ["train", "--arch", "cnet"]
        shutil.copy(base, out)
    else:
        shutil.copytree(pruned, out)
        asked = ["finetune", str(pruned), "--teacher", "none"]
    asked += [*TINY, "--seed", "1"]
    assert main([*asked, "--out", str(whole)]) == 0
    file = "" if kind == "train" else "model.safetensors"
    before, epoch = (out / file).read_bytes(), Engine.train

    left = 0

    def interrupted(engine, tell):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return epoch(engine, tell)

    asked += ["--out", str(out), "--resume"]
    for finished in (0, 1):
        left = finished
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "train", interrupted)
            assert main(asked) == 130
        shown = capsys.readouterr().out
        assert f"Interrupted after {finished} of 2 epochs" in shown
        assert f"{out} was there before and is left as it was.\nAdd --resume to go on." in shown
        assert (out / file).read_bytes() == before
    assert main(asked) == 0
    assert (out / file).read_bytes() == (whole / file).read_bytes() != before


def test_ctrl_c_elsewhere_exits_with_130_too(monkeypatch, capsys):
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "list", (cli.ListCommand, interrupt))
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "zoo: interrupted\n"
