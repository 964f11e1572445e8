"""A sample of `scripts/fuzz.py`: what is damaged or hostile is refused in one way, and not run."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from random import Random

import fuzz
import pytest
import safetensors.torch
import torch
from fuzzing import TARGETS, Target
from hypothesis import given
from hypothesis import strategies as st

import zoo
from zoo.common.documents import LARGEST, decode_document, read_json
from zoo.errors import CheckpointError, DocumentError, ZooError
from zoo.spec.plans import PruningRecord
from zoo.spec.profile import Profile
from zoo.storage.checkpoints import read_checkpoint

VERIFIED = ("registry index", "registry profile", "config.json")
"""Targets of `zoo.verify`, which says what is wrong instead of raising it."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def prepared(request, tmp_path_factory) -> tuple[Target, list[bytes], Path]:
    """A target, its valid files and a scratch folder."""
    folder = tmp_path_factory.mktemp("fuzz")
    return request.param, request.param.seeds(folder), folder


def test_valid_files_are_read(prepared):
    target, seeds, folder = prepared
    assert seeds
    for content in seeds:
        assert fuzz.run(target, content, folder) == ("read", "")


@pytest.mark.filterwarnings("ignore")
def test_bad_files_are_refused_or_read(prepared):
    target, seeds, folder = prepared
    told = []
    for number in range(40):
        content = fuzz.spoilt(target, Random(f"test:{number}"), seeds)
        told.append(fuzz.run(target, content, folder))
    assert [what for kind, what in told if kind == "failed"] == []
    assert len({kind for kind, _ in told} | {"read"}) > 1 or target.name in VERIFIED


@pytest.mark.parametrize("wrong", [KeyError("x"), ZooError(""), RecursionError()])
def test_the_script_notes_what_is_no_proper_refusal(wrong, tmp_path):
    def read(*_: object) -> None:
        raise wrong

    target = Target("t", lambda _: [b""], lambda _, seeds: seeds[0], read)
    assert fuzz.run(target, b"", tmp_path)[0] == "failed"


def test_the_script_notes_a_hang_and_what_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    hang = Target("t", lambda _: [b""], lambda _, seeds: seeds[0], lambda *_: _forever())
    assert "no end after 1 s" in fuzz.run(hang, b"", tmp_path)[1]
    code = (
        "import sys, os; import fuzz; fuzz.watching = True;"
        "sys.addaudithook(lambda e, g: fuzz._watch(e, g, '/scratch')); os.system('true')"
    )
    done = os.popen(f'cd {Path(fuzz.__file__).parent} && {sys.executable} -c "{code}" 2>&1').read()
    assert "Violation: os.system" in done


def _forever() -> None:
    while True:
        pass


@given(JSON)
def test_any_json_is_a_document_or_a_document_error(value):
    for kind in (Profile, PruningRecord):
        for raw in (value, {"schema_version": 1, "architecture": value}):
            with pytest.raises(DocumentError):
                decode_document(kind, raw, "here")


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5_000, "not a document"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b"\xff", "cannot be read"),
        (b" " * (LARGEST + 1), "has more than"),
    ],
    ids=["deep", "digits", "NaN", "bytes", "large"],
)
def test_json_that_exhausts_a_reader_is_refused(tmp_path, content, hint):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=hint):
        read_json(path)


@pytest.mark.parametrize("name", ["../../x", "a/b", "", "a\\b", ".hidden", "hf:a/b"])
def test_an_architecture_whose_name_is_a_path_is_refused(name):
    raw = zoo.get_profile("bundled:cnet/params-cf4").to_json() | {"architecture": name}
    with pytest.raises(DocumentError, match="not the name of an architecture"):
        Profile.from_json(raw)


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(100 << 20))
    with pytest.raises(CheckpointError, match="claims to hold 104,857,6"):
        read_checkpoint(path)


def test_tensors_that_claim_far_more_than_the_file_holds_are_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, buffer)
    path = tmp_path / "wide.pt"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="claims to hold 4,398,046,511,104"):
        read_checkpoint(path)


@pytest.mark.parametrize("indices", [[0, 99], [-1], [1, 0], [0, 0], [], [2**70]])
def test_kept_channels_that_a_network_does_not_have_are_refused(tmp_path, indices):
    folder = zoo.save(zoo.load("cnet", 4, "bundled:cnet/cifar10"), tmp_path / "net")
    record = json.loads((folder / "pruning.json").read_text())
    record["plan"]["kept"]["conv1"] = indices
    (folder / "pruning.json").write_text(json.dumps(record))
    with pytest.raises(ZooError, match="'conv1' that are kept are not some of its 32, in order"):
        zoo.load_pruned(folder)


def test_a_number_that_no_float_holds_is_refused():
    raw = zoo.get_profile("bundled:cnet/params-cf4").to_json() | {"got": 10**400}
    with pytest.raises(DocumentError, match=r"got: 100000000000\.\.\. is too large a number"):
        Profile.from_json(raw)


def test_a_checkpoint_without_metadata_where_they_belong_is_read(tmp_path):
    state = zoo.create_model("cnet", 10).state_dict()
    content = safetensors.torch.save(state, {"arch": "cnet"})
    spoilt = content.replace(
        b'"__metadata__":{"arch":"cnet"}', b'"__metadata__":null          ' + b" "
    )
    assert len(spoilt) == len(content)
    path = tmp_path / "a.safetensors"
    path.write_bytes(spoilt)
    assert read_checkpoint(path).metadata == {}
