"""Entry points: create a network, load and prune a checkpoint, prune a live network, save."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from zoo.common.quiet import ONE_AT_A_TIME
from zoo.common.sizes import Size
from zoo.deployment.options import Runtime
from zoo.errors import GraphError, ZooError, unknown
from zoo.models import architecture, build_model
from zoo.planning.best import BEST
from zoo.planning.latency import Clock
from zoo.planning.request import Request, planned, request
from zoo.registry import hub
from zoo.spec.groups import ChannelGroups
from zoo.spec.plans import Plan, PruningRecord, Source
from zoo.spec.profile import Profile
from zoo.storage.artefacts import MODEL, read_model, write_model
from zoo.storage.checkpoints import RECORD
from zoo.storage.dense import load_dense
from zoo.surgery import surgery
from zoo.surgery.initialisation import reinitialise
from zoo.surgery.surgery import named_tensors
from zoo.tracing.calls import Inputs, checked_inputs, mapped
from zoo.tracing.exporting import checked_classes
from zoo.tracing.graph import analyse
from zoo.tracing.known_groups import groups_of, traced_groups
from zoo.tracing.program import Program
from zoo.tracing.rewriting import rewritten
from zoo.tracing.verification import verify as verified

__all__ = ["create_model", "load", "load_pruned", "plan", "prune", "save"]

Weights = str | Path | Mapping[str, Tensor] | nn.Module
Init = Literal["pretrained", "random", "rewound"]

_no_inference_mode = torch.inference_mode(mode=False)
"""Leaves the caller's `torch.inference_mode()`, whose tensors could not be trained outside it."""


@_no_inference_mode
def create_model(
    arch: str,
    num_classes: int,
    *,
    pretrained: Weights | None = None,
    image_size: Size | None = None,
    seed: int = 0,
    ema: bool = True,
) -> nn.Module:
    """The dense network of an architecture, from `seed` or with `pretrained` weights.

    Args:
        arch: a registered name, `torchvision:<name>` or `timm:<name>`.
        num_classes: outputs of the classifier.
        pretrained: a checkpoint, as in `load`; only the classifier is random if the checkpoint has
            none, or one for another number of classes.
        image_size: pixels per side, or (height, width); only architectures that flatten a map
            (cnet) depend on it, and these take square images only.
        seed: of the random weights.
        ema: as in `load`.

    Raises:
        ZooError: for an unknown architecture or an invalid number of classes.
        CheckpointError: for a checkpoint that does not fit.
    """
    if pretrained is None:
        return build_model(arch, num_classes, image_size=image_size, seed=seed)
    return load_dense(
        arch, pretrained, image_size=image_size, num_classes=num_classes, seed=seed, ema=ema
    ).module


@_no_inference_mode
def load(
    arch: str,
    cf: float | None = None,
    weights: Weights | None = None,
    *,
    profile: str | Profile = BEST,
    metric: str = "params",
    criterion: str = "random",
    init: Init = "pretrained",
    rewind: Weights | None = None,
    seed: int = 0,
    align: int | None = None,
    floor: float = 0.0,
    keep: Mapping[str, float] | None = None,
    refit: bool = False,
    data: Dataset[Any] | DataLoader[Any] | None = None,
    runtime: Runtime | None = None,
    image_size: Size | None = None,
    num_classes: int | None = None,
    ema: bool = True,
) -> nn.Module:
    """A pruned network from a dense checkpoint, by a profile that was found on other data.

    A profile's kept counts are applied unchanged, whatever the number of classes or the image size.
    `module.pruning.plan` records the factor asked for and the one that this network meets.

    Args:
        arch: a registered name, `torchvision:<name>` or `timm:<name>`.
        cf: compression factor, dense / pruned; a `Profile` or a reference has one of its own.
        weights: a checkpoint's path, a state dict, a module, `bundled:<architecture>/<name>`, or
            `hf:<org>/<repo>[/<file>][@<rev>]`. There is no default.
        profile: `best`, the bundled searched profile (rescaled where `align`, `floor` or `keep` are
            given) or what the evidence puts before it;
            `searched`, that profile or an error; a policy's name, a reference, or a `Profile`.
            `module.pruning.plan.profile` says what `best` took.
        metric: what `cf` counts: `params`, `macs` or `latency`, which is measured once and cached:
            in PyTorch on this machine's CPU, at batch 1, or as `runtime` says.
        criterion: how channels are scored: `random`, `l1`, `l2`, `fpgm`, `bn_scale`, `synflow`;
            or, with `data`, `taylor`, `taylor_weight`, `fisher`, `obd`, `snip`, `apoz`,
            `reinforce` (learnt by trial, in minutes).
        init: weights of the pruned network: the `pretrained` ones, `random` ones, or `rewound`
            ones, with the channels still chosen on `weights` (Frankle and Carbin, 2019).
        rewind: for `rewound`, a checkpoint of the same network, early in training or untrained.
        seed: of the random choice of channels, the `random` policy, `init="random"` and a new
            classifier.
        align: every width is a multiple of it, or not cut, or pinned by `keep`; by default 1, or
            what `runtime` is measured to compute without waste. `align`, `floor` and `keep` are for
            a policy, or a profile with `refit`.
        floor: smallest keep ratio of any channel group that `keep` does not pin.
        keep: module name or prefix -> keep ratio that its channel groups are pinned to. A group
            is also of the layers whose outputs are added to those that it is named after.
        refit: rescale the profile's keep ratios by one common factor to meet `cf` for this network.
        data: labelled images for criteria that need them.
        runtime: where the exported file will run: ONNX Runtime's provider, precision and batch.
            Layers are timed there, on this machine, for the metric `latency`.
        image_size: pixels per side, or (height, width), at which MACs are counted and latency is
            measured; by default the checkpoint's or the architecture's.
        num_classes: outputs of a new classifier with random weights, if the checkpoint has none, or
            one for another number of classes; `module.pruning.new_classifier` records it.
        ema: if the checkpoint has averaged weights beside the others, load the averaged ones, as
            timm and torchvision's scripts do, with a warning. False loads the others.

    Returns:
        An ordinary `nn.Module` in eval mode that shares nothing with `weights`. Its attribute
        `pruning` is a `PruningRecord`.

    Raises:
        FactorError: if no profile exists for the factor, the given profile is for another factor,
            or the policy cannot reach the factor.
        ExportError: if the provider of `runtime` cannot be used here.
        CheckpointError: if the checkpoint is unsafe, broken or of another architecture, or has no
            classifier and `num_classes` is not given.
    """
    known = architecture(arch)
    if image_size is not None:
        image_size = known.checked_size(image_size)
    if init not in get_args(Init):
        raise unknown("init", init, get_args(Init))
    if (init == "rewound") != (rewind is not None):
        raise ZooError(
            f"init='rewound' needs rewind=, the checkpoint to go back to, and only it takes one; "
            f"got init={init!r} {'without' if rewind is None else 'with'} rewind=."
        )
    if weights is None:
        raise ZooError(f"Which checkpoint of {arch} is to be pruned? Pass weights=.")
    # before the weights are read, so that a missing profile fails at once
    asked = request(
        profile, arch, cf=cf, metric=metric, criterion=criterion, seed=seed, align=align,
        floor=floor, keep=keep, refit=refit, data=data is not None,
    )  # fmt: skip
    clock = _clock(runtime)
    dense = load_dense(
        arch, weights, image_size=image_size, num_classes=num_classes, seed=seed, ema=ema
    )
    groups = groups_of(arch, dense.module, dense.image_size, dense.in_channels)
    made = planned(dense.module, groups, asked, data, clock)
    module, classes = dense.module, dense.num_classes
    early: Source | None = None
    if rewind is not None:
        wanted = classes if dense.new_classifier else None
        rewound = load_dense(
            arch, rewind, image_size=dense.image_size, num_classes=wanted, seed=seed, ema=ema
        )
        module, early = rewound.module, rewound.checkpoint.source
        if rewound.num_classes != classes:
            raise ZooError(f"rewind= has {rewound.num_classes} classes, weights= has {classes}.")
        if rewound.in_channels != dense.in_channels:
            raise ZooError(
                f"rewind= is for images of {rewound.in_channels} channels, weights= for those of "
                f"{dense.in_channels}."
            )
    return _cut(
        module,
        groups,
        made,
        arch,
        classes,
        dense.checkpoint.source,
        init,
        early,
        new_classifier=dense.new_classifier,
        in_channels=dense.in_channels,
    )


@_no_inference_mode
def plan(
    module: nn.Module,
    example_input: Inputs,
    *,
    cf: float | None = None,
    profile: str | Profile = BEST,
    metric: str = "params",
    criterion: str = "random",
    seed: int = 0,
    align: int | None = None,
    floor: float = 0.0,
    keep: Mapping[str, float] | None = None,
    data: Dataset[Any] | DataLoader[Any] | None = None,
    runtime: Runtime | None = None,
    rewrite: bool = False,
) -> Plan:
    """The plan that `prune` would execute with the same arguments; nothing is pruned."""
    asked = request(
        profile, cf=cf, metric=metric, criterion=criterion, seed=seed, align=align, floor=floor,
        keep=keep, data=data is not None,
    )  # fmt: skip
    return _live(module, example_input, asked, data, rewrite, _clock(runtime)).plan


@_no_inference_mode
def prune(
    module: nn.Module,
    example_input: Inputs,
    *,
    cf: float | None = None,
    profile: str | Profile = BEST,
    metric: str = "params",
    criterion: str = "random",
    seed: int = 0,
    align: int | None = None,
    floor: float = 0.0,
    keep: Mapping[str, float] | None = None,
    data: Dataset[Any] | DataLoader[Any] | None = None,
    runtime: Runtime | None = None,
    rewrite: bool = False,
    verify: bool = True,
) -> nn.Module:
    """A pruned copy of any live network that can be traced; `module` is not changed.

    Args:
        module: a network that returns tensors, in any structure of tuples, lists, dicts and
            dataclasses. All its outputs keep their shapes.
        example_input: what it is called with, of the size that MACs are counted at: one batch
            (N, C, H, W), or any other tensor, a tuple of them in order, or a dict by name. MACs are
            those of one item of the first tensor's first dimension.
        cf: compression factor, dense / pruned; optional if `profile` is a `Profile` or a reference.
        profile: `best`, a policy's name, a reference, or a `Profile`.
        metric: as in `load`, but `latency` is measured on the device of `module`, at batch size 1
            (64 on CUDA), if there is no `runtime`.
        criterion, seed, align, floor, keep, data, runtime: as in `load`.
        rewrite: prune the traced program in place of the module, so that constants in `forward`,
            as in `x.view(-1, 2048)`, follow the widths. The result keeps the parameters' names but
            none of the module's code. In training mode only batch norm and dropout change.
        verify: before returning, compare the outputs of the pruned and the masked dense network,
            both with random weights, on two items of the input.

    Raises:
        GraphError: if the network does not run on the input, cannot be traced, has nothing to
            prune, or does not pass `verify`.
        FactorError: if the factor is not the profile's, or the policy cannot reach it.
    """
    asked = request(
        profile, cf=cf, metric=metric, criterion=criterion, seed=seed, align=align, floor=floor,
        keep=keep, data=data is not None,
    )  # fmt: skip
    live = _live(module, example_input, asked, data, rewrite, _clock(runtime))
    if verify:
        verified(live.module, live.groups, live.plan, live.inputs, live.program)
    source = Source("module")
    return _cut(live.module, live.groups, live.plan, "", live.classes, source, rewrite=rewrite)


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a pruned network to a folder: safetensors, pruning.json and README.md.

    A new folder appears whole. In one that is there the new files, read back before, replace the
    old; an error puts these back.

    Raises:
        ZooError: if the network has no pruning record, or the folder cannot be written.
    """
    write_model(model, Path(folder).expanduser())
    return Path(folder).expanduser()


@_no_inference_mode
def load_pruned(folder: str | Path, *, skeleton: nn.Module | None = None) -> nn.Module:
    """The pruned network that `save` wrote, without tracing or pickle; a path needs no internet.

    Args:
        folder: its path, or `hf:<org>/<repo>[@<revision>]`.
        skeleton: the dense network, for a network from `prune`, whose record has no architecture.

    Raises:
        ZooError: for a missing, incomplete or malformed folder.
    """
    if isinstance(folder, str) and folder.startswith("hf:"):
        record, pinned = hub.download(hub.HubReference.parse(folder).alone().file(RECORD))
        hub.download(pinned.file(MODEL))
        return read_model(record.parent, skeleton=skeleton)
    return read_model(folder, skeleton=skeleton)


@dataclass(frozen=True)
class _Live:
    """A live network, traced and planned; `program` is None if the groups were cached."""

    module: nn.Module
    inputs: Inputs
    groups: ChannelGroups
    program: Program | None
    plan: Plan
    classes: int


def _live(
    module: nn.Module,
    example_input: Inputs,
    asked: Request,
    data: Dataset[Any] | DataLoader[Any] | None,
    rewrite: bool,
    clock: Clock | None,
) -> _Live:
    with ONE_AT_A_TIME:  # its modes are switched meanwhile, and threads may share it
        # copies, because forward may overwrite its input, and autograd refuses tensors made in
        # torch.inference_mode()
        inputs = mapped(torch.clone, checked_inputs(example_input))
        classes = checked_classes(module, inputs)
        if any(tensor.is_inference() for tensor in named_tensors(module).values()):
            module = surgery.resized(module, {})
        if rewrite and asked.metric == "latency":
            raise ZooError("With rewrite=True the metric is params or macs: latency needs layers.")
        network = rewritten(module, inputs) if rewrite else module
        program, groups = (analyse if rewrite else traced_groups)(network, inputs)
    if not groups.groups:
        kept = "; ".join(f"{name!r} ({reason})" for name, reason in groups.unprunable.items())
        raise GraphError(
            f"{type(module).__name__} has no channel group that can be pruned."
            f"{f' Not pruned: {kept}.' if kept else ''}"
        )
    made = planned(module, groups, asked, data, clock)
    return _Live(network, inputs, groups, program, made, classes)


def _clock(runtime: Runtime | None) -> Clock | None:
    """The clock that measures latency in `runtime`; None for PyTorch's."""
    if runtime is None:
        return None
    from zoo.deployment.layer_times import RuntimeClock

    return RuntimeClock(runtime)


def _cut(
    module: nn.Module,
    groups: ChannelGroups,
    made: Plan,
    arch: str,
    classes: int,
    source: Source,
    init: Init = "pretrained",
    rewind: Source | None = None,
    *,
    rewrite: bool = False,
    new_classifier: bool = False,
    in_channels: int = 3,
) -> nn.Module:
    pruned = surgery.apply(module, groups, made)
    if init == "random":
        reinitialise(pruned, made.seed)
    packages = ("prunezoo", "torch", "torchvision", "timm")
    record = PruningRecord(
        architecture=arch,
        num_classes=classes,
        image_size=made.image_size,
        plan=made,
        init=init,
        source=source,
        versions={package: importlib.metadata.version(package) for package in packages},
        rewind=rewind,
        rewritten=rewrite,
        new_classifier=new_classifier,
        in_channels=in_channels,
    )
    pruned.pruning = record  # type: ignore[assignment]
    return pruned.eval()
