from __future__ import annotations

import os
import resource
from dataclasses import dataclass, field

import pytest

from zoo.common.documents import (
    SCHEMA_VERSION,
    decode,
    decode_document,
    encode,
    encode_document,
    read_json,
    write_json,
    write_text,
)
from zoo.errors import DocumentError


@dataclass(frozen=True)
class Leaf:
    name: str
    ratio: float
    count: int = 1


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    shape: tuple[int, int]
    table: dict[str, Leaf] = field(default_factory=dict)
    note: str | None = None


TREE = Tree((Leaf("a", 0.5), Leaf("b", 1.0, 3)), (4, 5), {"x": Leaf("c", 0.25)}, "hello")
RAW = {"name": "a", "ratio": 0.5}


def test_nested_dataclasses_survive_a_round_trip():
    assert decode(Tree, encode(TREE), "tree") == TREE


def test_none_is_left_out_and_read_back():
    bare = Tree((), (1, 2))
    assert "note" not in encode(bare)
    assert decode(Tree, encode(bare), "tree") == bare


def test_integers_are_numbers_and_become_floats():
    value = decode(Leaf, {"name": "a", "ratio": 1}, "leaf").ratio
    assert value == 1.0
    assert isinstance(value, float)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (RAW | {"cuont": 2}, r"leaf: unknown key 'cuont'. Did you mean 'count'\?"),
        ({"ratio": 0.5}, "leaf: the key 'name' is missing"),
        (RAW | {"ratio": "0.5"}, "leaf.ratio: expected a number"),
        (RAW | {"ratio": True}, "leaf.ratio: expected a number"),
        (RAW | {"count": True}, "leaf.count: expected an integer"),
        (RAW | {"count": 1.0}, "leaf.count: expected an integer"),
        (RAW | {"count": None}, "leaf.count: expected an integer"),
        (RAW | {"name": 3}, "leaf.name: expected a string"),
        ([RAW], "leaf: expected an object"),
    ],
)
def test_a_wrong_leaf_is_refused_by_name(raw, message):
    with pytest.raises(DocumentError, match=message):
        decode(Leaf, raw, "leaf")


def test_errors_name_the_place_inside_the_document():
    raw = encode(TREE)
    raw["leaves"][1]["ratio"] = "half"
    with pytest.raises(DocumentError, match=r"tree\.leaves\[1\]\.ratio"):
        decode(Tree, raw, "tree")
    raw = encode(TREE)
    raw["table"]["x"]["size"] = 1
    with pytest.raises(DocumentError, match=r"tree\.table\.x: unknown key 'size'"):
        decode(Tree, raw, "tree")


def test_a_tuple_of_fixed_length_counts_its_items():
    with pytest.raises(DocumentError, match=r"tree\.shape: expected 2 items, got 3"):
        decode(Tree, encode(TREE) | {"shape": [1, 2, 3]}, "tree")


def test_a_document_survives_a_round_trip_and_is_not_changed_by_reading():
    raw = encode_document(TREE)
    assert raw == {"schema_version": SCHEMA_VERSION, **encode(TREE)}
    for _ in range(2):
        assert decode_document(Tree, raw, "tree") == TREE


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, str(SCHEMA_VERSION), None])
def test_a_document_of_another_version_is_refused_before_its_keys_are_read(version):
    raw = encode_document(TREE) | {"schema_version": version, "new": 1}
    with pytest.raises(DocumentError, match=rf"tree: schema_version is {version!r}, this version"):
        decode_document(Tree, raw, "tree")


def test_a_document_is_an_object_with_a_version():
    with pytest.raises(DocumentError, match="tree: schema_version is None"):
        decode_document(Tree, encode(TREE), "tree")
    with pytest.raises(DocumentError, match="tree: expected an object"):
        decode_document(Tree, [encode_document(TREE)], "tree")


def test_files_that_cannot_be_read_are_document_errors(tmp_path):
    with pytest.raises(DocumentError, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(DocumentError, match="not valid JSON"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DocumentError, match="cannot be read"):
        read_json(tmp_path / "binary.json")
    with pytest.raises(DocumentError, match="cannot be read"):
        read_json(tmp_path)


def test_writing_creates_folders_and_keeps_unicode(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"β": TREE})
    assert decode(Tree, read_json(path)["β"], "tree") == TREE
    assert "β" in path.read_text(encoding="utf-8")


def _replace_fails(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_failing_write_leaves_the_old_document_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "doc.json"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", _replace_fails)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_really_fills_up_keeps_the_old_document(tmp_path):
    path = tmp_path / "doc.json"
    write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_text(path, "new" * 1_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
