"""Pictures of every mode become the same pixels in training and in inference, or are refused."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, features
from torch import nn

from zoo.data import datasets as data
from zoo.data import images
from zoo.data.datasets import load_data
from zoo.data.images import ImageFiles, open_picture, to_rgb
from zoo.deployment.exporting import export
from zoo.deployment.metadata import Metadata
from zoo.deployment.options import ExportOptions
from zoo.deployment.pictures import to_array
from zoo.deployment.runtime import InferenceSession
from zoo.errors import DataError

GREY = [[0, 64], [128, 255]]
"""The 8 bits of the 2x2 pictures of one channel."""

WIDE = np.array(GREY, np.uint16) * 257
COLOUR = np.array([[[0, 0, 0], [250, 10, 20]], [[30, 240, 40], [50, 60, 230]]], np.uint8)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png(depth: int, colour: int, rows: np.ndarray, transparent: bytes = b"") -> bytes:
    """A 2x2 PNG of a kind that Pillow reads but does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + zlib.crc32(name + body).to_bytes(4)

    lines = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 2, 2, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    if transparent:
        parts.insert(1, chunk(b"tRNS", transparent))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(bits: int, rows: bytes, *, white_is_zero: bool = False, signed: bool = False) -> bytes:
    """A 2x2 TIFF of one channel, of a kind that Pillow reads but does not write."""
    tags = {256: 2, 257: 2, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 134, 277: 1,
            278: 2, 279: len(rows), 339: 1 + signed}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + rows


def turned(picture: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture, kind, exif=exif)


def grey(values: object) -> np.ndarray:
    return np.repeat(np.array(values, np.uint8)[..., None], 3, axis=2)


def palette() -> Image.Image:
    picture = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8)).convert("P")
    picture.putpalette(COLOUR.tobytes())
    return picture


def with_alpha(picture: Image.Image) -> Image.Image:
    picture.putalpha(Image.fromarray(np.array([[0, 255], [1, 128]], np.uint8)))
    return picture


def of_floats(*values: float) -> bytes:
    array = np.array(values or np.array(GREY).ravel() / 255, np.float32).reshape(2, 2)
    return saved(Image.fromarray(array), "TIFF")


def bilevel() -> Image.Image:
    return Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")


rgb, eight = Image.fromarray(COLOUR), Image.fromarray(np.array(GREY, np.uint8))
sixteen = Image.fromarray(WIDE)
two_bytes = WIDE.astype("<u2").tobytes()
CASES: dict[str, tuple[bytes, np.ndarray]] = {
    "RGB": (saved(rgb, "PNG"), COLOUR),
    "L": (saved(eight, "PNG"), grey(GREY)),
    "1, PNG": (saved(bilevel(), "PNG"), grey([[0, 255], [255, 0]])),
    "1, TIFF": (saved(bilevel(), "TIFF"), grey([[0, 255], [255, 0]])),
    "16-bit grey PNG": (saved(sixteen, "PNG"), grey(GREY)),
    "16-bit grey PNG, rounded": (
        png(16, 0, np.array([[128, 129], [32767, 65407]])), grey([[0, 1], [127, 255]])),
    "16-bit grey and alpha PNG": (png(16, 4, np.stack([WIDE, WIDE // 2], 2)), grey(GREY)),
    "16-bit RGB PNG": (png(16, 2, COLOUR.astype(np.uint16) * 257), COLOUR),
    "I;16 TIFF": (saved(sixteen, "TIFF"), grey(GREY)),
    "I;16B TIFF": (saved(Image.fromarray(WIDE.astype(">u2")), "TIFF"), grey(GREY)),
    "16-bit TIFF, white is zero": (tiff(16, two_bytes, white_is_zero=True),
                                   255 - grey(GREY)),
    "12-bit TIFF": (tiff(12, bytes.fromhex("000fff 800400")), grey([[0, 255], [128, 64]])),
    "16-bit PGM": (saved(sixteen, "PPM"), grey(GREY)),
    "PGM of 0..1000": (b"P5 2 2 1000\n" + np.array([0, 500, 1000, 250], ">u2").tobytes(),
                       grey([[0, 128], [255, 64]])),
    "float TIFF of 0..1": (of_floats(), grey(GREY)),
    "float PFM of 0..1": (saved(Image.fromarray(np.array(GREY, np.float32) / 255), "PPM"),
                          grey(GREY)),
    "P": (saved(palette(), "PNG"), COLOUR),
    "P, GIF": (saved(palette(), "GIF"), COLOUR),
    "P with transparency": (
        saved(palette(), "PNG", transparency=bytes([0, 128, 255, 7])), COLOUR),
    "P with one transparent colour": (saved(palette(), "PNG", transparency=1), COLOUR),
    "LA": (saved(with_alpha(eight.copy()), "PNG"), grey(GREY)),
    "RGBA": (saved(with_alpha(rgb.copy()), "PNG"), COLOUR),
    "RGB with one transparent colour": (
        saved(rgb, "PNG", transparency=(250, 10, 20)), COLOUR),
    "CMYK": (saved(rgb.convert("CMYK"), "TIFF"), COLOUR),
    "turned once": (turned(rgb, 6), np.rot90(COLOUR, -1)),
    "upside down": (turned(palette(), 3), np.rot90(COLOUR, 2)),
    "mirrored": (turned(with_alpha(rgb.copy()), 2, "TIFF"), COLOUR[:, ::-1]),
    "turned, of 16 bits": (turned(sixteen, 8), np.rot90(grey(GREY), 1)),
    "turned, TIFF of 16 bits": (turned(sixteen, 6, "TIFF"), np.rot90(grey(GREY), -1)),
    "of no known orientation": (turned(rgb, 99), COLOUR),
    "of damaged EXIF": (saved(rgb, "PNG", exif=b"Exif\0\0garbage"), COLOUR),
}  # fmt: skip
"""What a file holds -> the file, and its pixels in RGB of 8 bits."""

REFUSED: dict[str, tuple[bytes, str]] = {
    "integers of 32 bits": (
        saved(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), "holds integers of 32 bits"),
    "signed integers of 16 bits": (tiff(16, two_bytes, signed=True), "holds integers of 32 bits"),
    "floats of 0..255": (of_floats(0, 1, 2, 255), "holds floats from 0 to 255"),
    "negative floats": (of_floats(-0.5, 0, 0, 1), "holds floats from -0.5 to 1"),
    "floats that are none": (of_floats(0, 0, float("nan"), 1), "holds floats from nan to nan"),
}  # fmt: skip


def by_load_data(path: Path) -> np.ndarray:
    return load_data(f"imagefolder:{path.parents[2]}", size=2).test.images[0].numpy()


def by_files(path: Path) -> np.ndarray:
    one = ImageFiles("one", (path,), 2, torch.tensor([0]), ("a",), (0.0,) * 3, (1.0,) * 3)
    return one.gather(torch.tensor([0]), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))[0].numpy()


def as_array(picture: Image.Image) -> np.ndarray:
    told = Metadata(image_shape=(3, 2, 2), folded=True)
    return (255 * to_array(picture, told, "m.onnx")).round().astype(np.uint8)


def by_inference_of_a_file(path: Path) -> np.ndarray:
    return as_array(open_picture(path))


def by_inference_of_a_picture(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return as_array(picture)


WAYS: list[Callable[[Path], np.ndarray]] = [
    by_load_data, by_files, by_inference_of_a_file, by_inference_of_a_picture,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, and no warning unheard."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def in_a_tree(folder: Path, content: bytes) -> Path:
    """`content` as the only picture of the two splits; the path of the second, read by content."""
    for split in ("train", "val"):
        (folder / split / "a").mkdir(parents=True)
        (folder / split / "a" / "0.tif").write_bytes(content)
    return folder / "val" / "a" / "0.tif"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CASES)
def test_a_picture_of_any_mode_has_its_right_pixels(
    kind: str, way: Callable[[Path], np.ndarray], tmp_path: Path
) -> None:
    content, expected = CASES[kind]
    path = in_a_tree(tmp_path / "tree", content)
    np.testing.assert_array_equal(way(path), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", REFUSED)
def test_a_picture_whose_black_and_white_are_not_known_is_refused_by_name(
    kind: str, way: Callable[[Path], np.ndarray], tmp_path: Path
) -> None:
    content, message = REFUSED[kind]
    path = in_a_tree(tmp_path / "tree", content)
    with pytest.raises(DataError, match=rf"0\.tif {message}"):
        way(path)


@pytest.mark.parametrize("way", WAYS[:-1])
def test_postscript_named_as_a_picture_is_refused_and_no_program_is_run(
    way: Callable[[Path], np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript, mark = tmp_path / "gs", tmp_path / "mark"
    ghostscript.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what it has found before
    path = in_a_tree(tmp_path / "tree", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n")
    with pytest.raises(DataError, match="cannot be read as an image"):
        way(path)
    assert not mark.exists()
    with pytest.raises(OSError, match="identify"), Image.open(path) as picture:
        picture.load()  # what Pillow does unless it is told which formats are expected
    assert mark.exists()


def test_a_damaged_picture_of_a_rare_format_is_a_data_error() -> None:
    """Pillow's plugin of IM files lets its own TypeError out."""
    content = b"Image type: L\r\nImage size (x*y): 2*2*3\r\n\x1a" + bytes(500)
    with pytest.raises(DataError, match="cannot be read as an image: cannot identify"):
        open_picture(io.BytesIO(content))


@pytest.mark.parametrize("kind", [*images.FORMATS, "MPO"])
def test_every_format_that_is_named_is_read(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    white = Image.new("RGB", (16, 16), "white")
    more = {"save_all": True, "append_images": [white]} if kind == "MPO" else {}
    content = saved(white, kind, **more)
    assert Image.open(io.BytesIO(content)).format == kind
    assert np.asarray(open_picture(io.BytesIO(content))).min() > 250


def test_a_pillow_without_a_format_reads_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert open_picture(io.BytesIO(saved(rgb, "PNG"))).size == (2, 2)
    with pytest.raises(DataError, match="cannot identify"):
        open_picture(io.BytesIO(b"no picture"))


def test_sixteen_bits_that_pillow_widens_are_still_sixteen() -> None:
    """As older versions of Pillow open grey PNGs of 16 bits."""
    picture = Image.fromarray(WIDE.astype(np.int32))
    picture.format = "PNG"
    np.testing.assert_array_equal(np.asarray(to_rgb(picture)), grey(GREY))


def test_a_picture_is_turned_once_and_the_callers_is_left_as_it_was() -> None:
    picture = Image.open(io.BytesIO(turned(rgb, 6)))
    once = to_rgb(picture)
    np.testing.assert_array_equal(np.asarray(once), np.rot90(COLOUR, -1))
    np.testing.assert_array_equal(np.asarray(to_rgb(once)), np.asarray(once))
    np.testing.assert_array_equal(np.asarray(picture), COLOUR)


def test_grey_of_a_file_that_takes_one_channel_is_left_as_it_is() -> None:
    told = Metadata(image_shape=(1, 2, 2), folded=True)
    for content in (saved(sixteen, "PNG"), png(16, 0, WIDE, transparent=b"\0\0")):
        array = to_array(Image.open(io.BytesIO(content)), told, "m.onnx")
        np.testing.assert_allclose(array, np.array([GREY]) / 255, rtol=1e-6)


def test_a_picture_that_cannot_be_read_any_more_is_a_data_error() -> None:
    picture = Image.open(io.BytesIO(saved(rgb, "PNG")))
    picture.close()
    with pytest.raises(DataError, match="The picture cannot be read as an image"):
        to_rgb(picture)


def test_pixels_decoded_by_other_rules_are_not_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = in_a_tree(tmp_path / "tree", saved(rgb, "PNG"))
    monkeypatch.setattr(images, "to_rgb", lambda _: Image.new("RGB", (2, 2), "white"))
    monkeypatch.setattr(data, "_DECODED", "all white")
    assert by_load_data(path).min() == 255
    monkeypatch.undo()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    np.testing.assert_array_equal(by_load_data(path), COLOUR.transpose(2, 0, 1))


def test_a_session_sees_sixteen_bits_as_eight_and_a_refused_picture_loses_no_other(
    tmp_path: Path,
) -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    file = tmp_path / "m.onnx"
    options = ExportOptions(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    export(network, file, inputs=torch.rand(4, 3, 2, 2), options=options)
    session = InferenceSession(file, "CPUExecutionProvider")
    expected = session([eight, eight])
    np.testing.assert_allclose(session(sixteen), expected[:1], rtol=1e-4, atol=1e-4)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in zip("abc", (saved(eight, "PNG"), saved(sixteen, "TIFF"),
                                     of_floats(0, 1, 2, 255)), strict=True):  # fmt: skip
        (folder / f"{name}.tif").write_bytes(content)
    opened = [Image.open(path) for path in sorted(folder.iterdir())]
    for source in (folder, opened):
        got = []
        with pytest.raises(DataError, match=r"c\.tif holds floats from 0 to 255"):
            got.extend(session.predict(source))
        np.testing.assert_allclose([logits for _, logits in got], expected, rtol=1e-4, atol=1e-4)
    for picture in opened:
        picture.close()
