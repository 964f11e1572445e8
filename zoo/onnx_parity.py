"""An ONNX file against the module it came from: the images, the logits, and how they compare."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from zoo.errors import ExportError

__all__ = ["TOLERANCES", "Comparison", "Tolerance", "batches", "checked", "compare_logits",
           "cpu_copy", "gather", "logits_of"]  # fmt: skip


@dataclass(frozen=True)
class Tolerance:
    """How far a file may be from its module.

    Attributes:
        difference: of a logit, as a share of the largest |logit| if that exceeds 1.
        tie: top classes may be exchanged where their logits are closer than this share.
        agreement: least share of images with the same top class.
    """

    difference: float
    tie: float
    agreement: float

    def allows(self, result: Comparison) -> bool:
        """Whether a file that compares like this is the module's; no NaN passes."""
        near = result.relative_difference <= self.difference
        return near and result.top1_agreement >= self.agreement

    def __str__(self) -> str:
        return f"{self.difference:g} of the largest logit, and {self.agreement:.1%}"


TOLERANCES = {
    "fp32": Tolerance(1e-3, 1e-3, 0.99),
    "fp16": Tolerance(1e-2, 1e-2, 0.99),
    "int8": Tolerance(math.inf, 0.0, 0.97),
}
"""By precision. int8 rounds too coarsely for its logits to say much: its classes decide."""


@dataclass(frozen=True)
class Comparison:
    """What `ExportResult` says of a file and its module."""

    max_abs_difference: float
    relative_difference: float
    top1_agreement: float
    accuracy: float | None = None
    module_accuracy: float | None = None

    def __str__(self) -> str:
        return (
            f"ONNX Runtime and PyTorch differ by {self.max_abs_difference:.2g}, "
            f"{self.relative_difference:.2g} of the largest logit, and agree on the top class of "
            f"{self.top1_agreement:.1%}"
        )


def compare_logits(
    reference: Tensor, got: Tensor, tie: float, labels: Tensor | None = None
) -> Comparison:
    """Logits (N, classes) of a file beside those of its module, and of both beside the labels."""
    difference = (reference - got).abs().max().item()
    scale = max(1.0, reference.abs().max().item())
    ours, theirs = got.argmax(1), reference.argmax(1)
    top = reference.topk(min(2, reference.shape[1])).values
    clear = top[:, 0] - top[:, -1] > tie * scale
    agreement = 1 - (clear & (theirs != ours)).double().mean().item()
    result = Comparison(difference, difference / scale, agreement)
    if labels is None:
        return result
    right, before = ((classes == labels).double().mean().item() for classes in (ours, theirs))
    return replace(result, accuracy=right, module_accuracy=before)


def gather(inputs: Tensor | Dataset | DataLoader, most: int) -> tuple[Tensor, Tensor | None]:
    """At most `most` images, and their labels where all have one: of a Dataset, spread evenly.

    Raises:
        ExportError: if there are none, or they are no tensors of one shape.
    """
    if isinstance(inputs, Tensor):
        return inputs[:most], None
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


def checked(name: str, images: Any) -> Tensor:
    """`images` as float32 on the CPU.

    Raises:
        ExportError: if they are not float images (N, C, H, W), N at least 1.
    """
    if (
        not isinstance(images, Tensor)
        or not images.is_floating_point()
        or images.ndim != 4
        or len(images) == 0
    ):
        kind = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else images
        raise ExportError(f"{name} must be float images of shape (N, C, H, W), not {kind!r}.")
    return images.detach().to("cpu", torch.float32)


def cpu_copy(model: Any) -> nn.Module:
    """`model` as it is exported: in eval mode, in float32, on the CPU.

    Raises:
        ExportError: if it is no module, or one that cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise ExportError(f"Only modules can be exported, not {type(model).__name__}.")
    try:
        network = copy.deepcopy(model)
    except Exception as error:  # whatever a part of the user's module raises
        raise ExportError(f"The module cannot be copied for export: {error}") from error
    network = network.to("cpu", torch.float32).eval()
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def batches(images: Tensor) -> Iterator[Tensor]:
    """`images` in order: one alone, so that a batch of one is tried too, then up to 64 at once."""
    bounds = [0, *range(1, len(images), 64), len(images)]
    return (images[low:high] for low, high in pairwise(bounds))


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """What a network gives for `images`.

    Raises:
        ExportError: if it does not take them, or gives other than finite logits (N, classes).
    """
    outputs = []
    with torch.no_grad():
        for part in batches(images):
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
