"""Images that are not square, from folder to batch: resampled, cached, cropped and moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import zoo
from zoo.data.batches import Augmentation, DeviceLoader
from zoo.data.images import ImageFiles, ImageSet
from zoo.data.rand_augment import OPERATIONS, rand_augmented
from zoo.errors import ZooError
from zoo.models import build_model


def test_pictures_are_resampled_by_area_to_both_sides(streets):
    splits = zoo.load_data(f"imagefolder:{streets}", size=(6, 10))
    assert splits.train.image_size == (6, 10)
    assert "at 6x10" in splits.train.name
    first = np.asarray(Image.open(streets / "train" / "left" / "0.png"), float)
    means = first.reshape(6, 2, 10, 4, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(splits.train.images[0].numpy() - means).max() <= 1
    whole = zoo.load_data(f"imagefolder:{streets}", size=(12, 40)).train.images[0]
    assert np.array_equal(whole.numpy(), first.transpose(2, 0, 1))


def test_sizes_of_one_area_are_cached_apart(streets):
    name = f"imagefolder:{streets}"
    shapes = [tuple(zoo.load_data(name, size=size).train.images.shape[2:])
              for size in ((4, 9), (9, 4), 6, (6, 6), (4, 9))]  # fmt: skip
    assert shapes == [(4, 9), (9, 4), (6, 6), (6, 6), (4, 9)]
    digests = {zoo.load_data(name, size=size).digest for size in ((4, 9), (9, 4), 6, (6, 6))}
    assert len(digests) == 3


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_files_give_the_batches_that_memory_gives(streets, monkeypatch, scale):
    name, size = f"imagefolder:{streets}", (12, 40)  # boxes of files are those of memory's
    resident = zoo.load_data(name, size=size).train
    monkeypatch.setattr("zoo.data.datasets.IN_MEMORY", 3 * 12 * 40 * 20 - 1)
    lazy = zoo.load_data(name, size=size).train
    assert isinstance(lazy, ImageFiles)
    assert (lazy.name, lazy.image_size) == (resident.name, size)
    augment = Augmentation(scale=scale, rand_augment=9 if scale == 1 else 0)
    loaders = [DeviceLoader(d, 7, augment=augment, shuffle=True, seed=2) for d in (resident, lazy)]
    for (images, labels), (others, same) in zip(*loaders, strict=True):
        assert images.shape[1:] == others.shape[1:] == (3, *size)
        assert torch.equal(labels, same)
        if scale == 1:
            assert torch.equal(images, others)


def test_crops_move_by_an_eighth_of_each_side():
    height, width, down, right = 16, 40, 2, 5
    pixels = torch.randint(0, 256, (300, 3, height, width), dtype=torch.uint8)
    told = (torch.arange(300), tuple(map(str, range(300))), (0.0,) * 3, (1.0,) * 3)
    data = ImageSet("noise", pixels, *told)
    seen = set()
    for images, labels in DeviceLoader(data, 100, augment=True, shuffle=True, seed=1):
        crops = (images * 255).round().to(torch.uint8).numpy()
        for crop, label in zip(crops, labels.tolist(), strict=True):
            edges = ((0, 0), (down, down), (right, right))
            padded = np.pad(pixels[label].numpy(), edges, "reflect")
            windows = np.lib.stride_tricks.sliding_window_view(padded, crop.shape)[0]
            found = [
                (top, left, mirrored)
                for mirrored in (False, True)
                for top, left in np.argwhere(
                    (windows == (crop[:, :, ::-1] if mirrored else crop)).all((2, 3, 4))
                ).tolist()
            ]
            assert len(found) == 1
            seen.update(found)
    assert {top for top, _, _ in seen} == set(range(2 * down + 1))
    assert {left for _, left, _ in seen} == set(range(2 * right + 1))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_translations_are_shares_of_the_side_that_they_are_along():
    tall = torch.randint(0, 256, (4, 3, 62, 31), dtype=torch.uint8)
    kinds = {name: 2 * n for n, name in enumerate(OPERATIONS)}
    nothing = torch.full((4,), kinds["Identity"])
    down, right = (
        rand_augmented(tall, 30, torch.stack([torch.full((4,), kinds[name]), nothing], dim=1))
        for name in ("TranslateY", "TranslateX")
    )
    rows, columns = int(62 * 150 / 331), int(31 * 150 / 331)
    assert torch.equal(down[:, :, rows:], tall[:, :, :-rows])
    assert torch.equal(right[..., columns:], tall[..., :-columns])


def test_named_data_is_of_the_networks_size(streets):
    """Of a network by name, and of a live one; square data would not even fit the latter."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.fc = nn.Linear(8 * 6 * 20, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).relu().flatten(1))

    name = f"imagefolder:{streets}"
    images = zoo.load_data(name, size=(6, 20))
    recipe = zoo.Recipe(epochs=1, batch_size=6)
    live = zoo.prune(Flat(), torch.zeros(1, 3, 6, 20), cf=2)
    by_name = zoo.load("resnet20-16", 2, build_model("resnet20-16", 2), profile="equal",
                       image_size=(6, 20))  # fmt: skip
    for model in (live, by_name):
        zoo.finetune(model, name, name, recipe=recipe, teacher=None, cpu=True)
        assert zoo.evaluate(model, name) == zoo.evaluate(model, images.test)


def test_digits_are_stretched():
    splits = zoo.load_data("digits[:2]", size=(8, 24))
    assert splits.val.images.shape[1:] == (3, 8, 24)
    assert "resized to 8x24" in splits.val.name
    with pytest.raises(ZooError, match="The width of size must be an integer"):
        zoo.load_data("digits", size=(8, 0))
