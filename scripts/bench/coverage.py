"""Prune one member of every convolutional family of timm and torchvision 2x, and check it.

    python scripts/bench/coverage.py --out runs/coverage

Each member is traced, planned (`equal`, random channels), cut, checked against the contract of
surgery (`zoo.tracing.contract`, in float64, with every tensor random), audited, exported and run in
ONNX Runtime. Torch-Pruning's own pruner is run on the same network. Every member's results are
stored in a file, so that a second call continues; then the table is written. All of it takes an
hour on one core.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
import tyro
from rival import Outcome, halve, in_own_process
from torch import Tensor, nn

import zoo
from zoo.errors import ExportError, ZooError
from zoo.models import build_model
from zoo.spec.groups import ChannelGroups
from zoo.tracing.audit import audit
from zoo.tracing.contract import randomised, violation
from zoo.tracing.graph import analyse
from zoo.tracing.verification import verify

Result = TypeVar("Result")

CLASSES = 10
BOUND = 1e-9
LIMIT = 900.0
"""Seconds for one member."""

FAMILIES: dict[str, tuple[str, int]] = {
    "alexnet": ("torchvision:alexnet", 128),
    "convnext": ("torchvision:convnext_tiny", 64),
    "densenet": ("torchvision:densenet121", 64),
    "efficientnet": ("torchvision:efficientnet_b0", 64),
    "googlenet": ("torchvision:googlenet", 64),
    "inception": ("torchvision:inception_v3", 128),
    "mnasnet": ("torchvision:mnasnet0_5", 64),
    "mobilenetv2": ("torchvision:mobilenet_v2", 64),
    "mobilenetv3": ("torchvision:mobilenet_v3_small", 64),
    "regnet": ("torchvision:regnet_x_400mf", 64),
    "resnet": ("torchvision:resnet18", 64),
    "shufflenetv2": ("torchvision:shufflenet_v2_x0_5", 64),
    "squeezenet": ("torchvision:squeezenet1_1", 64),
    "vgg": ("torchvision:vgg11_bn", 64),
    "byoanet": ("timm:halonet_h1", 256),
    "byobnet": ("timm:mobileone_s0", 64),
    "convmixer": ("timm:convmixer_768_32", 64),
    "convnext (timm)": ("timm:convnext_atto", 64),
    "cpubone": ("timm:cpubone_nano", 64),
    "cspnet": ("timm:cs3darknet_focus_s", 64),
    "cspnext": ("timm:cspnext_tiny", 64),
    "densenet (timm)": ("timm:densenet121", 64),
    "dla": ("timm:dla46x_c", 64),
    "dpn": ("timm:dpn48b", 64),
    "edgenext": ("timm:edgenext_xx_small", 64),
    "efficientformer": ("timm:efficientformer_l1", 224),
    "efficientformer_v2": ("timm:efficientformerv2_s0", 224),
    "efficientnet (timm)": ("timm:mnasnet_small", 64),
    "efficientvim": ("timm:efficientvim_m1", 64),
    "efficientvit_mit": ("timm:efficientvit_b0", 64),
    "efficientvit_msra": ("timm:efficientvit_m0", 224),
    "fasternet": ("timm:fasternet_t0", 64),
    "fastvit": ("timm:fastvit_t8", 64),
    "focalnet": ("timm:focalnet_tiny_srf", 64),
    "ghostnet": ("timm:ghostnet_050", 64),
    "hardcorenas": ("timm:hardcorenas_b", 64),
    "hgnet": ("timm:hgnetv2_b0", 64),
    "hrnet": ("timm:hrnet_w18_small", 64),
    "iformer": ("timm:iformer_t", 64),
    "inception_next": ("timm:inception_next_atto", 64),
    "inception_resnet_v2": ("timm:inception_resnet_v2", 128),
    "inception_v3": ("timm:inception_v3", 128),
    "inception_v4": ("timm:inception_v4", 128),
    "lcnetv2": ("timm:lcnetv2_small", 64),
    "lowformer": ("timm:lowformer_b0", 64),
    "mambaout": ("timm:mambaout_femto", 64),
    "maxxvit": ("timm:test_coatnet", 160),
    "metaformer": ("timm:poolformerv2_s12", 64),
    "mobilenetv3 (timm)": ("timm:lcnet_035", 64),
    "mobilenetv5": ("timm:mobilenetv5_base", 64),
    "mobilevit": ("timm:mobilevit_xxs", 64),
    "nasnet": ("timm:nasnetalarge", 96),
    "nextvit": ("timm:nextvit_small", 64),
    "nfnet": ("timm:nf_regnet_b0", 64),
    "pnasnet": ("timm:pnasnet5large", 96),
    "rdnet": ("timm:rdnet_tiny", 64),
    "regnet (timm)": ("timm:regnetx_002", 64),
    "repghost": ("timm:repghostnet_050", 64),
    "repvit": ("timm:repvit_m1", 64),
    "res2net": ("timm:res2next50", 64),
    "resnest": ("timm:resnest14d", 64),
    "resnet (timm)": ("timm:resnet10t", 64),
    "resnetv2": ("timm:resnetv2_18", 64),
    "rexnet": ("timm:rexnet_100", 64),
    "selecsls": ("timm:selecsls42", 64),
    "senet": ("timm:legacy_seresnet18", 64),
    "shvit": ("timm:shvit_s1", 64),
    "sknet": ("timm:skresnet18", 64),
    "starnet": ("timm:starnet_s050", 64),
    "swiftformer": ("timm:swiftformer_xs", 224),
    "tresnet": ("timm:tresnet_m", 64),
    "vgg (timm)": ("timm:vgg11", 64),
    "visformer": ("timm:visformer_tiny", 224),
    "vovnet": ("timm:ese_vovnet19b_slim_dw", 64),
    "xception": ("timm:legacy_xception", 64),
    "xception_aligned": ("timm:xception41p", 64),
}
"""Family -> (a small member, image size: 64 where the network allows it)."""


@dataclass(frozen=True)
class Row:
    """The results of one member.

    Attributes:
        verdict: `ok`, or what went wrong.
        share: share of the parameters that belong to some channel group.
        groups, whole: number of channel groups, and of layers that stay whole.
        got: compression factor reached in parameters; 2 was asked for.
        error: the largest relative difference of the contract, over outputs and gradients.
        onnx: `yes` if ONNX Runtime computes what the pruned network does.
        stale: integer attributes of modules that were right before pruning and are wrong after it.
        trace_seconds: of tracing and interpreting.
        verify_seconds: of verifying the pruned network.
        prune_seconds: of `zoo.prune` as a whole.
    """

    verdict: str
    share: float = 0.0
    groups: int = 0
    whole: int = 0
    got: float = 0.0
    error: float = 0.0
    onnx: str = ""
    stale: int = 0
    trace_seconds: float = 0.0
    verify_seconds: float = 0.0
    prune_seconds: float = 0.0


@dataclass(frozen=True)
class Options:
    """Prune one member of every family and write the table.

    Attributes:
        out: folder of the results, one file per member.
        table: where the table goes.
        families: only these; all by default.
        rival: whether Torch-Pruning runs too.
    """

    out: Path = Path("runs/coverage")
    table: Path = Path("docs/coverage.md")
    families: tuple[str, ...] = field(default_factory=tuple)
    rival: bool = True


def shrinking_share(groups: ChannelGroups) -> float:
    """The fraction of parameters that lie in a slot of some group."""
    owned: dict[tuple[str, int], int] = {}
    for group in groups.groups:
        for slot in group.slots:
            key = slot.tensor, slot.dim
            owned[key] = owned.get(key, 0) + slot.block * group.size
    total = whole = 0.0
    for name, shape in groups.shapes.items():
        if name in groups.buffers:
            continue
        size = fixed = 1.0
        for dim, length in enumerate(shape):
            size *= length
            fixed *= length - owned.get((name, dim), 0)
        total, whole = total + size, whole + fixed
    return 1 - whole / total


def covered(arch: str, size: int) -> Row:
    """Prune `arch` 2x and check everything that can be checked without data."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    module = build_model(arch, CLASSES).eval()
    started = time.perf_counter()
    pruned = zoo.prune(module, images, cf=2, profile="equal")
    plan = pruned.pruning.plan
    cutting = time.perf_counter() - started
    started = time.perf_counter()
    program, groups = analyse(module, images)
    tracing = time.perf_counter() - started
    started = time.perf_counter()
    verify(module, groups, plan, images, program)
    verifying = time.perf_counter() - started
    double = randomised(build_model(arch, CLASSES))
    program, groups = analyse(double, images.double())
    error = math.inf
    for seed in range(1, 9):  # in some random networks no signal reaches the outputs to compare
        if math.isinf(error):
            error = violation(randomised(double, seed), program, groups, plan, images.double())
    onnx = _exported(pruned, images) or ("" if _exported(module, images) else "neither does dense")
    row = Row(
        verdict="ok",
        share=shrinking_share(groups),
        groups=len(groups.groups),
        whole=len(plan.unprunable),
        got=plan.got,
        error=error,
        onnx=onnx,
        stale=len(audit(module, pruned, images)),
        trace_seconds=tracing,
        verify_seconds=verifying,
        prune_seconds=cutting,
    )
    return replace(row, verdict=_verdict(row))


def _exported(module: nn.Module, images: Tensor) -> str:
    """`yes` if ONNX Runtime computes what the module does, else an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            zoo.export(module, Path(folder) / "model.onnx", example_input=images)
        except ExportError as error:
            print(f"  {error}")
            return ""
    return "yes"


def _verdict(row: Row) -> str:
    if not row.error <= BOUND:
        return f"breaks the contract: {row.error:.1e}"
    if abs(row.got / 2 - 1) > 0.01:
        return f"asked 2x, got {row.got:.2f}x"
    if row.stale:
        return f"{row.stale} attributes are stale"
    return "ok" if row.onnx else "pruned does not export"


def _guarded(arch: str, size: int) -> Row:
    """As `covered`, in a process of its own; a failure becomes the verdict."""
    try:
        return in_own_process(LIMIT, _covered_or_refused, arch, size)
    except (TimeoutError, ChildProcessError) as error:
        return Row(str(error))


def _covered_or_refused(arch: str, size: int) -> Row:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ZOO_CACHE"] = cache  # empty, so that the network is traced again
        try:
            return covered(arch, size)
        except ZooError as error:
            return Row(str(error))


def _stored(path: Path, kind: type[Result], compute: Callable[[], Result]) -> Result:
    """The stored result of an earlier call, or a new one, which is stored at once."""
    if path.is_file():
        return kind(**json.loads(path.read_text()))
    result = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result)))
    return result


# --- the table ------------------------------------------------------------------------------------


def table(rows: dict[str, Row], rivals: dict[str, Outcome]) -> str:
    """The results as a page in Markdown."""
    lines = [
        "# Coverage",
        "",
        "<!-- python scripts/bench/coverage.py -->",
        "One member of every convolutional family of torchvision and timm, pruned to half its",
        "parameters (`equal`, random channels). *shrinking* is the share of parameters in some",
        "channel group; *whole* counts layers that stay dense, with a reason in the plan (layers",
        "of one channel among them);",
        "*contract* is the largest relative difference of the pruned network from the dense one",
        "with zeros, over outputs and all gradients, in float64 with every tensor random; *ONNX*",
        "says whether ONNX Runtime computes what the pruned network does; seconds are of tracing,",
        "of verifying the pruned network, and of `zoo.prune` as a whole, which does both.",
        "Torch-Pruning is its own pruner at ratio 0.5 on the same network within a minute: its",
        "compression factor, or what went wrong. It passes where parameters fall below 60 %.",
        _machine(),
        "",
        "| family | member | pixels | shrinking | groups | whole | asked | got | contract | ONNX "
        "| trace s | verify s | prune s | verdict | Torch-Pruning |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---|---|",
    ]
    for family, row in rows.items():
        arch, size = FAMILIES[family]
        rival = rivals.get(family)
        lines.append(
            f"| {family} | `{arch}` | {size} | {row.share:.0%} | {row.groups} | {row.whole} | 2 "
            f"| {row.got:.3f} | {row.error:.0e} | {row.onnx or 'no'} | {row.trace_seconds:.1f} "
            f"| {row.verify_seconds:.2f} | {row.prune_seconds:.1f} | {_short(row.verdict)} "
            f"| {_beside(rival)} |"
        )
    passed = sum(row.verdict == "ok" for row in rows.values())
    lines += ["", f"prunezoo: {passed} of {len(rows)} pass."]
    if rivals:
        won = sum(rival.verdict == "ok" for rival in rivals.values())
        lines[-1] += f" Torch-Pruning {_version('torch-pruning')}: {won} of {len(rivals)}."
    return "\n".join(lines) + "\n"


def _beside(rival: Outcome | None) -> str:
    if rival is None:
        return ""
    if rival.pruned:
        return f"{rival.verdict}, {rival.factor:.2f}x in {rival.seconds:.1f} s"
    return _short(rival.verdict)


def _short(text: str) -> str:
    text = text.replace("|", "/").replace("\n", " ")
    return text if len(text) <= 90 else f"{text[:87]}..."


def _machine() -> str:
    packages = ("torch", "torchvision", "timm")
    versions = ", ".join(f"{package} {_version(package)}" for package in packages)
    return f"One thread of {platform.machine()}, {versions}."


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def main(options: Options) -> None:
    rows: dict[str, Row] = {}
    rivals: dict[str, Outcome] = {}
    for family in options.families or FAMILIES:
        arch, size = FAMILIES[family]
        name = arch.replace(":", "--")
        rows[family] = _stored(
            options.out / f"{name}.json", Row, functools.partial(_guarded, arch, size)
        )
        note = f"{family}: {rows[family].verdict}"
        if options.rival:
            rivals[family] = _stored(
                options.out / f"{name}.rival.json", Outcome, functools.partial(halve, arch, size)
            )
            note += f"; Torch-Pruning: {rivals[family].verdict}"
        print(note, flush=True)
    options.table.write_text(table(rows, rivals))


if __name__ == "__main__":
    main(tyro.cli(Options))
