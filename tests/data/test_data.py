from __future__ import annotations

import io
import os
import struct
import sys
import types
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from zoo.data.batches import Augmentation, DeviceLoader, _boxes
from zoo.data.datasets import ImageSet, load_data
from zoo.data.images import ImageFiles
from zoo.errors import DataError


def numbered(count: int, size: int = 8, flip: bool = True) -> ImageSet:
    """Random images whose label is their own number."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator).to(torch.uint8)
    names = tuple(str(n) for n in range(count))
    return ImageSet("numbered", images, torch.arange(count), names, (0.5,) * 3, (0.25,) * 3, flip)


def seen(loader: DeviceLoader) -> list[int]:
    return [label for _, labels in loader for label in labels.tolist()]


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
    def stumble(*_: object) -> None:
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


def test_images_are_normalised_with_their_own_mean_and_std():
    data = numbered(4)
    image, label = data[2]
    assert label == 2
    assert torch.allclose(image, (data.images[2].float() / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_image_comes_exactly_once_per_pass(shuffle):
    loader = DeviceLoader(numbered(53), 8, shuffle=shuffle)
    assert len(loader) == 7
    for _ in range(2):
        assert sorted(seen(loader)) == list(range(53))


def test_drop_last_gives_full_batches_only():
    batches = [len(labels) for _, labels in DeviceLoader(numbered(53), 8, drop_last=True)]
    assert batches == [8] * 6


def test_two_ranks_have_disjoint_shares_of_equal_size():
    shares = [
        seen(DeviceLoader(numbered(53), 8, shuffle=True, seed=5, rank=rank, world_size=2))
        for rank in range(2)
    ]
    assert [len(share) for share in shares] == [26, 26]
    assert not set(shares[0]) & set(shares[1])


def test_the_same_seed_gives_the_same_batches_pass_by_pass():
    first, again, other = (
        DeviceLoader(numbered(32), 8, shuffle=True, augment=True, seed=seed) for seed in (2, 2, 3)
    )
    passes = []
    for _ in range(2):
        one, two = list(first), list(again)
        for (images, labels), (same_images, same_labels) in zip(one, two, strict=True):
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)
        passes.append(torch.cat([labels for _, labels in one]))
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0], torch.cat([labels for _, labels in other]))


def test_loading_leaves_the_callers_random_state_alone():
    before = torch.random.get_rng_state()
    list(DeviceLoader(numbered(32), 8, shuffle=True, augment=True))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("size", [8, 16])
def test_augmentation_is_a_crop_of_the_reflected_image_mirrored_or_not(flip, size):
    """Every augmented image equals one of the naive per-image crops; all kinds of crops occur."""
    data = numbered(40, size, flip)
    pad = size // 8
    chosen = []
    for images, labels in DeviceLoader(data, 16, augment=True, shuffle=True, seed=1):
        pixels = ((images * 0.25 + 0.5) * 255).round().to(torch.uint8)
        for image, label in zip(pixels, labels.tolist(), strict=True):
            padded = np.pad(data.images[label].numpy(), ((0, 0), (pad, pad), (pad, pad)), "reflect")
            matches = [
                (top, left, mirrored)
                for top in range(2 * pad + 1)
                for left in range(2 * pad + 1)
                for mirrored in (False, True)
                if np.array_equal(_crop(padded, top, left, size, mirrored), image.numpy())
            ]
            assert len(matches) == 1
            chosen += matches
    assert len(chosen) == 40
    assert {top for top, _, _ in chosen} == set(range(2 * pad + 1))
    assert {left for _, left, _ in chosen} == set(range(2 * pad + 1))
    assert {mirrored for _, _, mirrored in chosen} == ({False, True} if flip else {False})


def _crop(padded: np.ndarray, top: int, left: int, size: int, mirrored: bool) -> np.ndarray:
    crop = padded[:, top : top + size, left : left + size]
    return crop[:, :, ::-1] if mirrored else crop


def quartered(kind: str, folder: Path) -> ImageSet | ImageFiles:
    """Images of four colours, 10, 60, 120 and 180 from left to right and down, 64 pixels wide."""
    pixels = torch.zeros(200, 3, 64, 64, dtype=torch.uint8)
    for number, colour in enumerate((10, 60, 120, 180)):
        row, column = divmod(number, 2)
        pixels[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = colour
    told = (torch.arange(200), tuple(map(str, range(200))), (0.0,) * 3, (1.0,) * 3)
    if kind == "memory":
        return ImageSet("quartered", pixels, *told)
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(folder / "one.png")
    return ImageFiles("quartered", (folder / "one.png",) * 200, 16, *told)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_boxes_are_what_is_taken_of_the_images(kind, tmp_path):
    data = quartered(kind, tmp_path)
    boxes = torch.tensor([[0.1, 0.2, 0.4, 0.4], [0.6, 0.1, 0.9, 0.2], [0.0, 0.6, 1.0, 1.0]])
    first, second, lower = data.gather(torch.arange(3), boxes)
    assert (first == 10).all()
    assert (second == 60).all()
    half = data.image_size // 2
    assert (lower[:, :, : half - 2] == 120).all()
    assert (lower[:, :, half + 2 :] == 180).all()
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    if isinstance(data, ImageSet):
        assert torch.equal(data.gather(torch.tensor([0]), whole), data.images[:1])


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_resized_crops_take_shares_of_the_image_everywhere(kind, tmp_path):
    """By the colours at the edges and corners: how much is seen, where, and mirrored or not."""
    data = quartered(kind, tmp_path)
    loader = DeviceLoader(data, 50, augment=Augmentation(scale=0.08), shuffle=True, seed=3)
    images = torch.cat([(batch * 255).round() for batch, _ in loader])[:, 0]
    size = data.image_size
    mirrored = images[:, 0, 0] > images[:, 0, -1]  # where both columns of quarters are seen
    plain = images[:, 0, 0] < images[:, 0, -1]
    assert mirrored.sum() > 40
    assert plain.sum() > 40
    rows = images[:, :, 0] < 110  # of the upper quarters
    upper = rows.sum(1)
    assert len(upper.unique()) > size // 3
    wholes = (upper == 0).sum() + (upper == size).sum()  # crops that lie in one half
    assert 10 < wholes < 100
    again = DeviceLoader(data, 50, augment=Augmentation(scale=0.08), shuffle=True, seed=3)
    assert torch.equal(torch.cat([(batch * 255).round() for batch, _ in again])[:, 0], images)


def test_random_boxes_lie_in_the_image_and_have_the_area_and_form_they_should():
    boxes = _boxes(20_000, 0.25, torch.Generator().manual_seed(0))
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    free = (width < 0.999) & (height < 0.999)  # others were cut to fit
    area, form = width * height, width / height
    assert 0.2499 < area.min() < 0.26
    assert area.max() > 0.95
    assert 0.749 < form[free].min() < 0.77
    assert 1.30 < form[free].max() < 1.334
    assert (form < 1).float().mean() == pytest.approx(0.5, abs=0.02)
    slack = boxes[free, 0] / (1 - width[free])
    assert torch.histc(slack, 4, 0, 1).min() > 0.2 * free.sum()


@pytest.mark.parametrize("augment", [{}, {"rand_augment": 9}, {"scale": 0.3}])
def test_processes_and_batches_share_a_step_without_changing_it(augment):
    """One batch of 24; three of 8; two processes of two batches of 6: images and crops alike."""
    augment = Augmentation(**augment)
    options = {"augment": augment, "shuffle": True, "drop_last": True, "seed": 4}
    whole = list(DeviceLoader(numbered(50), 24, **options))
    thirds = list(DeviceLoader(numbered(50), 8, accumulate=3, **options))
    shares = [
        list(DeviceLoader(numbered(50), 6, accumulate=2, rank=rank, world_size=2, **options))
        for rank in (0, 1)
    ]
    taken = [batch for step in zip(*shares, strict=True) for batch in step]
    for batches in (thirds, taken):
        for part in (0, 1):
            mine = torch.cat([batch[part] for batch in batches])
            wanted = torch.cat([batch[part] for batch in whole])
            assert torch.equal(mine[: len(wanted)], wanted)


def test_files_that_do_not_fit_in_memory_give_the_same_batches(image_tree, monkeypatch):
    resident = load_data(f"imagefolder:{image_tree}", size=8)
    monkeypatch.setattr("zoo.data.datasets.IN_MEMORY", 3 * 8 * 8 * 19)
    lazy = load_data(f"imagefolder:{image_tree}", size=8)  # 20 training images, 6 for the test
    assert isinstance(lazy.train, ImageFiles)
    assert not isinstance(lazy.test, ImageFiles)
    assert lazy.train.name == resident.train.name
    augment = Augmentation(rand_augment=9)
    before = torch.random.get_rng_state()
    loaders = [
        DeviceLoader(splits.train, 7, augment=augment, shuffle=True, seed=2)
        for splits in (resident, lazy)
    ]
    for _ in range(2):
        for (images, labels), (same, same_labels) in zip(*loaders, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(labels, same_labels)
    assert torch.equal(torch.random.get_rng_state(), before)
    for index in range(2):
        assert torch.equal(lazy.val[index][0], resident.val[index][0])
        assert lazy.val[index][1] == resident.val[index][1]
    assert lazy.digest == load_data(f"imagefolder:{image_tree}", size=8).digest != resident.digest


def test_a_corrupt_file_is_named_by_the_worker_that_meets_it(image_tree, monkeypatch):
    monkeypatch.setattr("zoo.data.datasets.IN_MEMORY", 0)
    (image_tree / "train" / "dog" / "03.png").write_bytes(b"not an image")
    loader = DeviceLoader(load_data(f"imagefolder:{image_tree}", size=8).train, 4)
    with pytest.raises(DataError, match=r"^\S+dog/03\.png cannot be read as an image: [^\n]*$"):
        list(loader)


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
        kinds = [type("Image", (), {}), type("ClassLabel", (), {"names": ["cat", "dog"]})]
        self.features = dict(zip(self, (kind() for kind in kinds), strict=True))
        self.count = count

    def __len__(self) -> int:
        return self.count


class Undecodable:
    """A column whose images the datasets package cannot decode."""

    def __iter__(self):
        yield Image.new("RGB", (16, 16))
        raise UnidentifiedImageError("cannot identify image file")


def test_a_data_set_of_the_hub_is_read_by_its_column_types(monkeypatch):
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
    broken = FakeRows(6, "fine")
    broken["img"] = Undecodable()
    package.load_dataset = lambda *_, **__: {"train": FakeRows(20, "fine"), "test": broken}
    with pytest.raises(DataError, match=r"hf:org/pets holds an image that cannot be read: cannot"):
        load_data("hf:org/pets", size=8)
    package.load_dataset = lambda *_, **__: {"train": FakeRows(4, "fine")}
    with pytest.raises(DataError, match=r"hf:org/pets has the splits train"):
        load_data("hf:org/pets", size=8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"prunezoo\[hf\]"):
        load_data("hf:org/pets", size=8)


@pytest.mark.gpu
def test_a_loader_gives_the_same_batches_on_a_cuda_device():
    data = numbered(32)
    options = {"augment": True, "shuffle": True, "seed": 1}
    cpu, cuda = DeviceLoader(data, 8, **options), DeviceLoader(data, 8, device="cuda", **options)
    for (images, labels), (same, same_labels) in zip(cpu, cuda, strict=True):
        assert same.is_cuda
        assert torch.allclose(images, same.cpu(), atol=1e-6)
        assert torch.equal(labels, same_labels.cpu())


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
