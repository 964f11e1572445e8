"""Batches: every image once, in the order of the seed, cropped and mirrored as they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.batches import Augmentation, DeviceLoader, _boxes
from zoo.data.datasets import ImageSet, load_data
from zoo.data.images import ImageFiles, decode
from zoo.errors import DataError


def numbered(count: int, size: int = 8, flip: bool = True) -> ImageSet:
    """Random images whose label is their own number."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator).to(torch.uint8)
    names = tuple(str(n) for n in range(count))
    return ImageSet("numbered", images, torch.arange(count), names, (0.5,) * 3, (0.25,) * 3, flip)


def seen(loader: DeviceLoader) -> list[int]:
    return [label for _, labels in loader for label in labels.tolist()]


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


@pytest.mark.gpu
def test_a_loader_gives_the_same_batches_on_a_cuda_device():
    data = numbered(32)
    options = {"augment": True, "shuffle": True, "seed": 1}
    cpu, cuda = DeviceLoader(data, 8, **options), DeviceLoader(data, 8, device="cuda", **options)
    for (images, labels), (same, same_labels) in zip(cpu, cuda, strict=True):
        assert same.is_cuda
        assert torch.allclose(images, same.cpu(), atol=1e-6)
        assert torch.equal(labels, same_labels.cpu())


def test_a_box_is_taken_at_the_images_own_size_where_none_is_asked_for():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).repeat(3).reshape(8, 8, 3))
    found = decode(image, None, (0.0, 0.5, 0.5, 1.0))
    assert found.shape == (8, 8, 3)
    left_below = np.asarray(image)[4:, :4]
    assert np.abs(found.astype(int)[::2, ::2] - left_below).max() <= 2
