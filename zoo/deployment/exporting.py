"""Export modules to ONNX; a file is compared with PyTorch in ONNX Runtime before it appears."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from zoo.deployment.acceptance import check_file
from zoo.deployment.files import move_files, scratch_folder, write_files
from zoo.deployment.metadata import Metadata
from zoo.deployment.options import ExportOptions
from zoo.deployment.padding import padded_alike
from zoo.deployment.parity import (
    Outputs,
    cpu_copy,
    items,
    outputs_of,
)
from zoo.deployment.program import PRECISIONS, convert, in_precision
from zoo.deployment.samples import (
    NOISE_IMAGES,
    Normalisation,
    Sample,
    data_set_of,
    folded,
    normalisation_of,
    sample_of,
)
from zoo.errors import ExportError, unknown
from zoo.spec.plans import PruningRecord, record_of
from zoo.storage.wrappers import unwrapped
from zoo.tracing.calls import (
    Inputs,
    batch_of,
    input_shapes,
)

__all__ = ["PRECISIONS", "ExportResult", "export"]


@dataclass(frozen=True)
class ExportResult:
    """An exported file, and how ONNX Runtime's outputs compare with PyTorch's on the CPU.

    Attributes:
        path: of the file.
        precision: of its weights and arithmetic.
        max_abs_difference: largest |difference| of a value.
        relative_difference: the same, divided by the largest |value| of its output; the largest
            over the outputs.
        top1_agreement: share of images with the same top class, in [0, 1]. Except for int8, an
            image whose two top logits are closer than the tolerance counts as agreement. None if no
            output is logits, (N, classes) with at least two classes.
        r2: for outputs that are not logits, the share of PyTorch's variance over the images that
            the file explains, at most 1; the least over these outputs. None if all are logits.
        accuracy, module_accuracy: top-1 of the file and of the module on these images, in [0, 1];
            None without labels.
        images: number of images compared.
        inputs: what they were: an image set's name, `given`, or `noise`.
        bytes: size of the file, including a separate file of weights.
        opset: version of ONNX's operators.
        pad: the widths were padded to multiples of this; 1 if they were not padded.
        unpadded: why a pruned network could not be padded; "" if it could or need not be.
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
    inputs: Dataset[Any] | DataLoader[Any] | Inputs | None = None,
    example_input: Inputs | None = None,
    precision: str = "fp32",
    options: ExportOptions | None = None,
) -> ExportResult:
    """Write `model` to an ONNX file with a dynamic batch, verified in ONNX Runtime on the CPU.

    The file appears only if it computes what the module computes in eval mode; until then an older
    file at `path` stays. The module is not changed. Weights of more than 1 GiB go to
    `<file>.<digest>.data` beside the file. Its `metadata_props` hold the architecture, profile,
    factor, sha256 of the dense checkpoint, classes, image shape, mean and std.

    Args:
        model: a network whose output is tensors in any structure; wrappers (compiled, parallel)
            are removed. A lone tensor, as a classifier's logits (N, classes), is named `logits`;
            others by their places in the structure, and one with an input's name, as `image`, is
            `image_out`. A lone input is named `pixel_values`.
        path: of the file; missing folders are made.
        inputs: normalised images to compare on, at most 256 of them: a tensor (N, C, H, W), a
            Dataset (sampled evenly) or a DataLoader of (image, label). For a network with other
            inputs, a batch of these, as in `zoo.prune`. int8 needs `inputs`: it takes up to 512 and
            uses every other one to set the ranges of its activations.
        example_input: a batch of the network's inputs. Without `inputs`, noise of this shape is
            compared on. A pruned model knows its own shape.
        precision: of weights and arithmetic, one of `PRECISIONS`.
        options: further options of the file.

    Raises:
        ExportError: for an unwritable path, a model that is no module, inputs that it does not
            take, an operator that has no ONNX counterpart, or a file whose outputs differ from the
            module's by more than `TOLERANCES` allows.
    """
    started = time.perf_counter()
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS, ExportError)
    path, options = Path(path).expanduser(), options or ExportOptions()
    model = unwrapped(model)
    record = record_of(model)
    with scratch_folder(path) as folder:
        network = cpu_copy(model)
        own = () if record is None else input_shapes(model, record.image_size, record.plan.inputs)
        sample = sample_of(inputs, example_input, own, precision)
        normalisation = normalisation_of(options, inputs, sample)
        reference = outputs_of(network, sample.inputs)
        some = items(sample.inputs, slice(NOISE_IMAGES))
        network, pad, unpadded = padded_alike(network, some, options.pad)
        if options.fold:
            assert normalisation is not None
            network, sample = folded(network, sample, normalisation)
        if options.dynamic_size and sample.image_shape is None:
            raise ExportError("dynamic_size is for networks of one batch of images (N, C, H, W).")
        program = convert(network, items(sample.inputs, slice(1)), options.dynamic_size)
        file = in_precision(program, precision, options.half_inputs, sample.calibration)
        facts = _metadata(record, sample, reference, inputs, normalisation, precision, options, pad)
        file.metadata_props.clear()
        file.metadata_props.update(facts.properties())
        written = write_files(file, folder, path)
        result = check_file(folder / path.name, network, reference, sample, precision, options)
        size = sum(part.stat().st_size for part in written)
        move_files(written, path)
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


def _metadata(
    record: PruningRecord | None,
    sample: Sample,
    outputs: Outputs,
    inputs: Any,
    normalisation: Normalisation | None,
    precision: str,
    options: ExportOptions,
    pad: int,
) -> Metadata:
    single = len(outputs) == 1 and outputs[0].ndim == 2
    names, classes = (
        getattr(data_set_of(inputs), "classes", ()),
        outputs[0].shape[1] if single else 0,
    )
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
