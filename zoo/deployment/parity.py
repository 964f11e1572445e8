"""Compare an ONNX file with the module it came from: gather inputs, run both, compare outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, IterableDataset

from zoo.errors import ExportError, GraphError
from zoo.tracing.calls import Inputs, batch_of, call, checked_inputs, described, leaves, mapped

__all__ = [
    "TOLERANCES",
    "Comparison",
    "Outputs",
    "Tolerance",
    "batches",
    "by_batches",
    "checked",
    "compare_outputs",
    "cpu_copy",
    "gather",
    "items",
    "outputs_of",
]

Outputs = tuple[Tensor, ...]
"""The output tensors of a network in float32, in the order of `zoo.tracing.calls.leaves`.

Outputs of several batches are concatenated along their batch dimension, or stacked without one.
"""


@dataclass(frozen=True)
class Tolerance:
    """How far a file's outputs may be from its module's.

    Attributes:
        difference: of a value, as a share of the largest of its output. Infinite if rounding is so
            coarse that no difference says much.
        tie: the two top classes may be exchanged if their logits are closer than this share.
        agreement: least share of images with the same top class. If `difference` is infinite, also
            the least R² of outputs that are not logits.
    """

    difference: float
    tie: float
    agreement: float

    def allows(self, result: Comparison) -> bool:
        """Whether `result` is within the tolerance; NaN never is."""
        near = result.relative_difference <= self.difference
        asked = [result.top1_agreement, *([] if math.isfinite(self.difference) else [result.r2])]
        return near and all(share is None or share >= self.agreement for share in asked)

    def __str__(self) -> str:
        near = f"{self.difference:g} of the largest value, and "
        return f"{near if math.isfinite(self.difference) else ''}{self.agreement:.1%}"


TOLERANCES = {
    "fp32": Tolerance(1e-3, 1e-3, 0.99),
    "fp16": Tolerance(1e-2, 1e-2, 0.99),
    "int8": Tolerance(math.inf, 0.0, 0.97),
}
"""By precision. int8 rounds too coarsely to compare logits, so top classes are compared."""


_SMALLEST = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
"""Of smaller outputs, float32 has too few digits to tell a share of a difference."""


@dataclass(frozen=True)
class Comparison:
    """How a file's outputs compare with its module's; the fields are those of `ExportResult`."""

    max_abs_difference: float
    relative_difference: float
    top1_agreement: float | None
    r2: float | None = None
    accuracy: float | None = None
    module_accuracy: float | None = None

    def __str__(self) -> str:
        shares = (
            (self.top1_agreement, "agree on the top class of {:.1%}"),
            (self.r2, "share {:.1%} of the variance"),
        )
        said = "".join(f", and {text.format(share)}" for share, text in shares if share is not None)
        return (
            f"ONNX Runtime and PyTorch differ by {self.max_abs_difference:.2g}, "
            f"{self.relative_difference:.2g} of the largest value{said}"
        )


def compare_outputs(
    reference: Outputs, got: Outputs, tie: float, labels: Tensor | None = None
) -> Comparison:
    """Compare a file's outputs with those of its module, and single logits with the labels.

    Outputs (N, classes) with two or more classes are logits: their top classes are compared. For
    all others, as a score or a map, the comparison is R², the share of the module's variance over
    the items that the file explains. The worst output counts. Accuracies are given only if there
    are labels and a single output, of logits.
    """
    pairs = list(zip(reference, got, strict=True))
    differences = [(mine - theirs).abs().max().item() for theirs, mine in pairs]
    relative = [
        difference / _magnitude(theirs)
        for difference, theirs in zip(differences, reference, strict=True)
    ]
    classes = [_agreement(*pair, tie) for pair in pairs if _are_logits(pair[0])]
    others = [_explained(*pair) for pair in pairs if not _are_logits(pair[0])]
    result = Comparison(
        _worst(differences), _worst(relative), min(classes, default=None), min(others, default=None)
    )
    if labels is None or len(reference) > 1 or not _are_logits(reference[0]):
        return result
    right, before = (
        (logits[0].argmax(1) == labels).double().mean().item() for logits in (got, reference)
    )
    return replace(result, accuracy=right, module_accuracy=before)


def _worst(values: list[float]) -> float:
    """The largest value, or NaN if there is one."""
    return max(values, key=lambda value: (math.isnan(value), value))


def _magnitude(output: Tensor) -> float:
    """The largest absolute value, by which differences are judged in whatever unit it is."""
    return max(_SMALLEST, output.abs().max().item())


def _are_logits(output: Tensor) -> bool:
    return output.ndim == 2 and output.shape[1] > 1


def _agreement(reference: Tensor, got: Tensor, tie: float) -> float:
    ours, theirs = got.argmax(1), reference.argmax(1)
    top = reference.topk(2).values
    clear = top[:, 0] - top[:, 1] > tie * _magnitude(reference)
    return 1 - (clear & (theirs != ours)).double().mean().item()


def _explained(reference: Tensor, got: Tensor) -> float:
    """R²: 1 for equal outputs; 0 or less if the mean over the items is as near or nearer."""
    reference, got = reference.double(), got.double()
    several = reference.ndim > 0 and len(reference) > 1
    centre = reference.mean(0, keepdim=True) if several else torch.zeros(())
    spread, error = (reference - centre).square().sum(), (reference - got).square().sum()
    return 1.0 if error == 0 else 1 - (error / spread).item()


def gather(
    inputs: Inputs | Dataset[Any] | DataLoader[Any], most: int
) -> tuple[Inputs, Tensor | None]:
    """At most `most` items, and their labels if all have one; a Dataset is sampled evenly.

    Raises:
        ExportError: if there are none, or they are not tensors of one shape.
    """
    if isinstance(inputs, Tensor | tuple | Mapping):
        return items(checked("inputs", inputs), slice(most)), None
    if isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset):
        count = len(inputs)  # type: ignore[arg-type]
        indices = range(0, count, max(1, -(-count // most)))
        images, labels = _collected((_batch_of_one(inputs[n]) for n in indices), most)
    else:
        images, labels = _collected((_pair(item) for item in inputs), most)
    return images[:most], None if labels is None else labels[:most]


def _pair(item: Any) -> tuple[Any, Any]:
    return (item[0], item[1] if len(item) > 1 else None) if _is_pair(item) else (item, None)


def _batch_of_one(item: Any) -> tuple[Any, Any]:
    image, label = _pair(item)
    return (image[None] if isinstance(image, Tensor) else image), label


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) > 0


def _collected(items: Iterable[tuple[Any, Any]], most: int) -> tuple[Tensor, Tensor | None]:
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    for images, label in items:
        if not isinstance(images, Tensor):
            raise ExportError(
                f"The inputs give {type(images).__name__} where images should be tensors."
            )
        parts.append(images)
        count += len(images)
        if isinstance(label, (Integral, Tensor)):
            labels.append(torch.as_tensor(label).cpu().reshape(-1))
        if count >= most:
            break
    if not parts:
        raise ExportError("The inputs hold no images.")
    if len({part.shape[-3:] for part in parts}) > 1:
        raise ExportError("The inputs hold images of several shapes; resize them to one.")
    known = torch.cat(labels) if labels else torch.empty(0)
    named = len(known) == count and not known.is_floating_point()
    return torch.cat(parts), known if named else None


def checked(name: str, inputs: Any) -> Inputs:
    """`inputs` on the CPU, floating-point tensors as float32.

    Raises:
        ExportError: if they are not tensors, are empty, or are images of integers.
    """
    try:
        inputs = checked_inputs(inputs)
    except GraphError:
        raise ExportError(
            f"{name} must be float images (N, C, H, W), or whatever tensor, tuple or dict of "
            f"tensors the network takes, not {described(inputs)}."
        ) from None
    if isinstance(inputs, Tensor) and not inputs.is_floating_point():
        raise ExportError(f"{name} must be float images, not {described(inputs)}.")

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None)

    return mapped(moved, inputs)


def items(inputs: Inputs, part: slice) -> Inputs:
    """The items `part` of a batch; tensors without a batch dimension are left whole."""
    count = batch_of(inputs)
    return mapped(lambda t: t[part] if t.ndim and len(t) == count else t, inputs)


def cpu_copy(model: Any) -> nn.Module:
    """A copy of `model` to export: in eval mode, in float32, on the CPU.

    Raises:
        ExportError: if it is not a module, cannot be copied, or has tensors that are not exported.
    """
    if not isinstance(model, nn.Module):
        raise ExportError(f"Only modules can be exported, not {type(model).__name__}.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ExportError(f"{name} has no shape yet: call the module once, then export it.")
        if tensor.is_meta:
            raise ExportError(f"{name} is on the meta device and has no values: load the weights.")
        if tensor.is_complex():
            raise ExportError(
                f"{name} is complex, which ONNX's operators do not take: hold it as two real "
                f"tensors, as torch.view_as_real gives them."
            )
    try:
        network = copy.deepcopy(model)
    except Exception as error:  # whatever a part of the user's module raises
        raise ExportError(f"The module cannot be copied for export: {error}") from error
    network = network.to("cpu", torch.float32).eval()
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def batches(inputs: Inputs) -> Iterator[Inputs]:
    """`inputs` in order: first one item, to test a batch of one, then batches of up to 64."""
    count = batch_of(inputs)
    bounds = [0, *range(1, count, 64), count]
    return (items(inputs, slice(low, high)) for low, high in pairwise(bounds))


def outputs_of(network: nn.Module, inputs: Inputs) -> Outputs:
    """The outputs of a network for all `inputs`.

    Raises:
        ExportError: if it does not take them, or an output is complex or not finite.
    """

    def run(part: Inputs) -> Outputs:
        try:
            found = leaves(call(network, part))
        except Exception as error:  # whatever the user's module raises
            raise ExportError(
                f"The module does not take inputs of shape {described(part)}: {error}"
            ) from error
        if any(output.is_complex() for output in found):
            raise ExportError(
                "The module gives complex numbers, which ONNX's operators do not: return "
                "torch.view_as_real of them."
            )
        return found

    outputs = by_batches(run, inputs)
    if not outputs:
        raise ExportError("The module gives no tensors.")
    if not all(output.isfinite().all() for output in outputs):
        raise ExportError("The module's own outputs are not finite: check its weights.")
    return outputs


def by_batches(run: Callable[[Inputs], Outputs], inputs: Inputs) -> Outputs:
    """The outputs of `run`, a network or a file, for all `inputs`, computed batch by batch.

    Raises:
        ExportError: if the batch size changes an output's shape other than in one dimension.
    """
    parts, sizes = [], []
    with torch.no_grad():
        for part in batches(inputs):
            parts.append(tuple(output.float() for output in run(part)))
            sizes.append(batch_of(part))
    return tuple(_joined(same, sizes) for same in zip(*parts, strict=True))


def _joined(parts: tuple[Tensor, ...], sizes: list[int]) -> Tensor:
    """One output of several batches, concatenated along the batch dimension.

    That is the first dimension as long as each batch. Without one, the parts are stacked.

    Raises:
        ExportError: if they cannot be stacked.
    """
    for dim in range(parts[0].ndim):
        if all(part.shape[dim] == size for part, size in zip(parts, sizes, strict=True)):
            return torch.cat([part.movedim(dim, 0) for part in parts])
    for part, size in zip(parts, sizes, strict=True):
        if part.shape != parts[0].shape:
            raise ExportError(
                f"An output has shape {tuple(parts[0].shape)} for {sizes[0]} item(s), and "
                f"{tuple(part.shape)} for {size}: it has no batch dimension."
            )
    return torch.stack(parts)
