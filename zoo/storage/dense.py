"""Load a checkpoint into a dense network: match every stored tensor to one of the network."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.common.notices import warn
from zoo.common.sizes import Size, parsed_size, spelled
from zoo.errors import CheckpointError, ZooError, integer
from zoo.models import ARCHITECTURES, Architecture, architecture, build_model
from zoo.models.adapters import adapted_names
from zoo.models.stem import RGB, transform_input, transforms_input
from zoo.storage.checkpoints import Checkpoint, check_values, read_checkpoint

__all__ = ["Dense", "Uninitialised", "load_dense"]

_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Dense:
    """A dense network with the weights of a checkpoint, in eval mode on the CPU.

    Attributes:
        image_size: in pixels per side, or (height, width).
        in_channels: channels of the images.
        new_classifier: whether the classifier is new, because the checkpoint has none or one for
            another number of classes.
    """

    module: nn.Module
    checkpoint: Checkpoint
    num_classes: int
    image_size: Size
    in_channels: int
    new_classifier: bool


def load_dense(
    arch: str,
    weights: str | Path | Mapping[str, Any] | nn.Module,
    *,
    image_size: Size | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    ema: bool = True,
) -> Dense:
    """The dense network that `weights` belong to.

    It shares no memory with `weights`, and has the data types of a fresh network: half-precision
    weights become float32. If the checkpoint holds more than the network
    (`net.backbone.conv1.weight` beside `loss.weight`), the tensors under the one name prefix that
    fits are taken, with a warning that names the prefix and what was left out. The number of image
    channels is read from the weights of the first convolution.

    Args:
        arch: an architecture's name.
        weights: as for `read_checkpoint`.
        image_size: in pixels per side, or (height, width). If the classifier's shape depends on the
            size, it decides; otherwise this value, the checkpoint's metadata or the architecture's
            default, in this order.
        num_classes: outputs of the classifier, by default those of the checkpoint's. If the
            checkpoint has no classifier, or one for another number, a new one is made.
        seed: of a new classifier, initialised as `build_model` does with this seed.
        ema: as for `read_checkpoint`.

    Raises:
        CheckpointError: as `read_checkpoint`; if the tensors do not fit `arch` (the message says
            how many and which are missing, unexpected or misshapen, and which architecture they do
            fit); if the tensors under several prefixes fit; if only the classifier is missing and
            `num_classes` is not given; as `check_values` for the tensors that are taken.
        ZooError: for a bad number of classes.
    """
    known = architecture(arch)
    if num_classes is not None:
        num_classes = integer("num_classes", num_classes, 1)
    if image_size is not None:
        image_size = known.checked_size(image_size)
    checkpoint = read_checkpoint(weights, ema=ema)
    preferred = image_size or _stated_size(checkpoint)
    try:
        try:
            fit = _adapted(known, checkpoint.shapes, preferred)
        except _Misfit as misfit:
            inner = _under_a_prefix(known, checkpoint, preferred)
            if inner is None:
                raise _nearest(misfit, known, checkpoint.shapes, preferred) from None
            fit = inner
        if fit.classes is None and num_classes is None:
            missing = ", ".join(sorted(_classifier(known)))
            raise CheckpointError(
                f"Its classifier is missing ({missing}): pass num_classes= for a new one."
            )
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.source.reference} does not fit {arch!r}. {error}"
            f"{_suggestion(arch, checkpoint.shapes)}"
        ) from None
    if image_size and image_size != fit.size:
        raise CheckpointError(
            f"The classifier in {checkpoint.source.reference} is for images of "
            f"{spelled(fit.size)} pixels, not {spelled(image_size)}."
        )
    module, classes = fit.module, num_classes or fit.classes
    assert classes is not None
    if new := classes != fit.classes:
        module = build_model(
            arch, classes, image_size=fit.size, in_channels=fit.in_channels, seed=seed
        )
    shapes, stored = _shapes(module), checkpoint.shapes
    taken = {name: own for name, own in fit.names.items() if shapes.get(own) == stored[name]}
    check_values({name: checkpoint.state[name] for name in taken}, checkpoint.source.reference)
    state = {own: checkpoint.state[name] for name, own in taken.items()}
    module.load_state_dict(state, strict=False)
    if isinstance(weights, nn.Module):
        transform_input(module, transforms_input(weights))
    return Dense(module.eval(), checkpoint, classes, fit.size, fit.in_channels, new)


def _stated_size(checkpoint: Checkpoint) -> Size | None:
    """The image size in the checkpoint's metadata, or None."""
    stated = checkpoint.metadata.get("image_size")
    if stated is None:
        return None
    try:
        return parsed_size("image_size", stated)
    except ZooError:
        raise CheckpointError(
            f"The checkpoint's metadata give the image size as {stated!r}."
        ) from None


class _Misfit(CheckpointError):
    """A checkpoint does not fit: `count` tensors are missing, unexpected or misshapen.

    If it would fit a network for images of another number of channels, `in_channels` is that one.
    """

    def __init__(self, message: str, count: int, in_channels: int | None = None) -> None:
        super().__init__(message)
        self.count = count
        self.in_channels = in_channels


@dataclass(frozen=True)
class _Fit:
    """An uninitialised network that the stored tensors fit.

    `names` gives for each stored name that in the network. `classes` is None if only the
    classifier's tensors are missing.
    """

    module: nn.Module
    names: Mapping[str, str]
    classes: int | None
    size: Size
    in_channels: int = RGB


def _under_a_prefix(
    known: Architecture, checkpoint: Checkpoint, image_size: Size | None
) -> _Fit | None:
    """As `_adapted`, for the tensors under the only name prefix that fits; None if none fits.

    Raises:
        CheckpointError: if several prefixes fit.
    """
    shapes = checkpoint.shapes
    with torch.device("meta"):
        parameters = dict(build_model(known.name, known.num_classes).named_parameters())
    least = len(parameters.keys() - _classifier(known))
    fits: dict[str, _Fit] = {}
    for prefix, own in _parts(shapes, least).items():
        with contextlib.suppress(_Misfit):
            fits[prefix] = _adapted(known, own, image_size)
    whole = {prefix: fit for prefix, fit in fits.items() if fit.classes is not None}
    fits = whole or fits
    if not fits:
        return None
    if len(fits) > 1:
        raise CheckpointError(
            f"It holds a network that fits under {' and under '.join(map(repr, fits))}: pass the "
            "state dict of the one you mean."
        )
    ((prefix, fit),) = fits.items()
    others = [name for name in shapes if not name.startswith(prefix)]
    left = f", and {len(others)} others left out: {_some(others)}" if others else ""
    warn(f"{checkpoint.source.reference}: the weights under {prefix!r} were taken{left}.")
    return replace(fit, names={prefix + name: new for name, new in fit.names.items()})


def _parts(shapes: _Shapes, least: int) -> dict[str, _Shapes]:
    """The shapes under each name prefix that at least `least` tensors share, without the prefix."""
    counts = Counter(name[: at + 1] for name in shapes for at, c in enumerate(name) if c == ".")
    return {
        prefix: {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
        for prefix, count in counts.items()
        if count >= least
    }


def _nearest(
    misfit: _Misfit, known: Architecture, shapes: _Shapes, image_size: Size | None
) -> _Misfit:
    """`misfit`, or that of the tensors under a prefix that most names share, if it is nearer."""
    for prefix, own in _parts(shapes, len(shapes) // 2 + 1).items():
        try:
            _adapted(known, own, image_size)
        except _Misfit as inner:
            if inner.count < misfit.count:
                others = [name for name in shapes if not name.startswith(prefix)]
                beside = f" Beside them: {_some(others)}." if others else ""
                misfit = _Misfit(f"Of the weights under {prefix!r}: {inner}{beside}", inner.count)
    return misfit


def _adapted(known: Architecture, shapes: _Shapes, image_size: Size | None) -> _Fit:
    """As `_fitting`, after renaming the tensors by the first adapter that makes them fit.

    Raises:
        _Misfit: that of the adapter that comes nearest.
    """
    misfits = []
    for adapter, names in adapted_names(shapes):
        renamed = {names[name]: shape for name, shape in shapes.items()}
        try:
            fit = _fitting(known, renamed, image_size)
        except _Misfit as misfit:
            read_as = f" (Its key names were read as those of {adapter}.)" if adapter else ""
            misfits.append(_Misfit(f"{misfit}{read_as}", misfit.count))
        else:
            return replace(fit, names=names)
    raise min(misfits, key=lambda misfit: misfit.count)


def _fitting(known: Architecture, shapes: _Shapes, image_size: Size | None) -> _Fit:
    """The network that tensors of these names and `shapes` fit, with or without its classifier.

    Raises:
        _Misfit: if they do not fit.
    """
    try:
        return _fitted(known, shapes, image_size, RGB)
    except _Misfit as misfit:
        if misfit.in_channels is None:
            raise
        try:
            return _fitted(known, shapes, image_size, misfit.in_channels)
        except _Misfit:  # then something else differs
            raise misfit from None
        except ZooError as error:
            raise _Misfit(f"{misfit} {error}", misfit.count) from None


def _fitted(
    known: Architecture,
    shapes: _Shapes,
    image_size: Size | None,
    in_channels: int,
) -> _Fit:
    """As `_fitting`, for a network whose images have `in_channels` channels."""
    problems = []
    classes: int | None = None
    size: Size = image_size or known.image_size
    try:
        classes, size = known.infer(shapes)
    except CheckpointError as error:
        problems.append(str(error))
    if image_size and known.flatten_stride is None:
        size = image_size
    with Uninitialised():
        module = build_model(
            known.name, classes or known.num_classes, image_size=size, in_channels=in_channels
        )
    expected = _shapes(module)
    wrong = {
        "missing": [
            name
            for name in expected
            if name not in shapes and not name.endswith("num_batches_tracked")
        ],
        "unexpected": [
            name
            for name in shapes
            if name not in expected and not (known.auxiliary and name.startswith(known.auxiliary))
        ],
        "misshapen": [
            f"{name} (expected {expected[name]}, got {shapes[name]})"
            for name in expected
            if shapes.get(name, expected[name]) != expected[name]
        ],
    }
    count = sum(map(len, wrong.values()))
    only_missing = count == len(wrong["missing"])
    if classes is None and only_missing and set(wrong["missing"]) == _classifier(known):
        return _Fit(module, {}, None, size, in_channels)
    for kind, names in wrong.items():
        if names:
            problems.append(f"{len(names)} {kind}: {_some(names)}.")
    if _is_pruned(expected, shapes):
        problems.append(
            "None is larger than expected: a pruned network is read by zoo.load_pruned."
        )
    if problems:
        raise _Misfit(" ".join(problems), count, _image_channels(expected, shapes))
    return _Fit(module, {}, classes, size, in_channels)


def _is_pruned(expected: _Shapes, shapes: _Shapes) -> bool:
    """Whether all tensors are there, none is larger, and some have fewer output channels."""
    pairs = [(shapes.get(name, ()), shape) for name, shape in expected.items()]
    return any(got[:1] != shape[:1] for got, shape in pairs) and all(
        len(got) == len(shape) and all(map(operator.le, got, shape)) for got, shape in pairs
    )


def _image_channels(expected: _Shapes, shapes: _Shapes) -> int | None:
    """The image channels of the checkpoint, if only input channels of convolutions differ."""
    pairs = [(shape, shapes.get(name, shape)) for name, shape in expected.items()]
    channels = set()
    for shape, got in pairs:
        if got == shape:
            continue
        if (len(shape), len(got)) != (4, 4) or shape[:1] + shape[2:] != got[:1] + got[2:]:
            return None
        channels.add(got[1] * RGB / shape[1])  # a stem may fold pixels into channels
    (number,) = channels if len(channels) == 1 else (0.0,)
    return int(number) if number >= 1 and number.is_integer() else None


def _classifier(known: Architecture) -> set[str]:
    """The tensors of an architecture whose shapes depend on the number of classes."""
    with torch.device("meta"):
        shapes, others = (
            _shapes(build_model(known.name, known.num_classes + more)) for more in (0, 1)
        )
    return {name for name, shape in shapes.items() if others[name] != shape}


def _some(names: list[str]) -> str:
    """The first three, then `...` if there are more."""
    return ", ".join([*names[:3], "..."] if len(names) > 3 else names)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _suggestion(arch: str, shapes: _Shapes) -> str:
    readings = [
        {names[name]: shape for name, shape in part.items()}
        for part in (shapes, *_parts(shapes, len(shapes) // 2 + 1).values())
        for _, names in adapted_names(part)
    ]
    others = [other for name, other in ARCHITECTURES.items() if name != arch]
    fitting = [repr(other.name) for other in others if any(_fits(other, r) for r in readings)]
    return f" The checkpoint fits {' or '.join(fitting)}." if fitting else ""


def _fits(known: Architecture, shapes: _Shapes) -> bool:
    try:
        known.infer(shapes)  # first, because it builds no network
        with torch.device("meta"):
            _fitting(known, shapes, None)
    except ZooError:
        return False
    return True


class Uninitialised(TorchFunctionMode):
    """Inside, networks are built without random initial weights, which would be replaced anyway.

    Unlike on the meta device, non-persistent buffers hold the values that their module computes.
    """

    RANDOM = frozenset(
        getattr(nn.init, name)
        for name in ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_")
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in self.RANDOM:
            return args[0] if args else kwargs["tensor"]
        if func is Tensor.normal_:  # zeros, because torch draws a truncated normal until it fits
            return args[0].zero_()
        return func(*args, **kwargs)
