"""Image sets by name or folder, and their splits with digests.

Every split follows one rule: the *validation* split is the last tenth of each class of the training
images, in file order, and no base network is trained on it; the *test* split is the data set's own
and serves the final evidence alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import DataError, unknown

__all__ = ["DATASETS", "ImageSet", "Splits", "load_data"]

VALIDATION_SHARE = 0.1
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}


@dataclass(frozen=True)
class ImageSet(torch.utils.data.Dataset):
    """Images and labels in memory: a torch Dataset of (normalised float image, label).

    Attributes:
        name: what reports call it, with its resolution and encoding.
        images: uint8, (N, 3, S, S).
        labels: int64, (N,).
        classes: names, in label order.
        mean, std: per channel, on the 0-1 scale; what `normalise` subtracts and divides by.
        flip: whether a mirrored image keeps its class.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalise(self.images[index][None])[0], int(self.labels[index])

    @property
    def image_size(self) -> int:
        """Pixels per side."""
        return self.images.shape[-1]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, S, S) as normalised float32."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        return (images.float() / 255 - mean) / std

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def digest(self) -> str:
        """sha256 over shape, pixels and labels: the same split always has the same digest."""
        state = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        state.update(self.images.cpu().contiguous().numpy().tobytes())
        state.update(self.labels.cpu().numpy().tobytes())
        return state.hexdigest()


@dataclass(frozen=True)
class Splits:
    """The three splits of one data set; `digest` is the validation split's."""

    train: ImageSet
    val: ImageSet
    test: ImageSet

    @property
    def digest(self) -> str:
        return self.val.digest()

    @property
    def num_classes(self) -> int:
        return len(self.train.classes)


def _digits(root: Path | None, size: int) -> Splits:
    del root
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "The digits data needs scikit-learn: pip install 'prunezoo[digits]'."
        ) from None
    bunch = load_digits()
    grey = torch.from_numpy(np.asarray(bunch.images)).float()[:, None] / 16
    images = functional.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    images = (images * 255).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(np.asarray(bunch.target)).long()
    whole = ImageSet(
        f"scikit-learn's handwritten digits (8x8, resized to {size}x{size})",
        images.contiguous(),
        labels,
        tuple(str(digit) for digit in range(10)),
        (0.305, 0.305, 0.305),
        (0.35, 0.35, 0.35),
        flip=False,
    )
    rest, test = _hold_out(whole, 0.2)
    return Splits(*_hold_out(rest, VALIDATION_SHARE), test)


def _hold_out(data: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """`data` without, and only, the last `share` of each class, in order."""
    held = torch.zeros(len(data), dtype=torch.bool)
    for label in range(len(data.classes)):
        members = (data.labels == label).nonzero().flatten()
        if len(members):
            held[members[-max(1, round(share * len(members))) :]] = True
    return data.subset((~held).nonzero().flatten()), data.subset(held.nonzero().flatten())


def _decode(paths: list[Path], size: int | None) -> np.ndarray:
    from PIL import Image

    def one(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
                if size is not None and pixels.size != (size, size):
                    pixels = pixels.resize((size, size), Image.Resampling.BOX)
                return np.asarray(pixels)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}.") from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        arrays = list(pool.map(one, paths))
    if len({array.shape for array in arrays}) > 1:
        raise DataError(f"The images in {paths[0].parent} differ in size; name one with size=.")
    return np.stack(arrays).transpose(0, 3, 1, 2)


def _folder_set(folder: Path, size: int | None, cache: bool = True) -> ImageSet:
    """One ImageFolder tree as an image set, decoded once and kept in the user's cache folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in _EXTENSIONS)
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise DataError(f"{folder} holds no <class>/<image> files ({', '.join(_EXTENSIONS)}).")
    facts = ((path, path.stat()) for path in paths)
    stamp = "\n".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in facts)
    stamp += f"\n{size}"
    cached = cache_folder() / "images" / f"{hashlib.sha256(stamp.encode()).hexdigest()[:24]}.npy"
    if cache and cached.is_file():
        images = np.load(cached, allow_pickle=False)
    else:
        images = _decode(paths, size)
        if cache:
            cached.parent.mkdir(parents=True, exist_ok=True)
            temporary = cached.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, images)
            os.replace(temporary, cached)
    return ImageSet(
        folder.name,
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.tensor(labels),
        tuple(classes),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )


def cache_folder() -> Path:
    """Where decoded images and traced groups are kept: $ZOO_CACHE or ~/.cache/prunezoo."""
    return Path(os.environ.get("ZOO_CACHE", "~/.cache/prunezoo")).expanduser()


def _image_folder(root: Path | None, size: int | None, name: str | None = None) -> Splits:
    if root is None:
        raise DataError(f"{name or 'imagefolder'} needs the folder that holds train/ and val/.")
    for base in (root, root / (name or "").lower().replace("-", "")):
        if (base / "train").is_dir():
            break
    else:
        raise DataError(f"{root} has no train/ folder of <class>/<image> files.")
    held = next((base / part for part in ("val", "test") if (base / part).is_dir()), None)
    if held is None:
        raise DataError(f"{base} has neither a val/ nor a test/ folder beside train/.")
    whole, test = _folder_set(base / "train", size), _folder_set(held, size)
    if whole.classes != test.classes:
        raise DataError(f"{base}/train and {held} do not hold the same classes.")
    title = f"{name or base.name}{_encoding(base)} at {whole.image_size}x{whole.image_size}"
    whole, test = replace(whole, name=title), replace(test, name=title)
    return Splits(*_hold_out(whole, VALIDATION_SHARE), test)


def _encoding(base: Path) -> str:
    """` (JPEG q<quality>)` when the first training image is a JPEG file: a lossy copy says so.

    The quality is read back from the coarsest luminance step, 121 at quality 50 in standard tables.
    """
    from PIL import Image

    first = next(p for p in sorted((base / "train").rglob("*")) if p.suffix.lower() in _EXTENSIONS)
    with Image.open(first) as image:
        tables = getattr(image, "quantization", None)
    if not tables:
        return ""
    scale = 100 * max(tables[0]) / 121
    return f" (JPEG q{round(100 - scale / 2 if scale <= 100 else 5000 / scale)})"


def _cifar10(root: Path | None, size: int) -> Splits:
    splits = _image_folder(root, None if size == 32 else size, "CIFAR-10")
    if splits.num_classes != 10:
        raise DataError(f"{root} holds {splits.num_classes} classes; CIFAR-10 has 10.")
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    parts = (splits.train, splits.val, splits.test)
    return Splits(*(replace(part, mean=mean, std=std) for part in parts))


def _some_classes(data: ImageSet, chosen: slice, name: str) -> ImageSet:
    """The images of some classes, which are numbered from 0 again."""
    classes = range(len(data.classes))[chosen]
    if len(classes) < 2:
        raise DataError(f"{name} leaves {len(classes)} of {len(data.classes)} classes.")
    inside = (data.labels >= classes[0]) & (data.labels <= classes[-1])
    part = data.subset(inside.nonzero().flatten())
    title = f"{data.name}, classes {classes[0] + 1} to {classes[-1] + 1} of {len(data.classes)}"
    return replace(part, name=title, labels=part.labels - classes[0], classes=data.classes[chosen])


_CLASSES = re.compile(r"\[(\d*):(\d*)\]$")
DATASETS = {"digits": _digits, "cifar10": _cifar10}


def load_data(name: str, root: str | Path | None = None, *, size: int = 32) -> Splits:
    """The train, validation and test splits of a data set, as square images of `size` pixels.

    Args:
        name: `digits` (needs no files), `cifar10` (`root` holds train/ and val/ ImageFolder trees,
            or a cifar10/ folder that does), or `imagefolder:PATH`; with some of the classes alone,
            in order, as `imagefolder:PATH[:50]` or `cifar10[5:]`.
        root: folder of the files.
        size: pixels per side; other sizes are resampled by area.

    Raises:
        DataError: for an unknown name, missing or unreadable files, or a choice of fewer than two
            classes.
    """
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
    if name not in DATASETS:
        raise unknown("data set", name, [*DATASETS, "imagefolder:PATH"], DataError)
    return DATASETS[name](folder, size)
