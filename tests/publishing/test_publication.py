"""What is published can be used by others: PyTorch, ONNX Runtime, transformers.js, the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from learnt import halves
from loopback_hub import LoopbackHub
from PIL import Image
from torch.utils.data import DataLoader

import zoo
from zoo.errors import ZooError
from zoo.registry.store import registry_folder

TRANSFORMERS_JS = os.environ.get("TRANSFORMERS_JS", "")
"""Folder whose node_modules has @huggingface/transformers."""

LAYOUT = {
    ".gitattributes", "README.md", "SHA256SUMS", "config.json", "model.safetensors",
    "onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx",
    "preprocessor_config.json", "pruning.json",
}  # fmt: skip


def test_the_repository_has_the_layout_that_its_readers_expect(repository, network, images):
    assert set(repository) == LAYOUT
    config = json.loads(repository["config.json"])
    assert config["id2label"] == {str(n): name for n, name in enumerate(images.classes)}
    assert config["label2id"] == {name: n for n, name in enumerate(images.classes)}
    assert config["kept"] == network.pruning.plan.widths
    assert config["image_size"] == [16, 16]
    entries = {entry.reference: entry for entry in zoo.list_profiles()}
    assert config["profile_sha256"] == entries[config["profile"]].sha256
    pictures = json.loads(repository["preprocessor_config.json"])
    assert pictures["size"] == {"height": 16, "width": 16}
    assert (pictures["image_mean"], pictures["image_std"]) == ([0.5] * 3, [0.5] * 3)


def test_the_card_says_to_the_hub_what_the_network_is(repository):
    card = ModelCard(repository["README.md"].decode())
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("prunezoo", "image-classification")
    assert {"pruned", "resnet20-16", "4x-macs"} <= set(data["tags"])
    assert (data["license"], data["datasets"]) == ("mit", ["org/data"])
    assert (data["base_model"], data["base_model_relation"]) == ("org/dense", "finetune")
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type) == ("org/data", "accuracy")
    assert f"{result.metric_value:.2%} on 64 images" in card.text


def test_a_published_network_pulled_into_an_empty_cache_is_the_same_to_the_bit(
    published, network, hub
):
    again = zoo.load_pruned(published.partition("@")[0])
    images = torch.randn(8, 3, 16, 16)
    assert torch.equal(again(images), network(images))
    assert again.pruning == network.pruning
    fetched = {request.path.rpartition("/")[2] for request in hub.seen("HEAD", "resolve")}
    assert fetched == {"pruning.json", "model.safetensors"}


def test_the_python_of_the_card_runs_as_printed(published, repository):
    blocks = re.findall(r"```python\n(.*?)```", repository["README.md"].decode(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, object] = {}
        exec(block, names)  # ours, from the test's own repository
        assert tuple(names["logits"].shape) == (1, 10)
    assert published


@pytest.mark.parametrize("name", ["model", "model_fp16", "model_quantized"])
def test_the_onnx_files_have_the_top_class_of_pytorch(repository_folder, network, images, name):
    session = onnxruntime.InferenceSession(
        repository_folder / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"]
    )
    batch = images.normalise(images.images).numpy()
    (logits,) = session.run(["logits"], {"pixel_values": batch})
    with torch.inference_mode():
        wanted = network(torch.from_numpy(batch)).numpy()
    same = (logits.argmax(1) == wanted.argmax(1)).mean()
    assert same >= (0.9 if name == "model_quantized" else 0.98)


SCRIPT = """
import { AutoModel, AutoProcessor, RawImage, env } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const [name, ...pictures] = process.argv.slice(3);
const processor = await AutoProcessor.from_pretrained(name);
for (const dtype of ["fp32", "fp16"]) {
  const model = await AutoModel.from_pretrained(name, { dtype });
  for (const picture of pictures) {
    const { logits } = await model(await processor(await RawImage.read(picture)));
    const best = logits.data.indexOf(Math.max(...logits.data));
    console.log(JSON.stringify([model.config.id2label[best], Array.from(logits.data)]));
  }
}
"""


@pytest.mark.skipif(not TRANSFORMERS_JS, reason="TRANSFORMERS_JS names no folder with it")
def test_transformers_js_has_the_classes_of_pytorch(repository_folder, network, images, tmp_path):
    pictures = []
    for number in range(4):
        pixels = images.images[number].permute(1, 2, 0).numpy()
        pictures.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(pictures[-1])
    script = Path(TRANSFORMERS_JS, "zoo-test.mjs")
    script.write_text(SCRIPT)
    done = subprocess.run(
        ["node", script.name, str(tmp_path), repository_folder.name, *map(str, pictures)],
        cwd=TRANSFORMERS_JS, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    script.unlink()
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    with torch.inference_mode():
        wanted = network(images.normalise(images.images[:4])).numpy()
    assert len(told) == 8
    for (label, logits), row in zip(told, [*wanted, *wanted], strict=True):
        np.testing.assert_allclose(logits, row, atol=0.05)
        assert label == images.classes[row.argmax()]


def test_publishing_again_sends_nothing_and_a_change_replaces_what_it_touches(
    hub, network_folder, images, tmp_path
):
    options = zoo.PublishOptions(precisions=("fp32",), message="mine")
    first = zoo.publish(network_folder, "org/net", data=images, options=options)
    assert hub.repositories["model", "org/net"].private
    assert hub.commits("org/net")[0].title == "mine"
    assert first.private
    hub.repositories["model", "org/net"].private = False
    again = zoo.publish(network_folder, "org/net", data=images, options=options)
    assert (again.sent, again.deleted, again.private) == ({}, (), False)
    assert again.reference == first.reference
    other = zoo.load("resnet20-16", 4, "bundled:resnet20-16/cifar10", metric="macs", seed=1)
    changed = zoo.publish(
        zoo.save(other, tmp_path / "other"), "org/net", options=zoo.PublishOptions(precisions=())
    )
    assert set(changed.deleted) == {"onnx/model.onnx", "preprocessor_config.json"}
    assert "pruning.json" in changed.sent
    assert zoo.verify("hf:org/net").ok
    assert "not measured" in hub.files("org/net")["README.md"].decode()


def test_a_dry_run_makes_everything_and_sends_nothing(hub, network_folder, images):
    options = zoo.PublishOptions(precisions=("fp32",))
    told = zoo.publish(network_folder, "org/net", data=images, dry_run=True, options=options)
    others = {".gitattributes", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"}
    assert set(told.sent) == LAYOUT - others
    assert not hub.seen("POST|PUT|DELETE")


@pytest.mark.parametrize(
    ("what", "repo", "hint"),
    [
        ("nowhere", "org/net", "neither the folder of a pruned network.*nor a registry"),
        (None, "net", "not the name of a repository; write org/repo"),
        (None, "org/net/file", "not the name of a repository; write org/repo"),
        (None, "hf:datasets/org/net", "not the name of a repository; write org/repo"),
        (None, "org/theirs", "is somebody else's, or of another kind: it holds app.py and no"),
        ("bundled:nobody/params-cf4", "org/net", "Unknown profile"),
    ],
)
def test_what_cannot_be_published_is_refused(hub, network_folder, what, repo, hint):
    hub.add_repo("org/theirs", {"app.py": b"print()"})
    with pytest.raises(ZooError, match=hint):
        zoo.publish(what or network_folder, repo)
    assert not hub.seen("POST|PUT|DELETE")


def test_data_of_other_classes_and_half_a_normalisation_are_refused(
    hub, network_folder, toy_images
):
    with pytest.raises(ZooError, match="has 3 classes, the network 10"):
        zoo.publish(network_folder, "org/net", data=toy_images)
    with pytest.raises(ZooError, match="mean= and std= belong together"):
        zoo.publish(network_folder, "org/net", options=zoo.PublishOptions(mean=(0.5,) * 3))
    with pytest.raises(ZooError, match="Unknown precision 'fp64'"):
        zoo.PublishOptions(precisions=("fp64",))
    with pytest.raises(ZooError, match=r"mean must be a number per channel, got 0\.5"):
        zoo.PublishOptions(mean=0.5, std=0.2)
    given = zoo.PublishOptions(mean=np.full(3, 0.5), std=[0.2] * 3)
    assert (given.mean, given.std) == ((0.5,) * 3, (0.2,) * 3)
    assert not hub.seen("POST|PUT|DELETE")


def test_data_that_are_no_images_of_the_zoo_are_one_clear_error(hub, network_folder, images):
    for data in (halves(16), DataLoader(images), [], images.subset([])):
        with pytest.raises(ZooError, match=r"data must be images of zoo.load_data with at least"):
            zoo.publish(network_folder, "org/net", data=data)
    assert not hub.seen("POST|PUT|DELETE")


def test_the_card_tells_what_each_file_was_compared_on(hub, network_folder, images):
    zoo.publish(network_folder, "org/net", data=images)
    card = hub.files("org/net")["README.md"].decode()
    rows = [[cell.strip() for cell in line.split("|")] for line in card.splitlines()]
    files = {row[1]: row for row in rows if len(row) > 7 and row[1].startswith("`onnx/")}
    counts = {name: int(row[3]) for name, row in files.items()}
    assert counts == {
        "`onnx/model.onnx`": 64, "`onnx/model_fp16.onnx`": 64, "`onnx/model_quantized.onnx`": 32,
    }  # fmt: skip
    odd = images.subset(range(1, 64, 2))
    own = zoo.evaluate(zoo.load_pruned(network_folder), odd).accuracy
    assert files["`onnx/model_quantized.onnx`"][7] == f"{own:.2%}"
    assert "only the two accuracies of one row are of the same images" in card


def test_a_registry_is_published_mirrored_and_verified_as_a_whole(hub, tmp_path):
    made = zoo.publish("bundled", "org/profiles")
    source = "hf:datasets/org/profiles"
    assert str(made.reference).startswith(source)
    files = hub.files("org/profiles", repo_type="dataset")
    for path in registry_folder().rglob("*"):
        if path.is_file():
            assert files[path.relative_to(registry_folder()).as_posix()] == path.read_bytes()
    card = files["README.md"].decode()
    assert "data_files: ledger/resnet20-16.parquet" in card
    listed = [entry.cf for entry in zoo.list_profiles(source=source)]
    assert listed == [entry.cf for entry in zoo.list_profiles()]
    found = zoo.verify(source)
    assert found.ok, found.failed
    mirror = tmp_path / "mirror"
    for name, content in files.items():
        (mirror / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror / name).write_bytes(content)
    assert zoo.verify(mirror).ok
    names: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.S)[0], names)  # ours
    assert names["profile"] == zoo.get_profile(zoo.list_profiles()[0].reference)


def test_a_profile_is_added_to_those_that_a_repository_holds(hub):
    zoo.publish("bundled:cnet/params-cf4", "org/mine")
    zoo.publish(zoo.get_profile("bundled:resnet20-16/macs-cf4"), "org/mine")
    source = "hf:datasets/org/mine"
    assert [e.architecture for e in zoo.list_profiles(source=source)] == ["cnet", "resnet20-16"]
    assert zoo.verify(source).ok
    assert zoo.publish("bundled:cnet/params-cf4", "org/mine").sent == {}
    network = zoo.create_model("resnet20-16", 10)
    pruned = zoo.load("resnet20-16", 4, network, metric="macs", profile=source)
    assert pruned.pruning.plan.profile.startswith(f"{source}/resnet20-16/macs-cf4.json@")
    commits = hub.commits("org/mine", repo_type="dataset")
    assert [commit.title for commit in commits[:2]] == [
        "Profile resnet20-16 macs-cf4", "Profile cnet params-cf4",
    ]  # fmt: skip


def test_the_command_line_publishes_verifies_shows_and_finds(hub, network_folder, capsys):
    from zoo.cli import main

    assert main(["publish", str(network_folder), "org/net", "--precisions", "fp32"]) == 0
    assert "sent     onnx/model.onnx" in capsys.readouterr().out
    assert main(["publish", "bundled:cnet/params-cf4", "org/mine", "--dry-run"]) == 0
    assert "would be sent     cnet/params-cf4.json" in capsys.readouterr().out
    assert main(["verify", "hf:org/net"]) == 0
    assert "0 found wrong" in capsys.readouterr().out
    assert main(["show", "hf:org/net"]) == 0
    shown = capsys.readouterr().out
    assert "bundled:resnet20-16/macs-cf4" in shown
    assert hub.commits("org/net")[0].id in shown
    assert main(["list", "--hub", "--arch", "resnet20-16"]) == 0
    assert "hf:org/net" in capsys.readouterr().out
    assert main(["list", "--hub", "--arch", "cnet"]) == 0
    assert "hf:org/net" not in capsys.readouterr().out


def test_a_publication_that_fails_leaves_no_trace(hub: LoopbackHub, network_folder, tmp_path):
    before = sorted(network_folder.iterdir())
    broken = shutil.copytree(network_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ZooError, match=r"model\.safetensors"):
        zoo.publish(broken, "org/net")
    assert not hub.seen("POST|PUT|DELETE")
    assert sorted(network_folder.iterdir()) == before


def test_a_precision_that_does_not_hold_is_left_out_unless_it_was_asked_for(
    hub, network_folder, monkeypatch
):
    from zoo.errors import ExportError
    from zoo.publishing import model_repository

    real = model_repository.export

    def export(*given, precision, **options):
        if precision == "fp16":
            raise ExportError("fp16 overflows.")
        return real(*given, precision=precision, **options)

    monkeypatch.setattr(model_repository, "export", export)
    made = zoo.publish(network_folder, "org/net")
    assert {name for name in made.sent if name.startswith("onnx/")} == {"onnx/model.onnx"}
    card = hub.files("org/net")["README.md"].decode()
    assert "There is no `onnx/model_fp16.onnx`: fp16 overflows." in card
    with pytest.raises(ExportError, match="overflows"):
        zoo.publish(network_folder, "org/other", options=zoo.PublishOptions(precisions=("fp16",)))
    assert ("model", "org/other") not in hub.repositories


def test_no_folder_of_this_machine_is_published(hub, tmp_path):
    place = tmp_path / "alice" / "secret"
    place.mkdir(parents=True)
    torch.save(zoo.create_model("cnet", 10).state_dict(), place / "mine.pt")
    zoo.get_profile("bundled:cnet/params-cf4").write(place / "p.json")
    network = zoo.load("cnet", 4, place / "mine.pt", profile=f"file:{place / 'p.json'}")
    zoo.save(network, tmp_path / "net")
    zoo.publish(tmp_path / "net", "org/net", options=zoo.PublishOptions(precisions=("fp32",)))
    for name, content in hub.files("org/net").items():
        assert b"alice" not in content, name
    config = json.loads(hub.files("org/net")["config.json"])
    assert config["profile"] == "file:p.json"
    entries = {entry.reference: entry for entry in zoo.list_profiles(arch="cnet")}
    assert len(config["profile_sha256"]) == len(entries["bundled:cnet/params-cf4"].sha256)
    assert zoo.verify("hf:org/net").ok


def test_the_licence_of_a_profile_is_its_own(hub):
    def licence(what: str, **options: str) -> object:
        zoo.publish(what, "org/p", options=zoo.PublishOptions(**options))
        card = hub.files("org/p", repo_type="dataset")["README.md"].decode()
        return ModelCard(card).data.to_dict().get("license")

    assert licence("bundled:cnet/params-cf4") == "apache-2.0"
    assert (
        licence("published:resrep") == zoo.get_profile("published:resrep").published.licence.lower()
    )
    assert licence("bundled:cnet/params-cf4", license="cc-by-4.0") == "cc-by-4.0"


@pytest.mark.parametrize("what", [None, 5, torch.nn.Identity()])
def test_what_is_no_folder_is_one_clear_error(hub, what):
    with pytest.raises(ZooError, match="Publish a folder, a profile or its reference"):
        zoo.publish(what, "org/x")
    with pytest.raises(ZooError, match="Verify a folder or a reference"):
        zoo.verify(what)
    assert not hub.requests


def test_images_of_another_size_and_odd_numbers_are_refused(hub, network_folder, images):
    wide = replace(images, images=images.images.repeat(1, 1, 1, 2))
    with pytest.raises(ZooError, match=r"has images of 16x32 pixels, the network is for"):
        zoo.publish(network_folder, "org/net", data=wide)
    with pytest.raises(ZooError, match="mean= has 1 numbers, the images 3 channels"):
        zoo.publish(network_folder, "org/net", options=zoo.PublishOptions(mean=(0.5,), std=(0.5,)))
    for mean, std in (((float("nan"),), (1.0,)), ((0.5,), (0.0,))):
        with pytest.raises(ZooError, match="finite numbers, and std above 0"):
            zoo.PublishOptions(mean=mean, std=std)
    assert zoo.PublishOptions(datasets="org/data", precisions="fp32").datasets == ("org/data",)
    assert not hub.seen("POST|PUT|DELETE")


def test_the_card_names_the_first_file_that_there_is(hub, network_folder, images):
    options = zoo.PublishOptions(precisions=("fp16",))
    zoo.publish(network_folder, "org/net", data=images, options=options)
    card = hub.files("org/net")["README.md"].decode()
    assert '{ dtype: "fp16" }' in card
    zoo.publish(network_folder, "org/bare", options=zoo.PublishOptions(precisions=()))
    assert "onnx" not in ModelCard(hub.files("org/bare")["README.md"].decode()).data.tags


def test_a_slow_hub_is_only_slow(hub, network_folder, network):
    hub.fault("delay", seconds=0.05, times=None)
    zoo.publish(network_folder, "org/net", options=zoo.PublishOptions(precisions=()))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(zoo.load_pruned("hf:org/net")(images), network(images))
