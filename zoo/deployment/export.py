"""Modules to ONNX files that were run in ONNX Runtime against PyTorch before they exist."""

from __future__ import annotations

import contextlib
import copy
import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from zoo.data.datasets import ImageSet
from zoo.deployment.metadata import Metadata
from zoo.deployment.options import ExportOptions
from zoo.deployment.padding import padded_alike
from zoo.deployment.parity import (
    TOLERANCES,
    Comparison,
    Outputs,
    by_batches,
    checked,
    compare_outputs,
    cpu_copy,
    gather,
    items,
    outputs_of,
)
from zoo.deployment.program import PRECISIONS, convert, in_precision, input_names
from zoo.deployment.providers import CPU, open_session
from zoo.errors import ExportError, first_line, unknown
from zoo.spec.groups import InputShape
from zoo.spec.plan import PruningRecord, record_of
from zoo.tracing.calls import (
    Inputs,
    batch_of,
    example_of,
    input_shapes,
    mapped,
    shapes_of,
    tensors_of,
)

__all__ = ["PRECISIONS", "ExportResult", "export"]

PARITY_IMAGES = 256
NOISE_IMAGES = 16
HALF_IMAGES = 4
EXTERNAL_BYTES = 1 << 30
"""Weights of more than this are written to a file of their own: one ONNX file holds 2 GiB."""

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std), per channel."""


@dataclass(frozen=True)
class ExportResult:
    """An exported file, and how ONNX Runtime's outputs compare with PyTorch's on the CPU.

    Attributes:
        path: of the file.
        precision: of its weights and arithmetic.
        max_abs_difference: largest |difference| of a value.
        relative_difference: the same, divided by the largest |value| of its output if that exceeds
            1; the largest over the outputs.
        top1_agreement: share of images with the same top class, in [0, 1]; but for int8, an image
            whose two top logits are closer than the tolerance counts as agreement. None where no
            output is of logits, (N, classes) with at least two classes.
        r2: of the outputs that are none, the share of PyTorch's variance over the images that the
            file explains, at most 1; None where all are logits. The least over the outputs.
        accuracy, module_accuracy: top-1, of the file and of the module, on the same images; None
            where these have no labels.
        images: compared.
        inputs: what they were: an image set's name, `given`, or `noise`.
        bytes: size of the file, with that of its weights if they are in another.
        opset: of ONNX's operators.
        pad: what the widths were filled up to multiples of; 1 if they are the network's own.
        unpadded: why the widths of a pruned network could not be; "" if they could or need not be.
        seconds: wall time of the export and the comparison.
    """

    path: Path
    precision: str
    max_abs_difference: float
    relative_difference: float
    top1_agreement: float | None
    r2: float | None
    accuracy: float | None
    module_accuracy: float | None
    images: int
    inputs: str
    bytes: int
    opset: int
    pad: int
    unpadded: str
    seconds: float


def export(
    model: nn.Module,
    path: str | Path,
    *,
    inputs: Dataset | DataLoader | Inputs | None = None,
    example_input: Inputs | None = None,
    precision: str = "fp32",
    options: ExportOptions | None = None,
) -> ExportResult:
    """Write `model` to an ONNX file with a dynamic batch, verified in ONNX Runtime on the CPU.

    The file appears only when it computes what the module computes in eval mode; until then an
    older file at `path` stays. The module itself is not touched. Weights of more than 1 GiB go to
    `<file>.<digest>.data` beside it. The file's `metadata_props` say what it is: architecture,
    profile, factor, sha256 of the dense checkpoint, classes, image shape, mean and std.

    Args:
        model: a network that gives tensors, in any structure: a classifier's logits (N, classes),
            or others, whose names in the file are those that they stand under.
        path: of the file; missing folders are made.
        inputs: normalised images to compare on, of which at most 256 are used: a tensor, a Dataset
            (spread evenly) or a DataLoader of (image, label); or of a network that takes something
            else, a batch of that, as in `zoo.prune`. int8 needs them, and takes as many again,
            every other one, to set the ranges of its activations.
        example_input: without `inputs`: a batch of what the network takes, whose shape the noise
            has that is compared on. A pruned model knows its own.
        precision: of weights and arithmetic, one of `PRECISIONS`.
        options: what else the file takes.

    Raises:
        ExportError: for an unwritable path, a module or images of another kind, an operator that
            has no ONNX counterpart, or a file whose outputs differ from the module's by more than
            `TOLERANCES` allows.
    """
    started = time.perf_counter()
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS, ExportError)
    path, options = Path(path).expanduser(), options or ExportOptions()
    record = record_of(model)
    with _scratch(path) as folder:
        network = cpu_copy(model)
        own = () if record is None else input_shapes(model, record.image_size, record.plan.inputs)
        sample = _sample(inputs, example_input, own, precision)
        normalisation = _normalisation(options, inputs, sample)
        reference = outputs_of(network, sample.inputs)
        some = items(sample.inputs, slice(NOISE_IMAGES))
        network, pad, unpadded = padded_alike(network, some, options.pad)
        if options.fold:
            assert normalisation is not None
            network, sample = _folded(network, sample, normalisation)
        if options.dynamic_size and sample.image_shape is None:
            raise ExportError("dynamic_size is for networks of one batch of images (N, C, H, W).")
        program = convert(network, items(sample.inputs, slice(1)), options.dynamic_size)
        file = in_precision(program, precision, options.half_inputs, sample.calibration)
        facts = _metadata(record, sample, reference, inputs, normalisation, precision, options, pad)
        file.metadata_props.clear()
        file.metadata_props.update(facts.properties())
        written = _write(file, folder, path)
        result = _compared(folder / path.name, network, reference, sample, precision, options)
        size = sum(part.stat().st_size for part in written)
        _move(written, path)
    return ExportResult(
        path=path,
        precision=precision,
        **vars(result),
        images=batch_of(sample.inputs),
        inputs=sample.origin,
        bytes=size,
        opset=file.opset_imports[""],
        pad=pad,
        unpadded=unpadded,
        seconds=time.perf_counter() - started,
    )


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside `path`, which shows before any work that `path` can be written."""
    try:
        if path.is_dir():
            raise ExportError(f"{path} is a folder; name a file in it, {path / 'model.onnx'} say.")
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Sample:
    """Inputs on the CPU to compare on, their labels, and what they are.

    `calibration` are others, which set the ranges of int8 activations.
    """

    inputs: Inputs
    labels: Tensor | None
    origin: str
    calibration: Inputs

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of images; None of anything else."""
        if isinstance(self.inputs, Tensor) and self.inputs.ndim == 4:
            return tuple(self.inputs.shape[1:])
        return None


def _sample(
    inputs: Dataset | DataLoader | Inputs | None,
    example: Inputs | None,
    own: tuple[InputShape, ...],
    precision: str,
) -> _Sample:
    """The items of `inputs`, or noise of the shapes of `example` or else the module's `own`."""
    int8 = precision.startswith("int8")
    if inputs is not None:
        found, labels = gather(inputs, PARITY_IMAGES * (2 if int8 else 1))
        found = checked("inputs", found)
        compared = slice(1, None, 2) if int8 else slice(None)
        if int8 and batch_of(found) < 2:
            raise ExportError(
                "int8 needs at least two images: one half sets the ranges of its activations, the "
                "other is compared on."
            )
        labels = None if labels is None else labels[compared]
        origin = inputs.name if isinstance(inputs, ImageSet) else "given"
        return _Sample(items(found, compared), labels, origin, items(found, slice(0, None, 2)))
    if int8:
        raise ExportError("int8 needs inputs=: images that set the ranges of its activations.")
    shapes = own if example is None else shapes_of(checked("example_input", example))
    if not shapes:
        raise ExportError(
            "Exporting needs images: pass inputs= (a data set to compare on) or example_input= "
            "(a tensor of the shape the network takes)."
        )
    generator = torch.Generator().manual_seed(0)
    noise = example_of(shapes, NOISE_IMAGES, partial(torch.randn, generator=generator))
    noise = checked("example_input", noise)
    return _Sample(noise, None, "noise", noise)


def _normalisation(options: ExportOptions, inputs: Any, sample: _Sample) -> Normalisation | None:
    """(mean, std) of the images, as asked or as the data set says, if either does."""
    given = options if options.mean or options.std else _data_set(inputs)
    mean, std = getattr(given, "mean", None), getattr(given, "std", None)
    if not (isinstance(mean, tuple) and isinstance(std, tuple)):
        if options.fold or given is options:
            raise ExportError(
                "Normalisation needs both a mean and a std per channel: name both in "
                "ExportOptions, or pass inputs= that know theirs."
            )
        return None
    if sample.image_shape is None:
        raise ExportError("mean and std are of networks of one batch of images (N, C, H, W).")
    channels = sample.image_shape[0]
    if len(mean) != channels or len(std) != channels or not min(std) > 0:
        raise ExportError(
            f"mean={mean} and std={std} must be {channels} numbers each, one per channel, and "
            f"each std positive."
        )
    return mean, std


def _data_set(inputs: Any) -> Any:
    """What may know the mean, std and classes of `inputs`: a DataLoader's or Subset's data set."""
    while hasattr(inputs, "dataset"):
        inputs = inputs.dataset
    return inputs


class _Folded(nn.Module):
    """A network that takes images of 0 to 1 and normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def _folded(
    network: nn.Module, sample: _Sample, normalisation: Normalisation
) -> tuple[nn.Module, _Sample]:
    """The network with its normalisation, and the images as they were before it."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in normalisation)
    inputs, calibration = (
        mapped(lambda images: images * std + mean, part)
        for part in (sample.inputs, sample.calibration)
    )
    folded = _Folded(network, mean, std).eval()
    return folded, replace(sample, inputs=inputs, calibration=calibration)


def _metadata(
    record: PruningRecord | None,
    sample: _Sample,
    outputs: Outputs,
    inputs: Any,
    normalisation: Normalisation | None,
    precision: str,
    options: ExportOptions,
    pad: int,
) -> Metadata:
    single = len(outputs) == 1 and outputs[0].ndim == 2
    names, classes = getattr(_data_set(inputs), "classes", ()), outputs[0].shape[1] if single else 0
    names = tuple(names) if isinstance(names, list | tuple) else ()
    named = len(names) == classes and all(isinstance(name, str) for name in names)
    mean, std = normalisation or ((), ())
    facts = Metadata(
        architecture=options.arch or "",
        precision=precision,
        num_classes=classes,
        classes=names if named else (),
        image_shape=sample.image_shape or (),
        mean=mean,
        std=std,
        folded=options.fold,
        pad=pad,
    )
    if record is None:
        return facts
    return replace(
        facts,
        architecture=record.architecture or facts.architecture,
        profile=record.plan.profile,
        metric=record.plan.metric,
        compression_factor=record.plan.got,
        source_sha256=record.source.sha256 or "",
    )


def _write(file: Any, folder: Path, path: Path) -> list[Path]:
    """The files of a model in `folder`: first that of its weights, if it is large."""
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


def _compared(
    file: Path,
    network: nn.Module,
    reference: Outputs,
    sample: _Sample,
    precision: str,
    options: ExportOptions,
) -> Comparison:
    """The written file beside its network.

    Raises:
        ExportError: if it computes something else, on images of another size included.
    """
    tolerance = TOLERANCES[precision.partition("-")[0]]
    if options.min_agreement is not None:
        tolerance = replace(tolerance, agreement=options.min_agreement)
    run = _runner(file)
    got = by_batches(run, sample.inputs)
    result = compare_outputs(reference, got, tolerance.tie, sample.labels)
    if not tolerance.allows(result):
        raise ExportError(
            f"{result} on {batch_of(sample.inputs)} images ({sample.origin}); allowed are "
            f"{tolerance}. {file.name} was not written."
        )
    if precision == "fp16":
        some = items(sample.inputs, slice(HALF_IMAGES))
        other = compare_outputs(
            outputs_of(network, some), _half_outputs(network, some), tolerance.tie
        )
        if not tolerance.allows(other):
            raise ExportError(
                f"With all of its arithmetic in fp16 the module gives something else: {other}; "
                f"allowed are {tolerance}."
            )
    if options.dynamic_size:
        larger = mapped(
            lambda images: nn.functional.interpolate(images[:4], scale_factor=2.0), sample.inputs
        )
        try:
            other = compare_outputs(
                outputs_of(network, larger), by_batches(run, larger), tolerance.tie
            )
        except ExportError as error:
            raise ExportError(f"{error} Export without dynamic_size.") from error
        # classes are not asked for: the network may never have seen images of this size
        if not other.relative_difference <= tolerance.difference:
            sides = tuple(tensors_of(larger)[0].shape[2:])
            raise ExportError(f"{other} on images of {sides}. Export without dynamic_size.")
    return result


def _runner(file: Path) -> Callable[[Inputs], Outputs]:
    """ONNX Runtime on the CPU, of inputs as the network takes them.

    Raises:
        ExportError: from the function, if ONNX Runtime fails.
    """
    session = open_session(file, [CPU], None, False)
    halves = {given.name: given.type == "tensor(float16)" for given in session.get_inputs()}

    def run(inputs: Inputs) -> Outputs:
        named = zip(input_names(inputs), tensors_of(inputs), strict=True)
        arrays = {
            name: (tensor.half() if halves[name] else tensor).numpy()
            for name, tensor in named
            if name in halves
        }
        try:
            return tuple(torch.from_numpy(array) for array in session.run(None, arrays))
        except Exception as error:  # its errors share no other base class
            reason = first_line(error)
            raise ExportError(f"ONNX Runtime failed on {file.name}: {reason}") from error

    return run


def _half_outputs(network: nn.Module, inputs: Inputs) -> Outputs:
    """What the network gives with everything in fp16, as on a GPU.

    ONNX Runtime computes the fp16 operators of a file in fp32 on the CPU, where none overflows.
    """
    half = mapped(lambda t: t.half() if t.is_floating_point() else t, inputs)
    try:
        return outputs_of(copy.deepcopy(network).half(), half)
    except ExportError as error:
        raise ExportError(f"The module cannot compute in fp16. {error}") from error


def _move(written: list[Path], path: Path) -> None:
    """Put the files in their place: the weights first, so that no file ever lacks its own."""
    try:
        for file in written:
            os.chmod(file, 0o644)
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}.") from error
    for old in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 16}.data"):
        if old.name not in [file.name for file in written]:
            old.unlink(missing_ok=True)
