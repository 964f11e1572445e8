"""`zoo.verify` finds everything that is wrong, and finds nothing where nothing is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

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
    assert any("no SHA256SUMS" in line for line in zoo.verify(network_folder).passed)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda at: (at / "config.json").write_text("{}"), "config.json is not the file that"),
        (lambda at: (at / "onnx" / "model.onnx").unlink(), "onnx/model.onnx is missing"),
        (lambda at: (at / "run_me.py").write_text("x"), "run_me.py is not listed in SHA256SUMS"),
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
    assert "model.onnx has PyTorch's top class on" in first
    assert "model_fp16.onnx is another network's: cnet by" in second
    assert "model_quantized.onnx" in third


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return Path(shutil.copytree(registry_folder(), tmp_path / "registry"))


def test_the_bundled_registry_is_as_it_says(registry):
    for what in ("bundled", registry, *(entry.reference for entry in zoo.list_profiles())):
        found = zoo.verify(what)
        assert found.ok, found.failed


@pytest.mark.parametrize(
    ("name", "edit", "line"),
    [
        ("cnet/params-cf4.json", lambda d: d.update(got=9), "params-cf4.json is not what index"),
        ("index.json", lambda d: d["profiles"].pop(0), "cnet/params-cf2.json is not in index.json"),
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
        (lambda d: d.update(got=9.0), "the factor is 9, by the widths 3.9"),
        (lambda d: d["kept"].update(conv1=31), "conv1 keeps 31 of 32 channels"),
        (lambda d: d.update(architecture="nobody"), "groups of nobody are not known here"),
        (lambda d: (d["kept"].pop("conv1"), d["keep_ratios"].pop("conv1")), "its groups are not"),
    ],
)
def test_a_profile_alone_that_does_not_say_what_is_so(registry, edit, line):
    path = registry / "cnet" / "params-cf4.json"
    change(path, edit)
    for what in (path, f"file:{path}"):
        assert any(line in each for each in zoo.verify(what).failed)


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
