"""What a dense network can do, its pruned copy can do too: the audit, and every way to use it."""

from __future__ import annotations

import copy
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureListNet
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zoo
from zoo.models import build_model
from zoo.tracing.audit import audit
from zoo.tracing.contract import randomised

FAST = (
    "timm:test_resnet",
    "timm:test_efficientnet",
    "timm:test_byobnet",
    "timm:test_convnext",
    "timm:test_mambaout",
    "torchvision:resnet18",
    "torchvision:squeezenet1_1",
)
TIMM = tuple(name for name in FAST if name.startswith("timm:"))
AUDITED = (*FAST, "timm:dpn48b", "timm:fastvit_t8")


@cache
def networks(name: str) -> tuple[nn.Module, nn.Module]:
    """A network with nothing at its initial value, and its half; neither is to be edited."""
    dense = randomised(build_model(name, 10, seed=1)).float()
    return dense, zoo.prune(dense, images(), cf=2)


def images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def storages(module: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}


@pytest.mark.parametrize("name", AUDITED)
def test_nothing_is_stale_after_surgery(name: str) -> None:
    dense, pruned = networks(name)
    assert audit(dense, pruned, images()) == []


def test_the_audit_sees_what_is_stale() -> None:
    dense, pruned = networks("timm:test_byobnet")
    stale: Any = copy.deepcopy(pruned)
    stale.num_features += 1
    stale.feature_info[2]["num_chs"] += 1
    stale.stages[1][0].conv1_1x1.bn.num_features += 1
    stale.head.in_features += 1
    found = " ".join(audit(dense, stale, images()))
    for name in (":num_features", ":feature_info.2.num_chs", "bn:num_features", "head:in_features"):
        assert f"{name} is" in found


@pytest.mark.parametrize("name", FAST)
def test_copied_exported_and_in_bfloat16(name: str) -> None:
    _, pruned = networks(name)
    expected = pruned(images())
    twin = copy.deepcopy(pruned)
    assert torch.equal(twin(images()), expected)
    assert not storages(pruned) & storages(twin)
    exported = torch.export.export(pruned, (images(),)).module()
    torch.testing.assert_close(exported(images()), expected)
    half = twin.bfloat16()(images().bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@pytest.mark.parametrize("name", FAST)
def test_trains_and_leaves_the_original_alone(name: str) -> None:
    _, pruned = networks(name)
    expected = pruned(images())
    model = copy.deepcopy(pruned).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(3):
        loss = nn.functional.cross_entropy(model(images(4, step)), torch.arange(4))
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for weight, parameter in model.named_parameters():
        assert parameter.grad is not None, weight
        assert parameter.isfinite().all(), weight
    assert not torch.equal(model.eval()(images()), expected)
    assert torch.equal(pruned(images()), expected)


@pytest.mark.parametrize("name", TIMM)
def test_gets_another_classifier(name: str) -> None:
    _, pruned = networks(name)
    model: Any = copy.deepcopy(pruned)
    model.reset_classifier(7)
    model(images()).sum().backward()
    assert model(images()).shape == (2, 7)
    model.reset_classifier(0)
    features = model(images())
    assert features.shape == (2, model.head_hidden_size)
    expected: Any = pruned
    torch.testing.assert_close(
        features, expected.forward_head(expected.forward_features(images()), pre_logits=True)
    )


@pytest.mark.parametrize("name", TIMM)
def test_gives_the_features_that_its_info_promises(name: str) -> None:
    _, pruned = networks(name)
    info: Any = pruned.feature_info
    promised = [entry["num_chs"] for entry in info]
    nested = any("." in entry["module"] for entry in info)  # as timm's `features_only` sets it
    taps = tuple(range(len(info)))
    for wrap in (
        partial(FeatureListNet, flatten_sequential=nested),
        partial(FeatureHookNet, flatten_sequential=nested),
        FeatureGetterNet,
    ):
        extractor = wrap(copy.deepcopy(pruned), out_indices=taps).eval()
        last = name == "timm:test_mambaout" and wrap is not FeatureGetterNet
        assert [feature.shape[-1 if last else 1] for feature in extractor(images())] == promised
        assert extractor.feature_info.channels() == promised


def test_is_fused_for_deployment() -> None:
    _, pruned = networks("timm:fastvit_t8")
    fused = reparameterize_model(pruned)
    assert len(list(fused.modules())) < len(list(pruned.modules()))
    torch.testing.assert_close(fused(images()), pruned(images()), rtol=1e-3, atol=1e-3)


def test_attributes_survive_saving(tmp_path: Path) -> None:
    weights = build_model("timm:test_resnet", 10, seed=1).state_dict()
    pruned: Any = zoo.load("timm:test_resnet", 2, weights, profile="equal")
    dense = timm.create_model("test_resnet", num_classes=10)
    loaded: Any = zoo.load_pruned(zoo.save(pruned, tmp_path / "half"))
    assert loaded.num_features == pruned.num_features < dense.num_features
    assert loaded.head_hidden_size == pruned.head_hidden_size
    assert loaded.feature_info == pruned.feature_info != dense.feature_info
    assert audit(dense, loaded, images()) == []


def test_exports_to_onnx(tmp_path: Path) -> None:
    _, pruned = networks("timm:test_convnext")
    zoo.export(pruned, tmp_path / "model.onnx", example_input=images())
    got = zoo.InferenceSession(tmp_path / "model.onnx")(images().numpy())
    torch.testing.assert_close(torch.as_tensor(got), pruned(images()), rtol=1e-3, atol=1e-3)


# --- distributed ----------------------------------------------------------------------------------


def gradients(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(batch).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def replica(rank: int, model: nn.Module, folder: str) -> None:
    """One of two processes: the gradients that it ends with, of its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=1),
    )
    try:
        found = gradients(DistributedDataParallel(model), images(4)[rank::2])
    finally:
        torch.distributed.destroy_process_group()
    torch.save(found, Path(folder) / f"{rank}.pt")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    _, pruned = networks("timm:test_byobnet")
    other = torch.multiprocessing.spawn(
        replica, (copy.deepcopy(pruned), str(tmp_path)), nprocs=1, join=False
    )
    replica(1, copy.deepcopy(pruned), str(tmp_path))
    assert other.join(60)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    expected = gradients(copy.deepcopy(pruned), images(4))
    assert len(first) == len(expected) == len(list(pruned.parameters()))
    for name, gradient in expected.items():
        assert torch.equal(first[f"module.{name}"], second[f"module.{name}"])
        torch.testing.assert_close(first[f"module.{name}"], gradient, rtol=1e-3, atol=1e-5)
