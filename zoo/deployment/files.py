"""Write the files of an ONNX model to a temporary folder; move them when all are complete."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.errors import ExportError

__all__ = ["move_files", "scratch_folder", "write_files"]


EXTERNAL_BYTES = 1 << 30
"""Larger weights are written to a file of their own: one ONNX file holds at most 2 GiB."""


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; making it shows early whether `path` can be written.

    Raises:
        ExportError: if it cannot, or something other than an ONNX file or an empty one is there.
    """
    try:
        if path.is_dir():
            raise ExportError(f"{path} is a folder; name a file in it, as {path / 'model.onnx'}.")
        if path.exists() and not _is_replaceable(path):
            raise ExportError(
                f"{path} exists and is no ONNX file, so it is left as it is: name another file, as "
                f"model.onnx, or remove it first."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_replaceable(path: Path) -> bool:
    """Whether `path` is an ONNX file by its content, or an empty file."""
    import onnx

    if not path.is_file():  # a device, as /dev/null
        return False
    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content, format="protobuf")
    except Exception:  # of protobuf's implementations, each has its own
        return False
    return not content or (model.ir_version > 0 and model.HasField("graph"))


def write_files(file: Any, folder: Path, path: Path) -> list[Path]:
    """Write the model `file` into `folder`; return its files, a separate one of weights first."""
    import onnx
    from onnxscript import ir

    weights = [item.const_value for item in file.graph.initializers.values()]
    digest, large = hashlib.sha256(), sum(item.nbytes for item in weights) > EXTERNAL_BYTES
    for item in weights if large else ():
        digest.update(item.numpy().tobytes())
    beside = f"{path.name}.{digest.hexdigest()[:16]}.data" if large else None
    try:
        ir.save(file, folder / path.name, external_data=beside)
        onnx.checker.check_model(str(folder / path.name), full_check=True)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}.") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses the exported program: {error}") from error
    return [folder / name for name in (beside, path.name) if name is not None]


def move_files(written: list[Path], path: Path) -> None:
    """Move the files to `path`: weights first, so that a model never lacks its own.

    Weights of the file that was there go, unless another ONNX file in the folder names them.
    """
    try:
        for file in written:
            os.chmod(file, 0o644)
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}.") from error
    for old in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 16}.data"):
        if old.name not in [file.name for file in written] and not _is_named(old):
            old.unlink(missing_ok=True)


def _is_named(weights: Path) -> bool:
    """Whether an ONNX file beside `weights`, as a copy or a renamed one, may refer to them."""
    for file in weights.parent.iterdir():
        if ".onnx" not in file.name.lower() or file.suffix == ".data" or not file.is_file():
            continue
        try:
            if weights.name.encode() in file.read_bytes():
                return True
        except OSError:  # what cannot be read may refer to them
            return True
    return False
