"""Exported files compute what their modules compute, or do not exist."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import noise
from onnxscript import ir
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zoo.deployment.exporting
import zoo.deployment.runtime
from zoo import ExportOptions
from zoo.data.datasets import ImageSet
from zoo.data.images import ImageFiles
from zoo.deployment.exporting import export
from zoo.deployment.parity import TOLERANCES, Comparison, compare_outputs, gather
from zoo.deployment.runtime import InferenceSession
from zoo.errors import ExportError
from zoo.models import build_model
from zoo.spec.cost import Cost
from zoo.spec.plans import Plan, PruningRecord, Source

CPU = ["CPUExecutionProvider"]

OLD = onnx.helper.make_model(onnx.helper.make_graph([], "old", [], [])).SerializeToString()


class Small(nn.Module):
    """Convolution, batch norm, a shortcut and a flatten, on 3 x 8 x 8 images."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 16, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn(self.conv1(images)).relu()
        x = nn.functional.max_pool2d(x + self.conv2(x), 2)
        return self.fc(x.flatten(1))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` with no batch-norm buffer or affine parameter left at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.bias.data):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            for tensor in (layer.running_var, layer.weight.data):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return module


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Small())


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    export(randomised(Small()), path, inputs=noise(8))
    return path


@pytest.mark.parametrize(
    ("arch", "size"), [("cnet", 32), ("resnet20-16", 32), ("torchvision:mobilenet_v2", 64)]
)
def test_exported_file_computes_the_module_at_any_batch_size(
    arch: str, size: int, tmp_path: Path
) -> None:
    model = randomised(build_model(arch, 7)).train()
    path = tmp_path / "model.onnx"
    result = export(model, path, inputs=noise(5, size))
    assert result.relative_difference <= 1e-3
    assert (result.images, result.inputs, result.top1_agreement) == (5, "given", 1.0)
    assert (result.path, result.bytes) == (path, path.stat().st_size)
    assert list(tmp_path.iterdir()) == [path]
    session = InferenceSession(path, CPU)
    assert session.image_shape == (None, 3, size, size)
    model.eval()
    for batch in (1, 3, 17):
        images = noise(batch, size, seed=batch)
        with torch.no_grad():
            expected = model(images)
        got = session(images)
        assert (got.dtype, got.shape) == (torch.float32, (batch, 7))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(got.numpy(), session(images.double().numpy()))


def test_the_callers_module_is_untouched(small: nn.Module, tmp_path: Path) -> None:
    small.train()
    small.conv2.eval()
    small.fc.weight.requires_grad_(False)
    small = small.double().to(memory_format=torch.channels_last)
    small.conv1.register_forward_hook(lambda *_: None)
    small(noise(2).double()).sum().backward()
    parameters = dict(small.named_parameters())
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    gradient = small.conv1.weight.grad.clone()
    random_state = torch.get_rng_state()
    export(small, tmp_path / "small.onnx", inputs=noise(4))
    assert [small.training, small.conv2.training, small.bn.training] == [True, False, True]
    assert all(value is parameters[name] for name, value in small.named_parameters())
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert (tensor.dtype, tensor.stride()) == (before[name].dtype, before[name].stride())
    assert not small.fc.weight.requires_grad
    assert small.conv1.weight.requires_grad
    assert torch.equal(small.conv1.weight.grad, gradient)
    assert len(small.conv1._forward_hooks) == 1
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_hook_that_changes_outputs_is_exported_too(small: nn.Module, tmp_path: Path) -> None:
    small.eval().fc.register_forward_hook(lambda _module, _args, output: output * 2)
    export(small, tmp_path / "small.onnx", inputs=noise(4))
    got = InferenceSession(tmp_path / "small.onnx", CPU)(noise(4))
    torch.testing.assert_close(got, small(noise(4)).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shift", [0.5, float("nan")])
@pytest.mark.parametrize("old", [None, OLD])
def test_a_file_that_computes_something_else_never_appears(
    shift: float,
    old: bytes | None,
    small: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "small.onnx"
    if old is not None:
        path.write_bytes(old)
    right = zoo.deployment.acceptance._runner

    def perturbed(file: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """Another value in the first image of every batch."""

        def run(images: Tensor) -> tuple[Tensor, ...]:
            (logits,) = right(file)(images)
            logits[0, 0] += shift
            return (logits,)

        return run

    monkeypatch.setattr(zoo.deployment.acceptance, "_runner", perturbed)
    with pytest.raises(ExportError, match="differ by"):
        export(small, path, inputs=noise(10))
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([old] if old else [])


def test_top1_disagreement_counts_only_where_pytorch_is_sure() -> None:
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.9999], [0.0, 1.0], [0.0, 1.0]])
    swapped = reference.flip(1)
    assert compare_outputs((reference,), (swapped,), 1e-3) == Comparison(1.0, 1.0, 0.25)
    assert compare_outputs((reference,), (swapped,), 0.0).top1_agreement == 0
    huge = reference * 1e4
    assert compare_outputs((huge,), (huge + 5,), 1e-3).relative_difference == 5e-4


@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1.0, 1e6])
def test_differences_are_judged_by_the_outputs_own_magnitude(unit: float) -> None:
    reference, swapped = (
        torch.tensor(rows) * unit for rows in ([[2.0, 1], [1, 2]], [[1.0, 2]] * 2)
    )
    result = compare_outputs((reference,), (swapped,), 1e-2)
    assert (result.relative_difference, result.top1_agreement) == (pytest.approx(0.5), 0.5)
    assert not TOLERANCES["fp32"].allows(result)
    near = compare_outputs((reference,), (reference * (1 + 1e-6),), 1e-3)
    assert TOLERANCES["fp32"].allows(near)
    nothing = torch.zeros(2, 2)
    assert TOLERANCES["fp32"].allows(compare_outputs((nothing,), (nothing,), 1e-3))
    assert not TOLERANCES["fp16"].allows(compare_outputs((reference,), (nothing,), 1e-2))


class Dropping(Small):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(images), training=True) * 1e-3


class Tiny(Small):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * 1e-8


@pytest.mark.parametrize(("kind", "precision"), [(Dropping, "fp32"), (Tiny, "fp16")])
def test_small_outputs_are_compared_too(
    kind: type[nn.Module], precision: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="of the largest value"):
        export(kind(), tmp_path / "a.onnx", inputs=noise(32), precision=precision)
    assert list(tmp_path.iterdir()) == []
    export(Tiny(), tmp_path / "a.onnx", inputs=noise(32))


def test_what_is_no_logits_agrees_by_the_variance_that_is_explained() -> None:
    score = torch.arange(8.0)[:, None] + 100
    constant = score.mean().expand(8, 1)
    assert compare_outputs((score,), (score,), 0) == Comparison(0.0, 0.0, None, 1.0)
    near = compare_outputs((score,), (constant,), 0)  # 4 % off, and useless
    assert (near.relative_difference < 0.04, near.top1_agreement, near.r2) == (True, None, 0.0)
    maps = torch.rand(4, 2, 3, 3)
    worst = compare_outputs((score, maps), (score, maps * 0.9), 0)
    assert 0 < 1 - worst.r2 < 0.2
    logits = torch.eye(3)
    both = compare_outputs((logits, score), (logits.flip(1), score), 0)
    assert (both.top1_agreement, both.r2) == (pytest.approx(1 / 3), 1.0)
    nothing = torch.full((8, 1), torch.nan)
    assert not TOLERANCES["int8"].allows(compare_outputs((score,), (nothing,), 0))


def test_accuracies_are_of_both_on_the_labels() -> None:
    reference = torch.eye(4)
    got = reference[[0, 1, 3, 2]]
    result = compare_outputs((reference,), (got,), 0.0, torch.tensor([0, 1, 2, 0]))
    assert (result.module_accuracy, result.accuracy) == (0.75, 0.5)


def test_without_inputs_parity_runs_on_noise_and_says_so(small: nn.Module, tmp_path: Path) -> None:
    result = export(small, tmp_path / "small.onnx", example_input=torch.zeros(1, 3, 8, 8))
    assert (result.inputs, result.images) == ("noise", 16)
    assert result.max_abs_difference > 0


def test_inputs_are_at_most_256_images_spread_over_the_set(
    small: nn.Module, tmp_path: Path
) -> None:
    pixels = torch.randint(256, (600, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    half = (0.5, 0.5, 0.5)
    labels = torch.arange(600) // 120
    data = ImageSet("five by file order", pixels.byte(), labels, tuple("abcde"), half, half)
    images, spread = gather(data, 256)
    assert torch.equal(images, data.normalise(data.images[::3]))
    assert torch.equal(spread, labels[::3])
    images, first = gather(DataLoader(data, 100), 256)
    assert images.shape == (256, 3, 8, 8)
    assert torch.equal(first, labels[:256])
    assert gather(noise(300), 256)[0].shape == (256, 3, 8, 8)
    images, none = gather(TensorDataset(noise(257)), 256)
    assert images.shape == (129, 3, 8, 8)
    assert none is None
    result = export(small, tmp_path / "small.onnx", inputs=data)
    assert (result.inputs, result.images) == ("five by file order", 200)


def test_images_too_many_for_memory_have_a_name_too(small: nn.Module, tmp_path: Path) -> None:
    for side in (9, 12):
        Image.new("RGB", (side, side), "teal").save(tmp_path / f"{side}.png")
    paths = tuple(tmp_path / f"{side}.png" for side in (9, 12))
    half = (0.5,) * 3
    files = ImageFiles("teal squares", paths, 8, torch.tensor([0, 1]), tuple("abcde"), half, half)
    result = export(small, tmp_path / "small.onnx", inputs=files)
    assert (result.inputs, result.images) == ("teal squares", 2)


def test_a_pruned_module_exports_with_its_record(small: nn.Module, tmp_path: Path) -> None:
    plan = Plan(
        "bundled:small/params-cf2", "params", 2.0, 2.03125, {}, {}, "random", 0,
        Cost(203, 10), Cost(100, 5), 8,
    )  # fmt: skip
    source = Source("/home/somebody/secret.pt", "ab" * 32)
    small.pruning = PruningRecord("small", 5, 8, plan, "pretrained", source, {})
    result = export(small, tmp_path / "small.onnx")
    assert result.inputs == "noise"
    file = onnx.load(tmp_path / "small.onnx")
    metadata = {item.key: item.value for item in file.metadata_props}
    assert metadata == {
        "prunezoo": "1",
        "precision": "fp32",
        "architecture": "small",
        "profile": "bundled:small/params-cf2",
        "metric": "params",
        "compression_factor": "2.03125",
        "num_classes": "5",
        "image_shape": "[3, 8, 8]",
        "source_sha256": "ab" * 32,
    }
    assert file.opset_import[0].version == result.opset


def test_the_file_tells_nothing_about_the_machine_it_was_made_on(small_file: Path) -> None:
    content = small_file.read_bytes()
    assert b".py" not in content
    assert str(Path.home()).encode() not in content
    assert small_file.stat().st_mode & 0o777 == 0o644


class Branching(Small):
    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits if logits.sum() > 0 else -logits


class FixedBatch(Small):
    def forward(self, images: Tensor) -> Tensor:
        count = int(images.shape[0])
        return super().forward(images).reshape(count, 5) * torch.ones(count, 1)[:2].sum()


class Nothing(Small):
    def forward(self, images: Tensor) -> int:
        return len(super().forward(images))


class Squeezed(Small):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).squeeze()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Branching, "cannot be converted to ONNX: "),
        (Nothing, "gives no tensors"),
        (Squeezed, re.escape("An output has shape (5,) for 1 item(s), and (3, 5) for 3")),
    ],
)
def test_modules_that_cannot_be_exported_say_why_and_print_nothing(
    kind: type[nn.Module], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=message):
        export(kind(), tmp_path / "model.onnx", inputs=noise(4))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_batch_size_baked_into_the_module_is_never_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot be converted to ONNX: .*batch"):
        export(FixedBatch(), tmp_path / "model.onnx", inputs=noise(4))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_an_error(small: nn.Module, tmp_path: Path) -> None:
    small.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ExportError, match="not finite"):
        export(small, tmp_path / "small.onnx", inputs=noise(4))


def test_what_is_no_module_or_cannot_be_copied_is_named(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    for other, kind in ((small.state_dict(), "OrderedDict"), ("small.pt", "str")):
        with pytest.raises(ExportError, match=f"Only modules can be exported, not {kind}"):
            export(other, path, inputs=noise(4))  # type: ignore[arg-type]
    small.lock = threading.Lock()
    with pytest.raises(ExportError, match=r"cannot be copied for export: .*lock"):
        export(small, path, inputs=noise(4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "inputs= .* or example_input="),
        (
            {"precision": "fp61", "inputs": noise(4)},
            r"Unknown precision 'fp61'\. .*Known: fp32, fp16, int8, ",
        ),
        ({"inputs": noise(4)[0]}, r"take inputs of shape \(1, 8, 8\) .* 3 channels"),
        ({"inputs": noise(0)}, re.escape("not (0, 3, 8, 8) of float32")),
        ({"inputs": (noise(4), "text")}, re.escape("not [(4, 3, 8, 8) of float32, str]")),
        (
            {"inputs": (noise(4), noise(4)), "options": ExportOptions(mean=[0] * 3, std=[1] * 3)},
            "mean and std are for networks of one batch of images",
        ),
        ({"inputs": (noise(4), noise(4))}, r"shape \[\(1, 3, 8, 8\) of float32, .* 3 were given"),
        ({"inputs": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "must be float images"),
        ({"example_input": torch.zeros(3, 8, 8)}, r"take inputs of shape \(1, 8, 8\)"),
        ({"inputs": [(np.zeros((4, 3, 8, 8)), 0)]}, "give ndarray"),
        ({"inputs": []}, "hold no images"),
        ({"inputs": [noise(2), noise(2, 4)]}, "several shapes"),
        ({"inputs": noise(4, size=6)}, re.escape("does not take inputs of shape (1, 3, 6, 6)")),
    ],
)
def test_bad_arguments_are_named(
    options: dict, message: str, small: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export(small, tmp_path / "small.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_path_is_an_error_before_any_work(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the export had started")

    monkeypatch.setattr(zoo.deployment.exporting, "sample_of", never)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "model.onnx", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(ExportError, match=r"cannot be written|is a folder"):
            export(small, path, inputs=noise(4))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_the_old_file(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.onnx"
    path.write_bytes(OLD)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(ExportError, match="No space left"):
        export(small, path, inputs=noise(4))
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [OLD]


def test_exporting_and_running_print_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from zoo.models import build_model\n"
        "from zoo.deployment.exporting import export\n"
        "from zoo.deployment.runtime import InferenceSession\n"
        "assert 'onnxruntime' not in sys.modules and 'onnx' not in sys.modules\n"
        "images = torch.zeros(2, 3, 16, 16)\n"
        "export(build_model('cnet', 4, image_size=16), sys.argv[1], example_input=images)\n"
        "assert InferenceSession(sys.argv[1])(images).shape == (2, 4)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cnet.onnx")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
