"""Data sets: what their splits hold, and what is said of those that cannot be read."""

from __future__ import annotations

import copy
import io
import os
import shutil
import struct
import sys
import types
import zlib
from dataclasses import make_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.datasets import load_data
from zoo.errors import DataError


def test_digits_splits_are_disjoint_and_together_whole():
    from sklearn.datasets import load_digits

    splits = load_data("digits", size=8)
    parts = [splits.train, splits.val, splits.test]
    assert sum(len(part) for part in parts) == 1797
    target = load_digits().target
    counts = torch.bincount(torch.cat([part.labels for part in parts]))
    assert counts.tolist() == np.bincount(target).tolist()
    rows = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_validation_is_the_last_tenth_of_each_class_in_file_order(image_tree):
    splits = load_data(f"imagefolder:{image_tree}", size=8)
    assert splits.val.labels.tolist() == [0, 1]
    assert splits.val.images[:, 0, 0, 0].tolist() == [90, 90]  # the red of the tenth file
    assert splits.train.images[:, 0, 0, 0].tolist() == [10 * n for n in range(9)] * 2
    assert len(splits.test) == 6


def test_the_digest_is_stable_and_tells_splits_apart():
    first, again = load_data("digits", size=8), load_data("digits", size=8)
    assert first.digest == again.digest == first.val.digest()
    assert first.digest != first.train.digest()
    changed = first.val.images.clone()
    changed[0, 0, 0, 0] += 1
    assert replace(first.val, images=changed).digest() != first.digest
    labels = first.val.labels.flip(0)
    assert replace(first.val, labels=labels).digest() != first.digest


def test_the_name_says_what_the_digits_are():
    splits = load_data("digits", size=16)
    assert splits.train.image_size == 16
    assert "digits" in splits.train.name
    assert "16x16" in splits.train.name
    assert not splits.train.flip


def test_folders_decode_to_their_pixels_and_sorted_classes(image_tree):
    splits = load_data(f"imagefolder:{image_tree}", size=8)
    assert splits.train.classes == ("cat", "dog")
    assert splits.train.images.dtype == torch.uint8
    assert splits.test.images[4, :, 3, 3].tolist() == [10, 200, 7]
    halved = load_data(f"imagefolder:{image_tree}", size=4)
    assert halved.train.images.shape[1:] == (3, 4, 4)
    assert halved.train.images[1, :, 0, 0].tolist() == [10, 0, 7]


def test_hidden_files_and_folders_are_no_classes_and_no_images(image_tree):
    before = load_data(f"imagefolder:{image_tree}", size=8)
    for part in ("train", "val"):
        classes = sorted(entry for entry in (image_tree / part).iterdir())
        (image_tree / part / ".ipynb_checkpoints").mkdir()
        (classes[0] / "._a.png").write_bytes(b"not an image")
        (classes[1] / ".trash").mkdir()
        (classes[1] / ".trash" / "a.png").write_bytes(b"not an image")
    after = load_data(f"imagefolder:{image_tree}", size=8)
    assert after.train.classes == before.train.classes
    assert torch.equal(after.train.images, before.train.images)


def test_a_decoded_folder_is_read_again_only_when_its_files_change(image_tree, monkeypatch):
    load_data(f"imagefolder:{image_tree}", size=8)
    monkeypatch.setattr("zoo.data.datasets.decode_all", lambda *_: pytest.fail("decoded again"))
    load_data(f"imagefolder:{image_tree}", size=8)
    monkeypatch.undo()
    path = image_tree / "train" / "cat" / "00.png"
    before = path.stat()
    Image.new("RGB", (8, 8), (1, 0, 7)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    assert load_data(f"imagefolder:{image_tree}", size=8).train.images[0, 0, 0, 0] == 1


def _corruptions() -> dict[str, bytes]:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "png")
    good = stream.getvalue()
    data = good.index(b"IDAT")
    header = b"IHDR" + b"\x00\x0f\xff\xff" * 2 + good[24:29]
    return {
        "empty": b"",
        "text": b"not an image",
        "truncated": good[: data + 20],
        "header only": good[:33],
        "broken chunk": good[:data] + b"IDAX" + good[data + 4 :],
        "broken checksum": good[:29] + b"\0\0\0\0" + good[33:],
        "huge": good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:],
    }


@pytest.mark.parametrize("kind", list(_corruptions()))
def test_a_corrupt_image_is_named(image_tree, kind):
    (image_tree / "train" / "dog" / "03.png").write_bytes(_corruptions()[kind])
    with pytest.raises(DataError, match=r"dog/03\.png cannot be read as an image"):
        load_data(f"imagefolder:{image_tree}", size=8)


@pytest.mark.parametrize("error", [struct.error("unpack"), EOFError("no more")])
def test_what_a_decoder_stumbles_over_is_a_corrupt_image(image_tree, monkeypatch, error):
    def stumble(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", stumble)
    with pytest.raises(DataError, match=r"cat/00\.png cannot be read as an image"):
        load_data(f"imagefolder:{image_tree}", size=8)


def test_a_link_to_nothing_is_named(image_tree):
    (image_tree / "train" / "dog" / "zz.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"cannot be read.*zz\.png"):
        load_data(f"imagefolder:{image_tree}", size=8)


def test_a_cache_that_cannot_be_written_is_done_without(image_tree, tmp_path, monkeypatch):
    wanted = load_data(f"imagefolder:{image_tree}", size=8)
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file"))
    assert load_data(f"imagefolder:{image_tree}", size=8).digest == wanted.digest


def test_what_is_missing_is_said(tmp_path, image_tree):
    with pytest.raises(DataError, match=r"data set 'digit'. Did you mean 'digits'\?"):
        load_data("digit")
    with pytest.raises(DataError, match="needs the folder"):
        load_data("cifar10")
    with pytest.raises(DataError, match="has no train/ folder"):
        load_data("cifar10", tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds 2 classes; CIFAR-10 has 10"):
        load_data("cifar10", image_tree)
    (tmp_path / "half" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="neither a val/ nor a test/"):
        load_data(f"imagefolder:{tmp_path / 'half'}")
    (tmp_path / "half" / "val" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no <class>/<image> files"):
        load_data(f"imagefolder:{tmp_path / 'half'}")


def test_train_and_test_folders_must_hold_the_same_classes(image_tree):
    (image_tree / "val" / "dog").rename(image_tree / "val" / "wolf")
    with pytest.raises(DataError, match="same classes"):
        load_data(f"imagefolder:{image_tree}", size=8)


def test_of_val_and_test_each_is_its_own_split(image_tree):
    shutil.copytree(image_tree / "val", image_tree / "test")
    for number, part in enumerate(("val", "test")):
        Image.new("RGB", (8, 8), (77 + number,) * 3).save(image_tree / part / "cat" / "00.png")
    splits = load_data(f"imagefolder:{image_tree}", size=8)
    assert len(splits.train) == 20
    assert (splits.val.images[0, 0, 0, 0], splits.test.images[0, 0, 0, 0]) == (77, 78)
    assert splits.train.name == splits.val.name == splits.test.name
    (image_tree / "test" / "dog").rename(image_tree / "test" / "wolf")
    with pytest.raises(DataError, match=r"train and .*/test do not hold the same classes"):
        load_data(f"imagefolder:{image_tree}", size=8)


@pytest.mark.parametrize("alone", ["val", "test"])
def test_one_of_val_and_test_is_the_test_split(image_tree, alone):
    before = load_data(f"imagefolder:{image_tree}", size=8)
    (image_tree / "val").rename(image_tree / alone)
    other = image_tree / {"val": "test", "test": "val"}[alone]
    other.mkdir()
    Image.new("RGB", (8, 8)).save(other / "of_no_class.png")
    after = load_data(f"imagefolder:{image_tree}", size=8)
    assert [after.val.digest(), after.test.digest()] == [before.val.digest(), before.test.digest()]
    assert len(after.train) == 18


@pytest.mark.slow
def test_cifar100_has_a_hundred_classes(tmp_path, image_tree):
    with pytest.raises(DataError, match="holds 2 classes; CIFAR-100 has 100"):
        load_data("cifar100", image_tree)
    for split in ("train", "val"):
        for label in range(100):
            folder = tmp_path / "cifar100" / split / f"{label:02d}"
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (label, 0, 0)).save(folder / "0.png")
    splits = load_data("cifar100", tmp_path)
    assert splits.num_classes == 100
    assert splits.test.images[:, 0, 0, 0].tolist() == list(range(100))
    assert "CIFAR-100" in splits.test.name


class FakeRows(dict):
    """Rows as the datasets package has them: columns by name, and their types."""

    def __init__(self, count: int, label: str) -> None:
        colours = [(10 * n, 200 * (n % 2), 7) for n in range(count)]
        super().__init__(img=[Image.new("RGB", (16, 16), colour) for colour in colours])
        self[label] = [n % 2 for n in range(count)]
        kinds = [
            make_dataclass("Image", [("decode", bool, True)]),
            type("ClassLabel", (), {"names": ["cat", "dog"]}),
        ]
        self.features = dict(zip(self, (kind() for kind in kinds), strict=True))
        self.count = count

    def __len__(self) -> int:
        return self.count

    def cast_column(self, column: str, feature: object) -> FakeRows:
        assert column == "img"
        assert not feature.decode
        rows = copy.copy(self)
        rows["img"] = [stored(picture) for picture in self["img"]]
        return rows


def stored(picture: Image.Image | bytes | Path) -> dict[str, object]:
    """A picture as an undecoded row has it: bytes, or where they are."""
    if isinstance(picture, Path):
        return {"bytes": None, "path": str(picture)}
    if isinstance(picture, Image.Image):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        picture = stream.getvalue()
    return {"bytes": picture, "path": "0.png"}


def test_a_data_set_of_the_hub_is_read_by_its_column_types(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, revision=None):
        asked.append((name, revision))
        return {"train": FakeRows(20, "fine"), "validation": FakeRows(6, "fine")}

    package = types.ModuleType("datasets")
    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    splits = load_data("hf:org/pets@main", size=8)
    assert asked == [("org/pets", "main")]
    assert splits.train.classes == ("cat", "dog")
    assert splits.val.images[:, 0, 0, 0].tolist() == [180, 190]
    assert splits.test.images[:, :, 5, 5].tolist() == [[10 * n, 200 * (n % 2), 7] for n in range(6)]
    assert splits.test.labels.tolist() == [0, 1] * 3
    others = FakeRows(6, "fine")
    Image.new("RGB", (16, 16), (99, 9, 9)).save(tmp_path / "3.png")
    others["img"][3] = tmp_path / "3.png"
    package.load_dataset = lambda *_, **__: {"train": FakeRows(20, "fine"), "test": others}
    assert load_data("hf:org/pets", size=8).test.images[3, :, 0, 0].tolist() == [99, 9, 9]
    others["img"][3] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n"
    with pytest.raises(DataError, match=r"hf:org/pets holds an image that .* cannot identify"):
        load_data("hf:org/pets", size=8)
    package.load_dataset = lambda *_, **__: {"train": FakeRows(4, "fine")}
    with pytest.raises(DataError, match=r"hf:org/pets has the splits train"):
        load_data("hf:org/pets", size=8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"prunezoo\[hf\]"):
        load_data("hf:org/pets", size=8)


@pytest.mark.parametrize("label", [-1, None])
def test_a_test_split_without_labels_is_not_the_test_split(monkeypatch, label):
    test, validation = FakeRows(4, "label"), FakeRows(6, "label")
    test["label"][2] = label
    found = {"train": FakeRows(20, "label"), "test": test, "validation": validation}
    package = types.ModuleType("datasets")
    package.load_dataset = lambda *_, **__: found
    monkeypatch.setitem(sys.modules, "datasets", package)
    assert load_data("hf:org/challenge", size=8).test.labels.tolist() == validation["label"]
    del found["validation"]
    with pytest.raises(DataError, match=r"the splits train, test: .*test with labels, is missing"):
        load_data("hf:org/challenge", size=8)


@pytest.mark.parametrize("quality", [30, 75, 90])
def test_a_lossy_copy_says_so(tmp_path, quality):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(3):
                image = Image.new("RGB", (8, 8), (n, 100, 9))
                image.save(tmp_path / split / name / f"{n}.jpg", quality=quality)
    assert f"(JPEG q{quality})" in load_data(f"imagefolder:{tmp_path}", size=8).test.name


def test_some_classes_are_those_images_numbered_from_zero():
    whole, some = load_data("digits", size=8), load_data("digits[3:7]", size=8)
    assert some.num_classes == 4
    assert some.train.classes == whole.train.classes[3:7]
    for name in ("train", "val", "test"):
        all_images, images = getattr(whole, name), getattr(some, name)
        inside = (all_images.labels >= 3) & (all_images.labels < 7)
        assert torch.equal(images.images, all_images.images[inside])
        assert torch.equal(images.labels + 3, all_images.labels[inside])
    assert "classes 4 to 7 of 10" in some.test.name
    assert load_data("digits[:3]", size=8).num_classes == 3
    assert load_data("digits[7:]", size=8).digest not in (whole.digest, some.digest)


@pytest.mark.parametrize("name", ["digits[3:4]", "digits[11:]", "digits[5:2]"])
def test_fewer_than_two_classes_are_refused(name):
    with pytest.raises(DataError, match="of 10 classes"):
        load_data(name, size=8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:200]),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"something else" * 100),
        lambda file: np.save(file, np.zeros((3, 2), np.float32)),
        lambda file: np.savez(file.open("wb"), np.zeros(3)),
    ],
)
def test_a_damaged_cache_of_images_is_made_anew(damage, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "set" / split / label
            folder.mkdir(parents=True)
            for n in range(4):
                Image.new("RGB", (9, 9), (n, n, n)).save(folder / f"{n}.png")
    load = lambda: load_data(f"imagefolder:{tmp_path / 'set'}", size=8).train.images  # noqa: E731
    before = load()
    files = sorted((tmp_path / "cache" / "images").iterdir())
    kept = [file.read_bytes() for file in files]
    for file in files:
        damage(file)
    assert torch.equal(load(), before)
    assert [file.read_bytes() for file in files] == kept
    assert sorted((tmp_path / "cache" / "images").iterdir()) == files
