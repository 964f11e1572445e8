"""`zoo.verify` finds everything that is wrong, and finds nothing where nothing is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import zoo
from zoo.cli import main
from zoo.errors import ZooError
from zoo.publishing.checksums import write_checksums
from zoo.registry.store import registry_folder


def change(path: Path, edit: Callable[[Any], None]) -> None:
    """Edit the JSON document at `path`."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_published_network_is_verified_by_reference_and_as_a_folder(
    published, repository_folder, network_folder
):
    for what in (published, repository_folder, network_folder):
        found = zoo.verify(what)
        assert found.ok, found.failed
        assert "costs and factor follow from the widths" in found.passed
    assert zoo.verify(published.partition("@")[0]).what == published
    assert any("no SHA256SUMS" in line for line in zoo.verify(network_folder).unchecked)
    (repository_folder / "picture.png").write_bytes(b"")
    (repository_folder / ".hidden.py").write_bytes(b"")
    found = zoo.verify(repository_folder)
    assert found.ok
    assert sum("it lies beside the publication" in line for line in found.unchecked) == 2


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda at: (at / "config.json").write_text("{}"), "config.json is not the file that"),
        (lambda at: (at / "onnx" / "model.onnx").unlink(), "onnx/model.onnx is missing"),
        (lambda at: (at / "SHA256SUMS").write_text("0 ../x"), "SHA256SUMS:1 is not a sha256 and"),
    ],
)
def test_files_that_are_not_those_that_were_published(repository_folder, spoil, line):
    spoil(repository_folder)
    assert any(line in each for each in zoo.verify(repository_folder).failed)


@pytest.mark.parametrize(
    ("name", "edit", "line"),
    [
        ("pruning.json", lambda d: d["plan"]["pruned"].update(macs=1), "pruned macs are 1, by the"),
        ("pruning.json", lambda d: d["plan"].update(got=4.5), "the factor is 4.5, by the widths"),
        ("pruning.json", lambda d: d["plan"]["kept"]["conv1"].pop(), "conv1"),
        ("pruning.json", lambda d: d.update(code="x"), "unknown key 'code'"),
        ("config.json", lambda d: d["kept"].update(conv1=1), "config.json: kept is"),
        ("config.json", lambda d: d["id2label"].popitem(), "names 9 classes, the network has 10"),
        ("config.json", lambda d: d.update(seed=5), "config.json: seed is 5, by pruning.json 0"),
        ("config.json", lambda d: d.update(id2label=[]), "not an object with id2label"),
        ("config.json", lambda d: d.update(auto_map="evil.py--X"), "has the key 'auto_map', which"),
        ("pruning.json", lambda d: d.update(image_size=10**7), "pruning.json"),
    ],
)
def test_documents_that_do_not_say_what_is_so(repository_folder, name, edit, line):
    change(repository_folder / name, edit)
    write_checksums(repository_folder)
    found = zoo.verify(repository_folder)
    assert any(line in each for each in found.failed), found.failed


def test_an_onnx_file_of_other_weights_or_of_another_network_is_found(repository_folder):
    path = repository_folder / "onnx" / "model.onnx"
    file = onnx.load(path)
    weight = next(each for each in file.graph.initializer if 10 in each.dims and len(each.dims) > 1)
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(file, path)
    cnet = zoo.load("cnet", 4, "bundled:cnet/cifar10")
    zoo.export(cnet, repository_folder / "onnx" / "model_fp16.onnx", precision="fp16")
    (repository_folder / "onnx" / "model_quantized.onnx").write_bytes(b"no model")
    write_checksums(repository_folder)
    first, second, third = zoo.verify(repository_folder).failed
    assert "model.onnx differs from PyTorch by" in first
    assert "model_fp16.onnx is another network's: cnet by" in second
    assert "model_quantized.onnx" in third


def test_a_file_of_another_precision_than_its_name_says_is_found(repository_folder):
    """Else one that says that it is int8, which is not compared, could hold anything."""
    path = repository_folder / "onnx" / "model.onnx"
    file = onnx.load(path)
    (told,) = (each for each in file.metadata_props if "precision" in each.key)
    assert told.value == "fp32"
    told.value = "int8"
    onnx.save(file, path)
    write_checksums(repository_folder)
    found = zoo.verify(repository_folder)
    (line,) = found.failed
    assert line == "onnx/model.onnx says that it is of int8, its name that it is of fp32"


def test_what_was_not_compared_did_not_pass(repository_folder):
    found = zoo.verify(repository_folder)
    exports = [line.split()[0] for line in found.passed if "is an export of" in line]
    assert exports == ["onnx/model.onnx", "onnx/model_fp16.onnx"]
    assert [line.split()[0] for line in found.unchecked] == ["onnx/model_quantized.onnx"]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return Path(shutil.copytree(registry_folder(), tmp_path / "registry"))


def unlisted(name: str) -> Callable[[dict], None]:
    """The edit of an index that takes one profile out."""

    def edit(index: dict) -> None:
        own = [each for each in index["profiles"] if each["reference"] != f"bundled:{name}"]
        assert len(own) == len(index["profiles"]) - 1
        index["profiles"] = own

    return edit


def test_the_bundled_registry_is_as_it_says(registry):
    for what in ("bundled", registry, *(entry.reference for entry in zoo.list_profiles())):
        found = zoo.verify(what)
        assert found.ok, found.failed


@pytest.mark.parametrize(
    ("name", "edit", "line"),
    [
        ("cnet/params-cf4.json", lambda d: d.update(got=9), "params-cf4.json is not what index"),
        ("index.json", unlisted("cnet/params-cf2"), "cnet/params-cf2.json is not in index.json"),
        ("index.json", lambda d: d.update(more=1), "unknown key 'more'"),
        ("index.json", lambda d: d["profiles"][0].update(reference="bundled:../x/y"), "Expected"),
        ("cnet/groups.json", lambda d: d["groups"].pop(), "cnet/groups.json"),
        ("published/resrep.json", lambda d: d.update(got=3.0), "published/resrep.json is not the"),
    ],
)
def test_a_registry_that_does_not_say_what_is_so(registry, name, edit, line):
    change(registry / name, edit)
    found = zoo.verify(registry)
    assert any(line in each for each in found.failed), found.failed


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda d: d.update(got=9.0), "the factor is 9, by the widths {:.6g}"),
        (lambda d: d["kept"].update(conv1=31), "conv1 keeps 31 of 32 channels"),
        (lambda d: (d["kept"].pop("conv1"), d["keep_ratios"].pop("conv1")), "its groups are not"),
    ],
)
def test_a_profile_alone_that_does_not_say_what_is_so(registry, edit, line):
    path = registry / "cnet" / "params-cf4.json"
    expected = line.format(zoo.get_profile(f"file:{path}").got)
    change(path, edit)
    for what in (path, f"file:{path}"):
        assert any(expected in each for each in zoo.verify(what).failed)


def test_nothing_to_verify_is_an_error(hub, tmp_path):
    hub.add_repo("org/else", {"app.py": b""})
    for what, hint in (
        (tmp_path, "holds no pruned network"),
        (tmp_path / "none", "does not exist"),
        ("bundled:cnet/params-cf9", "Unknown profile"),
        ("hf:org/none", "no such repository"),
        ("hf:org/else", "holds no pruned network"),
    ):
        with pytest.raises(ZooError, match=hint):
            zoo.verify(what)


def test_the_command_line_says_what_is_wrong_and_its_exit_code_too(repository_folder, capsys):
    assert main(["verify", str(repository_folder)]) == 0
    (repository_folder / "config.json").write_text("{}")
    assert main(["verify", str(repository_folder)]) == 1
    assert "WRONG  config.json is not the file" in capsys.readouterr().out


def test_no_reference_in_a_document_is_followed(hub, repository_folder, registry):
    """What a hostile document names is neither read nor fetched."""
    for profile in ("file:/dev/zero", "hf:evil/track/x.json", "file:a\0b", "file:~nobody/x"):
        change(repository_folder / "pruning.json", lambda d, p=profile: d["plan"].update(profile=p))
        assert not zoo.verify(repository_folder).ok  # the files are not those that were published
    path = registry / "published" / "ecaresnet50d_pruned.json"
    for file in ("/dev/zero", "../" * 20 + "etc/hostname", "a\0"):
        change(path, lambda d, f=file: d.update(file=f))
        found = zoo.verify(registry)
        assert any("is not the name of a file that timm ships" in line for line in found.failed)
    assert not hub.requests


def test_a_profile_of_an_unknown_architecture_is_not_compared(registry):
    path = registry / "cnet" / "params-cf4.json"
    change(path, lambda d: d.update(architecture="nobody"))
    found = zoo.verify(path)
    assert found.ok
    assert found.unchecked == ("the groups of nobody are not known here",)


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3))
    pruned = zoo.prune(network, torch.zeros(1, 3, 8, 8), cf=2, profile="equal")
    return zoo.save(pruned, tmp_path / "own")


def test_a_network_of_no_architecture_is_not_compared_and_not_published(own_folder, hub):
    folder = own_folder
    found = zoo.verify(folder)
    assert found.ok
    assert not found.passed
    assert any("of no registered architecture" in line for line in found.unchecked)
    with pytest.raises(ZooError, match=r"no registered architecture.*cannot be published"):
        zoo.publish(folder, "org/own")
    assert not hub.seen("POST|PUT|DELETE")


@pytest.mark.parametrize("length", [None, 0, 100, -1])
def test_damaged_weights_of_a_network_of_no_architecture_are_found(own_folder, length):
    path = own_folder / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if length is not None:
        path.write_bytes(content[:length])
    (line,) = zoo.verify(own_folder).failed
    assert str(path) in line
    assert ("does not exist" if length is None else "is truncated") in line


def test_a_profile_that_the_index_does_not_list_is_not_pulled(hub, registry):
    path = registry / "cnet" / "params-cf4.json"
    path.write_text(path.read_text() + "\n")
    files = {p.relative_to(registry).as_posix(): p.read_bytes() for p in registry.rglob("*.json")}
    hub.add_repo("evil/reg", files, repo_type="dataset")
    with pytest.raises(ZooError, match="not the file that the index lists"):
        zoo.load("cnet", 4, "bundled:cnet/cifar10", profile="hf:datasets/evil/reg")


def test_what_a_document_holds_is_printed_without_a_terminals_commands(
    network_folder, tmp_path, capsys
):
    folder = shutil.copytree(network_folder, tmp_path / "net")
    change(
        folder / "pruning.json", lambda d: d["source"].update(reference="\x1b]0;pwned\x07\x1b[2J")
    )
    assert main(["show", str(folder)]) == 0
    assert "pwned" in (shown := capsys.readouterr().out)
    assert "\x1b" not in shown
    (folder / "pruning.json").write_text(json.dumps({"k" * 10**6: 1}))
    assert main(["verify", str(folder)]) == 1
    assert main(["show", str(folder)]) == 2
    assert len(capsys.readouterr().err) < 5_000
