"""Images that are not square: the same answers at (height, width) as for a live network of it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from helpers import CPU, macs_of
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch.utils.data import TensorDataset

import zoo
from zoo.cli import main
from zoo.common.sizes import Size, checked_size, parsed_size, spelled
from zoo.deployment.options import BenchmarkOptions
from zoo.deployment.padding import padded
from zoo.deployment.runtime import InferenceSession
from zoo.errors import ExportError, ZooError
from zoo.models import build_model, parameter_count
from zoo.spec.groups import InputShape
from zoo.spec.plans import PruningRecord
from zoo.storage.artefacts import save_checkpoint
from zoo.tracing.contract import randomised
from zoo.tracing.graph import channel_groups
from zoo.tracing.known_groups import groups_of

SIZE = (96, 320)


def record_of(model: nn.Module) -> PruningRecord:
    record = model.pruning
    assert isinstance(record, PruningRecord)
    return record


def pruned(arch: str, size: Size, cf: float = 2.0, **options: object) -> nn.Module:
    dense = randomised(zoo.create_model(arch, 5, image_size=size))
    return zoo.load(arch, cf, dense, profile="equal", image_size=size, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [SIZE, (90, 140)])
@pytest.mark.parametrize(
    "arch",
    [
        "torchvision:resnet18",  # stored
        "torchvision:mobilenet_v3_small",  # stored, with maps pooled to one position
        "torchvision:squeezenet1_1",  # traced, with strides that round down
    ],
)
def test_a_plan_by_name_is_that_of_the_live_network(arch, size):
    dense = build_model(arch, 5).eval()
    own = zoo.load(arch, 2, dense, metric="macs", profile="equal", image_size=size)
    live = zoo.prune(dense, torch.zeros(1, 3, *size), cf=2, metric="macs", profile="equal")
    plan, other = record_of(own).plan, record_of(live).plan
    assert plan == other
    assert plan.inputs == (InputShape((1, 3, *size)),)
    assert plan.pruned.params == parameter_count(own)
    assert (plan.dense.macs, plan.pruned.macs) == (macs_of(dense, size), macs_of(own, size))
    assert record_of(own).size == record_of(live).size == size


@pytest.mark.parametrize("size", [64, 100, 320, SIZE, (320, 96), (100, 33)])
@pytest.mark.parametrize(
    "arch", ["torchvision:vgg16_bn", "torchvision:efficientnet_b0", "timm:resnet18", "resnet20"]
)
def test_stored_groups_count_every_size_as_a_trace_does(arch, size):
    module = build_model(arch, 5)
    example = torch.zeros(1, 3, *np.broadcast_to(size, 2).tolist())
    assert groups_of(arch, module, size) == channel_groups(module, example)


def test_a_square_has_one_spelling():
    dense = build_model("resnet20-16", 5)
    square, paired = (
        record_of(zoo.load("resnet20-16", 2, dense, profile="equal", image_size=size))
        for size in (24, [24, 24])
    )
    assert square == paired
    assert (paired.size, paired.image_size, paired.plan.inputs) == (24, 24, ())


def test_sizes_are_spelled_and_read_alike():
    for size in (96, (96, 320), (1, 7)):
        assert parsed_size("size", spelled(size)) == size == checked_size("size", size)
    assert parsed_size("size", "96x96") == checked_size("size", np.array([96, 96]).tolist()) == 96
    for text in ("", "x", "96x", "x96", "0", "96x0", "-96", "96x320x3", "96X320", "9_6", "96.0"):
        with pytest.raises(ZooError, match="size is the pixels per side, as 96"):
            parsed_size("size", text)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((96,), r"an integer of at least 1, got \(96,\). For images .* give \(height, width\)"),
        ((3, 96, 320), r"image_size must be .*, got \(3, 96, 320\). For images .* give"),
        ((96, 0), "The width of image_size must be an integer of at least 1, got 0"),
        (("96", 320), "The height of image_size must be an integer of at least 1, got '96'"),
        ("96x320", "image_size must be an integer of at least 1, got '96x320'"),
    ],
)
def test_what_is_no_size_is_refused(size, message):
    for make in (
        lambda: zoo.create_model("resnet20", 5, image_size=size),
        lambda: zoo.load("resnet20", 2, {}, profile="equal", image_size=size),
    ):
        with pytest.raises(ZooError, match=message):
            make()


def test_a_flattened_map_is_square():
    dense = zoo.create_model("cnet", 5, image_size=(16, 16))
    for make in (
        lambda: zoo.create_model("cnet", 5, image_size=(16, 24)),
        lambda: zoo.create_model("cnet", 5, pretrained=dense, image_size=(16, 24)),
        lambda: zoo.load("cnet", 2, dense, profile="equal", image_size=(16, 24)),
    ):
        with pytest.raises(ZooError, match=r"cnet takes square images alone.*got 16x24"):
            make()


@pytest.mark.parametrize("arch", ["resnet20-16", "torchvision:squeezenet1_1"])
def test_a_saved_network_comes_back_with_both_sides(arch, tmp_path):
    model = pruned(arch, (40, 72))
    images = torch.rand(2, 3, 40, 72)
    back = zoo.load_pruned(zoo.save(model, tmp_path / "m"))
    assert back.pruning == model.pruning
    assert record_of(back).size == (40, 72)
    with torch.no_grad():
        assert torch.equal(back(images), model(images))
    assert "MACs at 3x40x72" in (tmp_path / "m" / "README.md").read_text()


def test_the_records_of_square_images_say_no_more_than_before(tmp_path):
    zoo.save(pruned("resnet20-16", 32), tmp_path)
    written = json.loads((tmp_path / "pruning.json").read_text())
    assert (written["image_size"], written["plan"]["inputs"]) == (32, [])
    assert "MACs at 3x32x32" in (tmp_path / "README.md").read_text()


def test_a_new_classifier_is_counted_at_both_sides(tmp_path):
    model = pruned("resnet20-16", (16, 40))
    model.fc = nn.Linear(model.fc.in_features, 9)
    plan = record_of(zoo.load_pruned(zoo.save(model, tmp_path))).plan
    assert plan.pruned.macs == macs_of(model, (16, 40))
    assert plan.inputs == (InputShape((1, 3, 16, 40)),)


def test_the_exported_file_has_both_sides(tmp_path):
    model = pruned("torchvision:resnet18", SIZE, 3)
    result = zoo.export(model, tmp_path / "m.onnx")
    assert (result.inputs, result.pad) == ("noise", 8)
    (given,) = onnx.load(tmp_path / "m.onnx").graph.input
    assert [d.dim_value for d in given.type.tensor_type.shape.dim[1:]] == [3, *SIZE]
    session = InferenceSession(tmp_path / "m.onnx", CPU)
    assert session.image_shape == (None, 3, *SIZE)
    assert session.metadata.image_shape == (3, *SIZE)
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(session(images), model(images), rtol=1e-3, atol=1e-3)
    with pytest.raises(ExportError, match=r"shape \(N, 3, 96, 320\)"):
        session(torch.rand(2, 3, 320, 96))


@pytest.mark.parametrize(
    "arch", ["resnet20", "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small"]
)
def test_padding_changes_no_output(arch):
    model = randomised(pruned(arch, (40, 72), 3))
    images = torch.rand(2, 3, 40, 72).double()
    wider = padded(model, 8)
    assert parameter_count(wider) > parameter_count(model)
    with torch.no_grad():
        torch.testing.assert_close(wider(images), model(images), rtol=1e-9, atol=1e-9)


def test_networks_are_measured_at_both_sides():
    dense, model = build_model("resnet20", 5).eval(), pruned("resnet20", (24, 56))
    options = BenchmarkOptions(
        batch_sizes=(2,), repeats=3, warmup=1, memory=False, providers=(CPU,)
    )
    (row,) = zoo.benchmark(dense, model, options=options)
    assert row.macs_ratio == macs_of(dense, (24, 56)) / macs_of(model, (24, 56))


def test_latency_is_of_images_of_both_sides():
    plan = record_of(pruned("resnet20", (24, 56), 1.5, metric="latency")).plan
    assert plan.latency is not None
    assert plan.latency.inputs == plan.inputs == (InputShape((1, 3, 24, 56)),)
    assert plan.dense.latency > plan.pruned.latency > 0


def test_a_recorded_teacher_teaches_a_network_of_its_size(tmp_path):
    base = build_model("resnet20-16", 3)
    save_checkpoint(base, tmp_path / "base.safetensors", {"image_size": "16x24"})
    model = zoo.load("resnet20-16", 2, tmp_path / "base.safetensors", profile="equal")
    assert record_of(model).size == (16, 24)
    images = TensorDataset(torch.rand(12, 3, 16, 24), torch.arange(12) % 3)
    recipe = zoo.Recipe(epochs=1, batch_size=4)
    result = zoo.finetune(model, images, images, recipe=recipe, teacher="source", cpu=True)
    assert result.teacher == str(tmp_path / "base.safetensors")


# --- the command line -----------------------------------------------------------------------------


def test_the_commands_take_a_height_and_a_width(streets, tmp_path, capsys):
    base, out, file = tmp_path / "base.safetensors", tmp_path / "out", tmp_path / "m.onnx"
    data = ["--data", f"imagefolder:{streets}"]
    train = ["train", "--arch", "resnet20-16", *data, "--size", "12x40", "--epochs", "1"]
    assert main([*train, "--out", str(base)]) == 0
    with safe_open(base, framework="pt") as checkpoint:
        assert checkpoint.metadata()["image_size"] == "12x40"
    prune = ["prune", "resnet20-16", "--cf", "2", "--weights", str(base), "--profile", "equal"]
    assert main([*prune, *data, "--criterion", "taylor", "--out", str(out)]) == 0
    assert record_of(zoo.load_pruned(out)).size == (12, 40)
    assert main(["finetune", str(out), *data, "--epochs", "1"]) == 0
    capsys.readouterr()
    for network in (out, base):
        assert main(["evaluate", str(network), *data]) == 0
        assert "at 12x40" in capsys.readouterr().out
        for flags in ([], data):
            assert main(["export", str(network), str(file), *flags]) == 0
            assert InferenceSession(file, CPU).image_shape == (None, 3, 12, 40)
            assert InferenceSession(file, CPU).metadata.image_shape == (3, 12, 40)
    quick = ["--batch-sizes", "1", "--repeats", "1", "--no-memory", "--threads", "1"]
    assert main(["benchmark", str(out), *quick]) == 0
    assert main(["compare", str(base), str(out), *data, *quick]) == 0
    assert main([*prune, "--size", "16", "--out", str(tmp_path / "square")]) == 0
    assert record_of(zoo.load_pruned(tmp_path / "square")).size == 16
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "square"), str(out), *quick]) == 2
    assert "images of 12x40, 16 pixels" in capsys.readouterr().err
    picture = Image.open(streets / "val" / "left" / "0.png")
    whole = picture.resize((80, 24), Image.Resampling.NEAREST)  # which the session halves again
    session = InferenceSession(file, CPU)
    assert np.allclose(session(whole), session(picture), atol=1e-4)


@pytest.mark.parametrize("name", ["train", "prune", "finetune", "evaluate", "export", "compare"])
def test_a_size_that_is_none_is_one_error(name, capsys):
    required = {
        "train": ["--arch", "resnet20", "--out", "m", "--data", "digits"],
        "prune": ["resnet20", "--cf", "2", "--weights", "w", "--out", "m"],
        "finetune": ["folder", "--data", "digits"],
        "evaluate": ["folder", "--data", "digits"],
        "export": ["folder", "m.onnx"],
        "compare": ["folder"],
    }
    for text in ("big", "96x", "0", "96x320x3"):
        assert main([name, *required[name], "--size", text]) == 2
        assert capsys.readouterr().err == (
            "zoo: error: --size is the pixels per side, as 96, or height and width, as 96x320; "
            f"got {text!r}.\n"
        )
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "--size PIXELS|HxW" in capsys.readouterr().out


def test_the_command_refuses_a_flattened_map_of_two_sides(tmp_path, capsys):
    save_checkpoint(build_model("cnet", 5, image_size=16), tmp_path / "c.safetensors", {})
    flags = ["--weights", str(tmp_path / "c.safetensors"), "--profile", "equal", "--out", "m"]
    assert main(["prune", "cnet", "--cf", "2", *flags, "--size", "16x24"]) == 2
    assert "cnet takes square images alone" in capsys.readouterr().err
