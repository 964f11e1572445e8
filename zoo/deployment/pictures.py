"""Turn pictures (PIL images, folders of files) into the normalised arrays that a file takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoo.data.images import open_picture, picture_files, to_rgb
from zoo.deployment.metadata import Metadata
from zoo.errors import DataError, ExportError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["find_pictures", "open_picture", "to_array"]

_MODES = {1: "L", 3: "RGB"}
"""PIL's modes by number of channels."""


def to_array(picture: Image, metadata: Metadata, name: str) -> np.ndarray:
    """`picture` as the file `name` takes it, float32 (C, H, W), according to its metadata.

    It is resized as in `zoo.load_data`: to the size of the export, without keeping proportions.

    Raises:
        DataError: as `zoo.data.images.to_rgb`.
        ExportError: if the file does not say its images' shape, mean and std.
    """
    from PIL import Image

    shape, mean, std = metadata.image_shape, metadata.mean, metadata.std
    known = len(shape) == 3 and shape[0] in _MODES
    if not known or not (metadata.folded or len(mean) == len(std) == shape[0]):
        raise ExportError(
            f"{name} does not say how pictures become its images: export it with inputs= that have "
            f"a mean and std, or give these in ExportOptions; or pass arrays."
        )
    channels, height, width = shape
    pixels = to_rgb(picture).convert(_MODES[channels])
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.BOX)
    array = np.asarray(pixels, np.float32).reshape(height, width, channels) / 255
    if not metadata.folded:
        array = (array - np.array(mean, np.float32)) / np.array(std, np.float32)
    return array.transpose(2, 0, 1)


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders, in order of name.

    Raises:
        DataError: if there are none.
    """
    found = picture_files(folder)
    if not found:
        what = "holds no pictures" if folder.is_dir() else "is not a folder"
        raise DataError(f"{folder} {what}.")
    return found
