"""Images with labels: decoded in memory, or read from their files when they are asked for."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from zoo.common.sizes import Size, checked_size, sides
from zoo.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EXTENSIONS", "AnyImages", "ImageFiles", "ImageSet", "decode_all",
           "open_picture", "opened", "picture_files", "readable", "sent", "to_rgb"]  # fmt: skip


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`, copied without waiting for CUDA."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@functools.lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` as (1, 3, 1, 1); cached, because waiting for a copy at every batch takes time."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


class _Images(Dataset[Any]):
    """Base of `ImageSet` and `ImageFiles`: a Dataset of (normalised float image, label).

    Attributes:
        name: used in reports, with resolution and encoding.
        labels: int64, (N,).
        classes: names, in label order.
        mean, std: per channel, on the 0-1 scale; what `normalise` subtracts and divides by.
        flip: whether a mirrored image keeps its class.
    """

    name: str
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        count, classes = f"{len(self):,} images", f"{len(self.classes)} classes"
        return f"{type(self).__name__}({self.name!r}, {count}, {classes})"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalise(self.gather(torch.tensor([index])))[0], int(self.labels[index])

    def gather(self, indices: Tensor, boxes: Tensor | None = None) -> Tensor:
        """The pixels of the images at `indices` (N,): uint8, (N, 3, H, W).

        Args:
            boxes: (N, 4), the crop of each image, resized bilinearly: left, top, right and bottom
                as shares of its sides.
        """
        raise NotImplementedError

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, H, W) as normalised float32."""
        mean, std = (_per_channel(values, images.device) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


def _zoomed(images: Tensor, boxes: Tensor) -> Tensor:
    """Crops `boxes` (N, 4) of uint8 images (N, 3, H, W), resized to the size of the images."""
    left, top, right, bottom = (2 * boxes - 1).unbind(1)  # -1 and 1 are the outer edges
    none = torch.zeros_like(left)
    across = torch.stack([(right - left) / 2, none, (right + left) / 2], dim=1)
    down = torch.stack([none, (bottom - top) / 2, (bottom + top) / 2], dim=1)
    grid = functional.affine_grid(
        torch.stack([across, down], dim=1), list(images.shape), align_corners=False
    )
    pixels = functional.grid_sample(
        images.float(), grid, padding_mode="border", align_corners=False
    )
    return pixels.round().to(torch.uint8)


@dataclass(frozen=True, repr=False)
class ImageSet(_Images):
    """Images in memory, all of one size.

    Attributes:
        images: uint8, (N, 3, H, W).
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool = True

    @property
    def image_size(self) -> Size:
        """Pixels per side, or (height, width)."""
        return checked_size("image_size", self.images.shape[2:])

    def gather(self, indices: Tensor, boxes: Tensor | None = None) -> Tensor:
        images = self.images[indices.to(self.images.device)]
        return images if boxes is None else _zoomed(images, boxes.to(images.device))

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def digest(self) -> str:
        """sha256 over shape, pixels and labels: the same split always has the same digest."""
        state = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        state.update(self.images.cpu().contiguous().numpy().tobytes())
        state.update(self.labels.cpu().numpy().tobytes())
        return state.hexdigest()


@dataclass(frozen=True, repr=False)
class ImageFiles(_Images):
    """Image files too many to hold in memory, decoded one by one.

    Attributes:
        paths: of the files.
        image_size: pixels per side, or (height, width), that they are resampled to, by area.
    """

    name: str
    paths: tuple[Path, ...]
    image_size: Size
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool = True

    def gather(self, indices: Tensor, boxes: Tensor | None = None) -> Tensor:
        own = [None] * len(indices) if boxes is None else boxes.tolist()
        images = [
            decode(self.paths[index], self.image_size, box)
            for index, box in zip(indices.tolist(), own, strict=True)
        ]
        return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())

    def subset(self, indices: Tensor) -> ImageFiles:
        """The images at `indices`, in that order."""
        paths = tuple(self.paths[index] for index in indices.tolist())
        return replace(self, paths=paths, labels=self.labels[indices])

    def digest(self) -> str:
        """sha256 over the image size and each file's class, name, length and label, not pixels."""
        state = hashlib.sha256(repr(self.image_size).encode())
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            row = (path.parent.name, path.name, path.stat().st_size, label)
            state.update(repr(row).encode())
        return state.hexdigest()


UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error)
"""What Pillow's decoders raise for damaged or mislabelled files."""

EXTENSIONS = {
    ".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
"""Suffixes of the files that are read as pictures."""

FORMATS = "AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"
"""What a picture may be, whatever its suffix; of Pillow's others, one runs Ghostscript."""


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders, without hidden ones, sorted."""

    def shown(path: Path) -> bool:
        return not any(part.startswith(".") for part in path.relative_to(folder).parts)

    named = (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    return sorted(path for path in named if shown(path) and not path.is_dir())


@contextmanager
def readable(name: object) -> Iterator[None]:
    """Turn what Pillow raises in the block into a `DataError` that names the picture."""
    from PIL import Image

    try:
        yield
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        reason = re.sub(r" <[^>]* object at 0x\w+>", "", str(error))
        raise DataError(f"{name} cannot be read as an image: {reason}.") from None


def opened(source: Path | BinaryIO) -> Image:
    """A picture of one of the `FORMATS` that this Pillow has, not decoded yet."""
    from PIL import Image

    Image.init()
    return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


def open_picture(source: Path | BinaryIO) -> Image:
    """The picture in a file, or at the position of an open one, converted by `to_rgb`.

    Raises:
        DataError: if it cannot be read, and as `to_rgb`.
    """
    with readable(source if isinstance(source, Path) else "The picture"), opened(source) as picture:
        return to_rgb(picture)


def to_rgb(picture: Image) -> Image:
    """An upright 8-bit RGB copy of `picture`, with which training and inference begin.

    16-bit grey (12-bit in TIFFs that say so) is scaled from the range of its type to 0..255, floats
    from 0..1. Of 16-bit colour, Pillow reads the upper 8 bits. Transparency is dropped: a pixel
    keeps its stored colour whatever its alpha, as in torchvision. Palettes, CMYK and the like are
    converted by Pillow. An EXIF orientation is applied, as in viewers and the datasets package; an
    unreadable one is ignored. Of several frames, the first is taken.

    Raises:
        DataError: if it cannot be read, or its values have no known range: 32-bit integers, or
            floats of which some are outside 0..1.
    """
    from PIL import ImageOps

    name = getattr(picture, "filename", "") or "The picture"
    with readable(name):
        picture.load()
        if picture.mode.startswith(("I", "F")):
            pixels = _scaled(picture, name)
        elif picture.mode in _INTERMEDIATE:
            pixels = picture.convert(_INTERMEDIATE[picture.mode]).convert("RGB")
        else:
            pixels = picture.convert("RGB")
    with suppress(*UNREADABLE):
        ImageOps.exif_transpose(pixels, in_place=True)
    return pixels


_INTERMEDIATE = {"P": "RGBA", "La": "LA"}
"""Mode -> mode to convert to before RGB: directly, Pillow cannot, or it warns."""

_BITS, _PHOTOMETRIC = 258, 262
"""The TIFF tags of the bits per sample, and of whether white is 0 or the largest value."""


def _scaled(picture: Image, name: str) -> Image:
    """A one-channel picture of more than 8 bits as 8-bit RGB; its orientation tag is kept."""
    from PIL import Image

    values = np.asarray(picture)
    tags = getattr(picture, "tag_v2", {})
    if picture.mode == "F":
        low, high, white = values.min(), values.max(), 1
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise DataError(
                f"{name} holds floats from {low:g} to {high:g}, and which values are black and "
                "white is unknown: scale them to 0..1, or save it in 8 or 16 bits."
            )
    elif picture.mode.startswith("I;16"):
        white = 2 ** tags.get(_BITS, (16,))[0] - 1
    elif picture.format in ("PNG", "PPM"):  # 16 bits, which Pillow may widen
        white = 65535
    else:
        raise DataError(
            f"{name} holds integers of 32 bits, and which values are black and white is unknown: "
            "save it in 8 or 16 bits."
        )
    shares = values / np.float32(white)
    if tags.get(_PHOTOMETRIC) == 0:
        shares = 1 - shares
    pixels = Image.fromarray((255 * shares).round().astype(np.uint8)).convert("RGB")
    pixels.info = {key: value for key, value in picture.info.items() if key != "transparency"}
    return pixels


def decode(
    source: Path | BinaryIO | Image, size: Size | None, box: Sequence[float] | None = None
) -> np.ndarray:
    """One image, a file's or decoded already, as uint8 (H, W, 3).

    Args:
        size: of the result; None for the image's own.
        box: the crop, as in `gather`; None for the whole image, resampled by area.

    Raises:
        DataError: as `open_picture`, naming the file.
    """
    from PIL import Image

    pixels = to_rgb(source) if isinstance(source, Image.Image) else open_picture(source)
    wanted = pixels.size if size is None else sides(size)[::-1]
    if box is not None:
        (left, top, right, bottom), (width, height) = box, pixels.size
        corners = left * width, top * height, right * width, bottom * height
        pixels = pixels.resize(wanted, Image.Resampling.BILINEAR, corners)
    elif pixels.size != wanted:
        pixels = pixels.resize(wanted, Image.Resampling.BOX)
    return np.asarray(pixels)


def decode_all(images: Iterable[Path | BinaryIO | Image], size: Size | None) -> np.ndarray:
    """Images as uint8 (N, 3, H, W), decoded in threads.

    Raises:
        DataError: if one cannot be read, or they differ in size and none is given.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        arrays = list(pool.map(lambda image: decode(image, size), images))
    if len({array.shape for array in arrays}) > 1:
        raise DataError(f"The {len(arrays):,} images differ in size; pass size=.")
    return np.stack(arrays).transpose(0, 3, 1, 2)


AnyImages = ImageSet | ImageFiles
