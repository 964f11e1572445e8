"""The commands: each does what its function does, and all of their flags are explained."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import same_state
from safetensors import safe_open

import zoo
from zoo import cli
from zoo.cli import COMMANDS, main
from zoo.criteria.scores import CRITERIA
from zoo.models import ARCHITECTURES, STORED, build_model, parameter_count
from zoo.planning.learned import learned_policy
from zoo.search.ledger import Key, Ledger, Row
from zoo.spec.profile import Evidence, Profile, Reference
from zoo.storage.artefacts import save_checkpoint


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_help_is_complete_and_imports_no_torch():
    code = (
        "import sys\n"
        "from zoo.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'numpy', 'rich.table'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"• {name} " in done.stdout


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_flag_of_every_command_is_explained(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert not stop.value.code
    assert f"usage: zoo {name}" in capsys.readouterr().out
    kind = cli._flags(name, [name])
    source = "".join(map(inspect.getsource, kind.__mro__[:-1]))
    for field in dataclasses.fields(kind):
        line = source[source.index(f"\n    {field.name}: ") + 1 :].splitlines()[1]
        assert line.strip().startswith('"""')


def test_list_names_every_bundled_profile(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for entry in zoo.list_profiles():
        assert entry.reference in shown


def test_list_names_every_registered_architecture(capsys):
    assert main(["list"]) == 0
    names = set(re.findall(r"[\w:-]+", capsys.readouterr().out))
    assert names >= {*ARCHITECTURES, *STORED}
    assert main(["list", "--arch", "torchvision:densenet121"]) == 0
    assert "No such profile" in capsys.readouterr().out


@pytest.mark.parametrize("metric", [None, "params", "macs", "latency"])
def test_list_by_a_metric_counts_profiles_of_another_as_missing(metric, capsys):
    assert main(["list", *(["--metric", metric] if metric else [])]) == 0
    part = capsys.readouterr().out.partition("Not searched")[2].partition("Weights")[0]
    missing = set(re.findall(r"[\w:-]+", part))
    searched = {entry.architecture for entry in zoo.list_profiles(metric=metric)}
    assert {*ARCHITECTURES} - searched <= missing
    assert not searched & missing
    assert bool(searched) is (metric != "latency")


def test_show_draws_a_bar_per_group_and_the_evidence(tmp_path, capsys):
    profile = Profile(
        "resnet20-16", "params", 4.0, 4.02, Reference(10, 32),
        {"conv1": 1.0, "layer1.0.conv1": 0.25}, {"conv1": 16, "layer1.0.conv1": 4},
        evidence=(
            Evidence("base", 8, 9, 0.9, 0.0, (0,), (0.9,), "as trained", "test split"),
            Evidence("equal", 2, 3, 0.7, 0.01, (0, 1), (0.69, 0.71), "1 epoch", "test split",
                     (0.1, 0.3)),
        ),
    )  # fmt: skip
    profile.write(tmp_path / "p.json")
    assert main(["show", f"file:{tmp_path / 'p.json'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    whole, quarter = (next(x for x in lines if x.split()[:1] == [g]) for g in profile.kept)
    assert (whole.count("█"), quarter.count("█"), quarter.count("░")) == (32, 8, 24)
    assert "16/16" in whole
    assert "4/16" in quarter
    row = next(line for line in lines if line.split()[:1] == ["equal"])
    assert row.split() == ["equal", "2", "3", "20.00%", "70.00%", "±", "1.00%", "2"]
    assert any("1 epoch" in line for line in lines)


def test_show_with_a_factor_takes_no_folder_for_the_architecture(tmp_path, monkeypatch, capsys):
    (tmp_path / "resnet20-16").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["show", "resnet20-16", "--cf", "4"]) == 0
    assert "resnet20-16 at 4x params" in capsys.readouterr().out


def test_what_documents_and_the_hub_say_is_shown_as_it_is(hub, tmp_path, capsys):
    given, shown = "runs/[/old]/[old]/:x:/\x1b[31m.pt", "runs/[/old]/[old]/:x:/�[31m.pt"
    own = zoo.get_profile("bundled:resnet20-16/params-cf4")
    evidence = dataclasses.replace(own.evidence[0], policy=given, data=given)
    found = dataclasses.replace(own.provenance, command=given)
    path = tmp_path / "[m].json"
    dataclasses.replace(own, provenance=found, evidence=(evidence,)).write(path)
    assert main(["show", f"file:{path}"]) == 0
    out = capsys.readouterr().out
    assert "[m].json: " in out
    assert f"Found by: {shown}\n" in out
    assert out.count(shown) == 3
    hub.add_repo("a/model", tags=["prunezoo", given])
    assert main(["list", "--hub"]) == 0
    out += capsys.readouterr().out
    assert f"prunezoo {shown} " in out
    assert "\x1b" not in out


def test_train_does_what_building_and_finetuning_do(base):
    splits = zoo.load_data("digits", size=8)
    model = build_model("cnet", 10, image_size=8, seed=3)
    recipe = zoo.Recipe(epochs=2, lr=0.05)
    result = zoo.finetune(model, splits.train, splits.val, recipe=recipe, seed=3)
    state, metadata = content(base)
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)
    assert metadata == {
        "architecture": "cnet",
        "num_classes": "10",
        "image_size": "8",
        "data": splits.train.name,
        "split_digest": splits.digest,
        "val_accuracy": f"{result.accuracy:.4f}",
        "test_accuracy": f"{zoo.evaluate(model, splits.test).accuracy:.4f}",
        "recipe": json.dumps(dataclasses.asdict(recipe)),
        "seed": "3",
    }


def test_prune_writes_what_load_makes(base, pruned, capsys):
    expected = zoo.load("cnet", 2, str(base), profile="equal")
    model = zoo.load_pruned(pruned)
    assert model.pruning.plan == expected.pruning.plan
    images = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(model(images), expected(images))
    assert capsys.readouterr().err == ""


def test_a_missed_factor_is_said_with_what_helps(base, tmp_path, capsys):
    for cf, flags, told in (
        ("4", [], "--refit scales them"),
        ("3", ["--profile", "equal", "--align", "16"], "--align, --floor and --keep allow"),
        ("2", ["--refit"], None),
    ):
        asked = ["prune", "cnet", "--cf", cf, "--weights", str(base), *flags]
        assert main([*asked, "--out", str(tmp_path / cf)]) == 0
        shown = capsys.readouterr().out.splitlines()
        lines = [line for line in shown if line.startswith(f"not {cf}x: ")]
        if told is None:
            assert not lines
        else:
            assert told in lines[0]


def test_a_relative_checkpoint_teaches_from_any_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    out = tmp_path / "out"
    assert main(["prune", "cnet", "--cf", "2", "--weights", base.name, "--out", str(out)]) == 0
    monkeypatch.chdir(tmp_path)
    data = ["--data", "digits", "--epochs", "1"]
    assert main(["finetune", str(out), *data, "--teacher", "source"]) == 0


def test_show_says_how_the_learned_policy_was_trained(tmp_path, capsys):
    assert main(["show", "learned"]) == 0
    out = capsys.readouterr().out
    training = learned_policy().training
    for told in (*training.architectures, training.command, f"{training.episodes}, each"):
        assert told in out
    assert main(["show", f"learned:{tmp_path}"]) == 2
    assert "No learned policy in" in capsys.readouterr().err


def test_prune_shows_the_criterion_images_of_the_checkpoints_size(base, tmp_path, capsys):
    data = ["--data", "digits", "--criterion", "taylor", "--profile", "equal"]
    command = ["prune", "cnet", "--cf", "2", "--weights", str(base), *data]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    images = zoo.load_data("digits", size=8).train
    options = {"profile": "equal", "criterion": "taylor"}
    expected = zoo.load("cnet", 2, str(base), data=images, **options)
    assert zoo.load_pruned(tmp_path / "out").pruning.plan == expected.pruning.plan


def test_prune_rewinds_as_load_does(base, tmp_path):
    early = tmp_path / "early.safetensors"
    save_checkpoint(build_model("cnet", 10, image_size=8, seed=8), early, {})
    flags = ["--weights", str(base), "--profile", "equal", "--criterion", "l1"]
    back = ["--init", "rewound", "--rewind", str(early), "--out", str(tmp_path / "out")]
    assert main(["prune", "cnet", "--cf", "2", *flags, *back]) == 0
    expected = zoo.load(
        "cnet", 2, str(base), profile="equal", criterion="l1", init="rewound", rewind=str(early)
    )
    assert same_state(zoo.load_pruned(tmp_path / "out"), expected.state_dict())


def test_prune_gives_a_new_classifier_and_says_so(base, image_tree, tmp_path, capsys):
    data = ["--data", f"imagefolder:{image_tree}"]
    flags = ["--weights", str(base), "--profile", "equal", "--classes", "2"]
    flags += ["--criterion", "taylor"]
    out = tmp_path / "out"
    assert main(["prune", "cnet", "--cf", "2", *flags, *data, "--out", str(out)]) == 0
    assert "the classifier is new" in capsys.readouterr().out
    images = zoo.load_data(f"imagefolder:{image_tree}", size=8).train
    options = {"profile": "equal", "criterion": "taylor", "data": images}
    expected = zoo.load("cnet", 2, str(base), num_classes=2, **options)
    assert same_state(zoo.load_pruned(out), expected.state_dict())
    tune = ["finetune", str(out), *data, "--epochs", "1", "--teacher"]
    for teacher, message in ((str(base), "teacher has 10 outputs"), ("source", "cannot teach")):
        assert main([*tune, teacher]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*averaged weights")
def test_prune_takes_the_average_or_the_others(tmp_path):
    average, current = (build_model("cnet", 10, image_size=8, seed=n).state_dict() for n in (1, 2))
    both = tmp_path / "last.pth.tar"
    torch.save({"state_dict": current, "state_dict_ema": average}, both)
    flags = ["--weights", str(both), "--profile", "equal", "--out", str(tmp_path / "out")]
    for flag, weights in (([], average), (["--no-ema"], current)):
        assert main(["prune", "cnet", "--cf", "2", *flags, *flag]) == 0
        expected = zoo.load("cnet", 2, weights, profile="equal").state_dict()
        assert same_state(zoo.load_pruned(tmp_path / "out"), expected)


def test_the_help_of_prune_names_every_criterion(capsys):
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    shown = capsys.readouterr().out
    words = set(re.findall(r"\w+", shown[shown.index("--criterion") : shown.index("--init")]))
    assert words >= set(CRITERIA)


def test_a_pruned_folder_is_finetuned_evaluated_and_exported(pruned, base, tmp_path, capsys):
    out, onnx = tmp_path / "tuned", tmp_path / "tuned.onnx"
    teacher = ["--teacher", str(base)]
    flags = ["--data", "digits", "--epochs", "2", "--lr", "0.05", *teacher, "--out", str(out)]
    assert main(["finetune", str(pruned), *flags]) == 0
    tuned, splits = zoo.load_pruned(out), zoo.load_data("digits", size=8)
    accuracy = zoo.evaluate(tuned, splits.test).accuracy
    assert accuracy > zoo.evaluate(zoo.load_pruned(pruned), splits.test).accuracy
    assert f"test {accuracy:.2%}" in capsys.readouterr().out
    assert main(["evaluate", str(out), "--data", "digits"]) == 0
    assert capsys.readouterr().out.startswith(f"{accuracy:.2%} top-1")
    assert main(["export", str(out), str(onnx), "--data", "digits"]) == 0
    assert "top-1 agreement 100.00%" in capsys.readouterr().out
    logits = zoo.InferenceSession(onnx)(splits.test.normalise(splits.test.images))
    assert (logits.argmax(1) == splits.test.labels).double().mean() == pytest.approx(accuracy)
    small = ["--precision", "int8", "--fold", "--min-agreement", "0.9"]
    assert main(["export", str(out), str(onnx), "--data", "digits", *small]) == 0
    assert re.search(r"Accuracy on these images: [\d.]+% in PyTorch", capsys.readouterr().out)
    metadata = zoo.InferenceSession(onnx).metadata
    assert (metadata.precision, metadata.folded) == ("int8", True)


def test_finetune_in_the_folder_where_the_shell_is_and_its_log(pruned, tmp_path):
    folder = Path(shutil.copytree(pruned, tmp_path / "small"))
    before = (folder / "model.safetensors").read_bytes()
    asked = [sys.executable, "-m", "zoo", "finetune", ".", "--data", "digits", "--epochs", "1"]
    with (folder / "train.log").open("w") as log:
        done = subprocess.run([*asked, "--teacher", "none"], cwd=folder, stdout=log)
    assert done.returncode == 0
    assert (folder / "train.log").read_text().endswith("Wrote .\n")
    assert (folder / "history.png").exists()
    assert (folder / "model.safetensors").read_bytes() != before


def test_benchmark_and_compare_print_their_tables(pruned, base, capsys):
    quick = ["--batch-sizes", "2", "--repeats", "1", "--no-memory", "--threads", "1"]
    assert main(["benchmark", str(pruned), *quick]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"CPU +fp32 +8 +2 ", shown)
    assert re.search(r"faster|slower|as fast", shown)
    data = ["--data", "digits"]
    assert main(["compare", str(base), str(pruned), *data, *quick]) == 0
    shown = capsys.readouterr().out
    for network in (zoo.load_pruned(pruned), zoo.create_model("cnet", 10, image_size=8)):
        assert f"{parameter_count(network):,}" in shown
    profiles = ["dense", "equal", "increasing"]
    flags = ["--arch", "cnet", "--cf", "2", "--weights", str(base)]
    for compared, own in ((profiles, []), (["dense", "global", "learned"], data)):
        assert main(["compare", *compared, *flags, *own, *quick]) == 0
        lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
        assert [line for line in lines if line in compared] == compared
    assert main(["compare", *profiles, "--cf", "2", *quick]) == cli.USER_ERROR
    assert "Add --arch" in capsys.readouterr().err


def test_a_network_of_gray_images_is_pruned_exported_and_measured(tmp_path, capsys):
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    gray = build_model("cnet", 10, image_size=8, in_channels=1)
    save_checkpoint(gray, base, {"architecture": "cnet"})
    flags = ["--weights", str(base), "--profile", "equal", "--out", str(out)]
    assert main(["prune", "cnet", "--cf", "2", *flags]) == 0
    for network in (out, base):
        assert main(["export", str(network), str(tmp_path / "m.onnx")]) == 0
    quick = ["--batch-sizes", "1", "--repeats", "1", "--no-memory", "--threads", "1"]
    assert main(["benchmark", str(out), *quick]) == 0
    assert main(["compare", str(out), str(base), *quick]) == 0
    digits = ["--data", "digits", "--criterion", "taylor"]
    capsys.readouterr()
    assert main(["prune", "cnet", "--cf", "2", *flags, *digits]) == 2
    assert "does not run on images of shape (1, 3, 8, 8)" in capsys.readouterr().err


def test_a_checkpoint_is_evaluated_by_the_architecture_it_names(base, tmp_path, capsys):
    _, metadata = content(base)
    assert main(["evaluate", str(base), "--data", "digits"]) == 0
    assert f"{float(metadata['test_accuracy']):.2%} top-1" in capsys.readouterr().out
    torch.save(content(base)[0], tmp_path / "bare.pt")
    assert main(["evaluate", str(tmp_path / "bare.pt"), "--data", "digits"]) == cli.USER_ERROR
    assert "add --arch" in capsys.readouterr().err
    bare = ["evaluate", str(tmp_path / "bare.pt"), "--arch", "cnet", "--data", "digits"]
    assert main(bare) == 0


def test_search_passes_its_flags_on(monkeypatch, tmp_path, capsys):
    from zoo.search import run
    from zoo.search.env import EnvSettings

    received = []

    def search_profile(config: run.SearchConfig) -> list[Profile]:
        received.append(config)
        kept = {"conv1": 0.5}, {"conv1": 16}
        return [Profile("cnet", "macs", cf, cf, Reference(10, 32), *kept) for cf in config.cf]

    monkeypatch.setattr(run, "search_profile", search_profile)
    flags = [
        "--arch",
        "cnet",
        "--cf",
        "2",
        "4",
        "--metric",
        "macs",
        "--tasks",
        "a.pt",
        "b.pt@digits",
    ]
    flags += ["--agent", "gnn", "--budget", "20m", "--out", str(tmp_path), "--resume"]
    assert main(["search", *flags]) == 0
    assert received == [
        run.SearchConfig(
            arch="cnet", cf=(2.0, 4.0), env=EnvSettings(metric="macs"), agent="gnn",
            tasks=("a.pt", "b.pt@digits"), budget="20m", out=tmp_path, resume=True,
        )
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "macs-cf2.json" in shown
    assert "macs-cf4.json" in shown


def test_ledger_sums_up_a_run(tmp_path, capsys):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for seed, widths in enumerate([(16,) * 6, (8,) * 6]):
            key = Key("net", "split", 10, 32, widths, "random", seed, "recalibration")
            ledger.add(Row(key, 0.5 + seed / 10, 1.0, "ppo"))
    plot = tmp_path / "figure.png"
    assert main(["ledger", str(tmp_path), "--arch", "cnet", "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "ppo" in shown
    assert "60.00%" in shown
    assert plot.stat().st_size > 1000
    assert main(["ledger", str(tmp_path / "nothing.jsonl")]) == 2
    assert "nothing.jsonl" in capsys.readouterr().err


def test_the_installed_command_runs():
    command = [str(Path(sys.executable).parent / "zoo"), "show", "resnet20-16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("zoo: error: Which profile of resnet20-16? Add --cf")
