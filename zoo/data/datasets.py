"""Image sets by name or folder, and their splits with digests.

Every split follows one rule: the *validation* split is the last tenth of each class of the training
images, in file order, and no base network is trained on it; the *test* split is the data set's own
and serves the final evidence alone. Where a folder holds train/, val/ and test/, each is its split.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from zoo.common.cache import cache_folder
from zoo.common.documents import replacing
from zoo.common.sizes import Size, checked_size, resolution, sides
from zoo.data.images import (
    EXTENSIONS,
    AnyImages,
    ImageFiles,
    ImageSet,
    decode_all,
    opened,
    picture_files,
    readable,
)
from zoo.errors import DataError, first_line, unknown

__all__ = ["DATASETS", "IN_MEMORY", "AnyImages", "ImageSet", "Splits", "load_data"]

IN_MEMORY = 2**31
"""Bytes of decoded images per split; a larger folder is decoded from its files batch by batch."""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation per channel of ImageNet, on which most networks were trained."""

_DECODED = "upright, 16 bits scaled"
"""Version of the decoding in the cache's keys; change it when files decode to other pixels."""

VALIDATION_SHARE = 0.1
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Splits:
    """The three splits of one data set; `digest` is the validation split's."""

    train: AnyImages
    val: AnyImages
    test: AnyImages

    @property
    def digest(self) -> str:
        return self.val.digest()

    @property
    def num_classes(self) -> int:
        return len(self.train.classes)


def _digits(root: Path | None, size: Size) -> Splits:
    del root
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "The digits data needs scikit-learn: pip install 'prunezoo[digits]'."
        ) from None
    bunch = load_digits()
    grey = torch.from_numpy(np.asarray(bunch.images)).float()[:, None] / 16
    images = functional.interpolate(grey, size=sides(size), mode="bilinear", align_corners=False)
    images = (images * 255).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(np.asarray(bunch.target)).long()
    whole = ImageSet(
        f"scikit-learn's handwritten digits (8x8, resized to {resolution(size)})",
        images.contiguous(),
        labels,
        tuple(str(digit) for digit in range(10)),
        (0.305, 0.305, 0.305),
        (0.35, 0.35, 0.35),
        flip=False,
    )
    rest, test = _hold_out(whole, 0.2)
    return Splits(*_hold_out(rest, VALIDATION_SHARE), test)


def _hold_out(data: AnyImages, share: float) -> tuple[AnyImages, AnyImages]:
    """`data` without the last `share` of each class, and that share alone, in order."""
    held = torch.zeros(len(data), dtype=torch.bool)
    for label in range(len(data.classes)):
        members = (data.labels == label).nonzero().flatten()
        if len(members):
            held[members[-max(1, round(share * len(members))) :]] = True
    return data.subset((~held).nonzero().flatten()), data.subset(held.nonzero().flatten())


def _folder_set(folder: Path, size: Size | None) -> AnyImages:
    """One ImageFolder tree: its files if large, else decoded images, cached if that is possible."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    folders = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    classes = sorted(name for name in folders if not name.startswith("."))  # .ipynb_checkpoints
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = picture_files(folder / name)
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise DataError(
            f"{folder} holds no <class>/<image> files ({', '.join(sorted(EXTENSIONS))})."
        )
    described = (torch.tensor(labels), tuple(classes), *IMAGENET)
    if size is not None and 3 * math.prod(sides(size)) * len(paths) > IN_MEMORY:
        return ImageFiles(folder.name, tuple(paths), size, *described)
    try:
        facts = [(path, path.stat()) for path in paths]
    except OSError as error:
        raise DataError(f"{folder} holds a file that cannot be read: {error}.") from None
    stamp = "\n".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in facts)
    stamp += f"\n{size}\n{_DECODED}"
    cached = cache_folder() / "images" / f"{hashlib.sha256(stamp.encode()).hexdigest()[:24]}.npy"
    images = _read_cached(cached, len(paths))
    if images is None:
        images = decode_all(paths, size)
        with suppress(OSError), replacing(cached) as partial:
            np.save(partial, images)
    return ImageSet(folder.name, torch.from_numpy(np.ascontiguousarray(images)), *described)


def _read_cached(path: Path, count: int) -> np.ndarray | None:
    """The `count` decoded images in a cache file; None if it is missing or damaged.

    A truncated or foreign file is recognised by its length and header; wrong values of the right
    number are not.
    """
    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4
    return images if whole and len(images) == count else None


def _image_folder(root: Path | None, size: Size | None, name: str | None = None) -> Splits:
    if root is None:
        raise DataError(f"{name or 'imagefolder'} needs the folder that holds train/ and val/.")
    for base in (root, root / (name or "").lower().replace("-", "")):
        if (base / "train").is_dir():
            break
    else:
        raise DataError(f"{root} has no train/ folder of <class>/<image> files.")
    # a folder of pictures without folders of classes, as test/ of ImageNet, holds no labels
    held = [part for part in ("val", "test") if any((base / part).glob("[!.]*/"))]
    if not held:
        raise DataError(f"{base} has neither a val/ nor a test/ folder of classes beside train/.")
    whole, *others = (_folder_set(base / part, size) for part in ("train", *held))
    for part, other in zip(held, others, strict=True):
        if whole.classes != other.classes:
            raise DataError(f"{base}/train and {base}/{part} do not hold the same classes.")
    encoding = _encoding(base / "train", whole.classes)
    title = f"{name or base.name}{encoding} at {resolution(whole.image_size)}"
    whole, *others = (replace(each, name=title) for each in (whole, *others))
    if len(others) == 1:
        return Splits(*_hold_out(whole, VALIDATION_SHARE), *others)
    return Splits(whole, *others)


def _encoding(train: Path, classes: Iterable[str]) -> str:
    """` (JPEG q<quality>)` if the first training image is a JPEG file, to show a lossy copy.

    The quality follows from the largest luminance quantisation step: 121 at quality 50 in standard
    tables.
    """
    first = next(path for name in classes for path in picture_files(train / name))
    with readable(first), opened(first) as image:
        tables = getattr(image, "quantization", None)
    if not tables:
        return ""
    scale = 100 * max(tables[0]) / 121
    return f" (JPEG q{round(100 - scale / 2 if scale <= 100 else 5000 / scale)})"


def _cifar10(root: Path | None, size: Size) -> Splits:
    return _cifar("CIFAR-10", root, size, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))


def _cifar100(root: Path | None, size: Size) -> Splits:
    return _cifar("CIFAR-100", root, size, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def _cifar(name: str, root: Path | None, size: Size, mean: Channels, std: Channels) -> Splits:
    splits = _image_folder(root, None if size == 32 else size, name)
    classes = int(name.removeprefix("CIFAR-"))
    if splits.num_classes != classes:
        raise DataError(f"{root} holds {splits.num_classes} classes; {name} has {classes}.")
    parts = (splits.train, splits.val, splits.test)
    return Splits(*(replace(part, mean=mean, std=std) for part in parts))


def _hub_set(reference: str, size: Size) -> Splits:
    """An image classification data set of the Hub; its columns are found by their types."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("hf: needs the datasets package: pip install 'prunezoo[hf]'.") from None
    name, _, revision = reference.partition("@")
    try:
        found = load_dataset(name, revision=revision or None)
    except Exception as error:  # the library's errors share no base class
        reason = first_line(error)
        raise DataError(f"hf:{reference} cannot be read from the Hub: {reason}") from error
    others = (part for part in ("test", "validation", "valid", "val") if part in found)
    held = next((part for part in others if _labelled(found[part])), None)
    if "train" not in found or held is None:
        raise DataError(
            f"hf:{reference} has the splits {', '.join(found)}: train, or test with labels, is "
            "missing."
        )
    whole, test = (_hub_split(f"hf:{reference}", found[part], size) for part in ("train", held))
    return Splits(*_hold_out(whole, VALIDATION_SHARE), test)


def _columns(rows: Any) -> dict[str, str]:
    """The first column of each type, by the name of the type."""
    columns: dict[str, str] = {}
    for column, feature in rows.features.items():
        columns.setdefault(type(feature).__name__, column)
    return columns


def _labelled(rows: Any) -> bool:
    """Whether no label is -1 or None, as those of a challenge's test split are."""
    column = _columns(rows).get("ClassLabel")
    return column is None or all(label is not None and label >= 0 for label in rows[column])


def _hub_split(name: str, rows: Any, size: Size) -> ImageSet:
    columns = _columns(rows)
    if not {"Image", "ClassLabel"} <= set(columns):
        raise DataError(f"{name} has no column of images, or none of class labels: {rows.features}")
    if 3 * math.prod(sides(size)) * len(rows) > IN_MEMORY:
        raise DataError(
            f"{name} has {len(rows):,} images, more than fit in memory at {resolution(size)}: "
            "choose a smaller size, or save it as folders of images."
        )
    image = columns["Image"]
    # undecoded, because the library lets Pillow open every format
    rows = rows.cast_column(image, replace(rows.features[image], decode=False))
    files = (
        Path(each["path"]) if each["bytes"] is None else io.BytesIO(each["bytes"])
        for each in rows[image]
    )
    try:
        images = decode_all(files, size)
    except DataError as error:
        raise DataError(f"{name} holds an image that cannot be read: {error}") from None
    label = columns["ClassLabel"]
    return ImageSet(
        f"{name} at {resolution(size)}",
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.tensor(list(rows[label])),
        tuple(rows.features[label].names),
        *IMAGENET,
    )


def _some_classes(data: AnyImages, chosen: slice, name: str) -> AnyImages:
    """The images of the `chosen` classes, renumbered from 0."""
    classes = range(len(data.classes))[chosen]
    if len(classes) < 2 or (chosen.stop or 0) > len(data.classes):
        count = len(data.classes)
        raise DataError(
            f"{name} selects {len(classes)} of {count} classes: choose at least 2, up to {count}."
        )
    inside = (data.labels >= classes[0]) & (data.labels <= classes[-1])
    part = data.subset(inside.nonzero().flatten())
    title = f"{data.name}, classes {classes[0] + 1} to {classes[-1] + 1} of {len(data.classes)}"
    return replace(part, name=title, labels=part.labels - classes[0], classes=data.classes[chosen])


_CLASSES = re.compile(r"\[(\d*):(\d*)\]$")
DATASETS = {"digits": _digits, "cifar10": _cifar10, "cifar100": _cifar100}


def load_data(name: str, root: str | Path | None = None, *, size: Size = 32) -> Splits:
    """The train, validation and test splits of a data set, as images of `size` pixels.

    Args:
        name: `digits` (needs no files), `cifar10` and `cifar100` (`root` holds train/ and val/ or
            test/ ImageFolder trees, or a cifar10/ folder that does), `imagefolder:PATH`, or
            `hf:ORG/NAME[@REVISION]`. Of val/ and test/, one alone is the test split, and the
            validation images are taken from train/; with both, each is its own split. A slice
            selects some of the classes, in order, as in `imagefolder:PATH[:50]` or `cifar10[5:]`. A
            folder's images are decoded into memory up to `IN_MEMORY` bytes per split, and beyond
            that batch by batch.
        root: folder of the files.
        size: pixels per side, or (height, width); images of other sizes are resampled by area,
            without keeping proportions.

    Pictures of every mode become 8-bit RGB, as `zoo.data.images.to_rgb` describes.

    Raises:
        DataError: for an unknown name, missing or unreadable files, pictures whose value range is
            unknown, or a slice of fewer than two classes.
    """
    if not isinstance(name, str) or not isinstance(root, str | Path | None):
        raise DataError(
            f"A data set is named by a string, its folder by a path; got {name!r} and {root!r}."
        )
    size = checked_size("size", size)
    chosen = _CLASSES.search(name)
    if chosen:
        splits = load_data(name[: chosen.start()], root, size=size)
        first, last = (int(text) if text else None for text in chosen.groups())
        parts = (splits.train, splits.val, splits.test)
        return Splits(*(_some_classes(part, slice(first, last), name) for part in parts))
    folder = Path(root).expanduser() if root is not None else None
    kind, _, path = name.partition(":")
    if kind == "imagefolder" and path:
        return _image_folder(Path(path).expanduser(), size)
    if kind == "hf" and path:
        return _hub_set(path, size)
    if name not in DATASETS:
        raise unknown("data set", name, [*DATASETS, "imagefolder:PATH", "hf:ORG/NAME"], DataError)
    return DATASETS[name](folder, size)
