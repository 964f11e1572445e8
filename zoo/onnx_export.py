"""Modules to ONNX files that were run in ONNX Runtime against PyTorch before they exist."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from zoo.data import ImageSet
from zoo.errors import ExportError, unknown
from zoo.pruning.plan import PruningRecord
from zoo.runtime import InferenceSession

__all__ = ["PRECISIONS", "ExportResult", "export"]

PRECISIONS = ("fp32",)
PARITY_IMAGES = 256
NOISE_IMAGES = 16
TOLERANCE = 1e-3
MIN_AGREEMENT = 0.99


@dataclass(frozen=True)
class ExportResult:
    """An exported file, and how ONNX Runtime's logits compare with PyTorch's on the CPU.

    Attributes:
        path: of the file.
        max_abs_difference: largest |logit difference|.
        relative_difference: the same, divided by the largest |logit| if that exceeds 1.
        top1_agreement: share of images with the same top class, in [0, 1]; an image whose two top
            logits are closer than the tolerance counts as agreement.
        images: compared.
        inputs: what they were: an image set's name, `given`, or `noise`.
        bytes: size of the file.
        opset: of ONNX's operators.
        seconds: wall time of the export and the comparison.
    """

    path: Path
    max_abs_difference: float
    relative_difference: float
    top1_agreement: float
    images: int
    inputs: str
    bytes: int
    opset: int
    seconds: float


def export(
    model: nn.Module,
    path: str | Path,
    *,
    inputs: Dataset | DataLoader | Tensor | None = None,
    example_input: Tensor | None = None,
    precision: str = "fp32",
) -> ExportResult:
    """Write `model` to an ONNX file with a dynamic batch, verified in ONNX Runtime on the CPU.

    The file appears only when it computes what the module computes in eval mode; until then an
    older file at `path` stays. The module itself is not touched.

    Args:
        model: a classifier, images (N, C, H, W) to logits (N, classes).
        path: of the file; missing folders are made.
        inputs: normalised images to compare on, of which at most 256 are used: a tensor, a Dataset
            (spread evenly) or a DataLoader of (image, label).
        example_input: without `inputs`: a float tensor (N, C, H, W) whose image shape the noise
            has that is compared on. A pruned model knows its own.
        precision: of weights and arithmetic, one of `PRECISIONS`.

    Raises:
        ExportError: for an unwritable path, a module or images of another kind, an operator that
            has no ONNX counterpart, or a file that differs by more than 1e-3 of the largest logit
            (or of 1) or in the top class of more than 1 % of the images.
    """
    started = time.perf_counter()
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS, ExportError)
    path = Path(path)
    record = getattr(model, "pruning", None)
    record = record if isinstance(record, PruningRecord) else None
    temporary = _reserve(path)
    try:
        images, origin = _parity_images(inputs, example_input, record)
        network = _cpu_copy(model)
        reference = _logits(network, images)
        program = _convert(network, images[:1])
        program.model.metadata_props.update(_metadata(record, images, reference))
        _write(program, temporary, path)
        session = InferenceSession(temporary, ["CPUExecutionProvider"])
        got = torch.from_numpy(np.concatenate([session(part) for part in _batches(images)]))
        difference, relative, agreement = _compare(reference, got)
        if not (relative <= TOLERANCE and agreement >= MIN_AGREEMENT):
            raise ExportError(
                f"ONNX Runtime and PyTorch differ by {difference:.2g}, {relative:.2g} of the "
                f"largest logit (tolerance {TOLERANCE:g}), and agree on the top class of "
                f"{agreement:.1%} of {len(images)} images ({origin}). {path} was not written."
            )
        size = temporary.stat().st_size
        _move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    opset = program.model.opset_imports[""]
    seconds = time.perf_counter() - started
    return ExportResult(
        path, difference, relative, agreement, len(images), origin, size, opset, seconds
    )


def _reserve(path: Path) -> Path:
    """An empty file beside `path`, which shows before any work that `path` can be written."""
    try:
        if path.is_dir():
            raise ExportError(f"{path} is a folder; name a file in it, {path / 'model.onnx'} say.")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}.") from error
    os.close(handle)
    return Path(name)


def _parity_images(
    inputs: Dataset | DataLoader | Tensor | None,
    example: Tensor | None,
    record: PruningRecord | None,
) -> tuple[Tensor, str]:
    """Float images (N, C, H, W) on the CPU to compare on, and what they are."""
    if inputs is not None:
        origin = inputs.name if isinstance(inputs, ImageSet) else "given"
        return _checked("inputs", _gather(inputs)), origin
    if example is not None:
        shape = tuple(_checked("example_input", example).shape[1:])
    elif record is not None:
        shape = (3, record.image_size, record.image_size)
    else:
        raise ExportError(
            "Exporting needs images: pass inputs= (a data set to compare on) or example_input= "
            "(a tensor of the shape the network takes)."
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_IMAGES, *shape, generator=generator), "noise"


def _gather(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:PARITY_IMAGES]
    if isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset):
        count = len(inputs)  # type: ignore[arg-type]
        step = max(1, -(-count // PARITY_IMAGES))
        return _joined((inputs[index] for index in range(0, count, step)), torch.stack)
    return _joined(inputs, torch.cat)[:PARITY_IMAGES]


def _joined(items: Iterable[Any], join: Any) -> Tensor:
    """The images among `items`, (image, label) pairs or batches of them, as one tensor."""
    parts: list[Tensor] = []
    count = 0
    for item in items:
        images = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(images, Tensor):
            raise ExportError(
                f"The inputs give {type(images).__name__} where images should be tensors."
            )
        parts.append(images)
        count += len(images) if join is torch.cat else 1
        if count >= PARITY_IMAGES:
            break
    if not parts:
        raise ExportError("The inputs hold no images.")
    if len({part.shape[-3:] for part in parts}) > 1:
        raise ExportError("The inputs hold images of several shapes; resize them to one.")
    return join(parts)


def _checked(name: str, images: Any) -> Tensor:
    if (
        not isinstance(images, Tensor)
        or not images.is_floating_point()
        or images.ndim != 4
        or len(images) == 0
    ):
        kind = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else images
        raise ExportError(f"{name} must be float images of shape (N, C, H, W), not {kind!r}.")
    return images.detach().to("cpu", torch.float32)


def _cpu_copy(model: nn.Module) -> nn.Module:
    try:
        network = copy.deepcopy(model)
    except RuntimeError as error:
        raise ExportError(f"The module cannot be copied for export: {error}") from error
    network = network.to("cpu", torch.float32).eval()
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _batches(images: Tensor) -> Iterator[Tensor]:
    """`images` in order: one alone, so that a batch of one is tried too, then up to 64 at once."""
    bounds = [0, *range(1, len(images), 64), len(images)]
    return (images[low:high] for low, high in pairwise(bounds))


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    outputs = []
    with torch.no_grad():
        for part in _batches(images):
            try:
                logits = network(part)
            except Exception as error:  # whatever the user's module raises
                raise ExportError(
                    f"The module does not take images of shape {tuple(part.shape)}: {error}"
                ) from error
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(part):
                kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ExportError(
                    f"The module gives {kind} for images of shape {tuple(part.shape)}; only "
                    f"classifiers with logits ({len(part)}, classes) can be exported."
                )
            outputs.append(logits)
    logits = torch.cat(outputs)
    if not logits.isfinite().all():
        raise ExportError("The module's own logits are not finite; are its weights?")
    return logits


def _convert(network: nn.Module, image: Tensor) -> Any:
    """The ONNX program of `network`, free of the source paths that the exporter notes down."""
    from onnxscript import ir

    example = image.repeat(2, 1, 1, 1)  # a batch of one would be taken for a constant
    try:
        with _quiet(), torch.no_grad():
            traced = torch.export.export(
                network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
            program = torch.onnx.export(
                traced,
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},),
            )
    except Exception as error:  # tracing runs the user's module
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = str(root).strip().partition("\n")[0]
        raise ExportError(f"The module cannot be converted to ONNX: {reason}") from error
    assert program is not None
    ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, log records or graph listings inside: a failure is raised, once."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _metadata(record: PruningRecord | None, images: Tensor, logits: Tensor) -> dict[str, str]:
    metadata = {
        "num_classes": str(logits.shape[1]),
        "image_shape": "x".join(map(str, images.shape[1:])),
    }
    if record is not None:
        metadata |= {
            "architecture": record.architecture,
            "profile": record.plan.profile,
            "metric": record.plan.metric,
            "compression_factor": f"{record.plan.got:.4f}",
            "source_sha256": record.source.sha256 or "",
        }
    return {key: value for key, value in metadata.items() if value}


def _write(program: Any, temporary: Path, path: Path) -> None:
    import onnx

    try:
        program.save(str(temporary), external_data=False)
        onnx.checker.check_model(str(temporary), full_check=True)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}.") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses the exported program: {error}") from error


def _compare(reference: Tensor, got: Tensor) -> tuple[float, float, float]:
    """(largest |difference|, the same relative to the largest |logit| or 1, top-1 agreement)."""
    difference = (reference - got).abs().max().item()
    scale = max(1.0, reference.abs().max().item())
    top = reference.topk(min(2, reference.shape[1])).values
    clear = top[:, 0] - top[:, -1] > TOLERANCE * scale
    wrong = clear & (reference.argmax(1) != got.argmax(1))
    return difference, difference / scale, 1 - wrong.double().mean().item()


def _move(temporary: Path, path: Path) -> None:
    try:
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}.") from error
