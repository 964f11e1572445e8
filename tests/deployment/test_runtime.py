"""Sessions: what they take, on which provider, and what they say when they cannot."""

from __future__ import annotations

import copy
import gc
import os
import re
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from learnt import halves, trained
from PIL import Image
from torch import Tensor, nn

from zoo.deployment import providers as onnx_providers
from zoo.deployment.export import export
from zoo.deployment.options import ExportOptions
from zoo.deployment.runtime import InferenceSession
from zoo.errors import DataError, ExportError, ZooError

CPU = "CPUExecutionProvider"


def noise(count: int, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cnet for images of 8x8 that knows its classes, mean and std."""
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    model, splits = trained("cnet")
    export(model, path, inputs=splits.val)
    return path


@pytest.fixture(scope="module")
def folded_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "folded.onnx"
    model, splits = trained("cnet")
    export(model, path, inputs=splits.val, options=ExportOptions(fold=True))
    return path


def pictures(count: int, size: int = 8) -> list[Image.Image]:
    pixels = halves(8).test.images[:count].permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array).resize((size, size), 0) for array in pixels]


def test_arrays_tensors_and_pictures_give_the_same_logits(
    small_file: Path, folded_file: Path
) -> None:
    session = InferenceSession(small_file, CPU)
    test = halves(8).test
    images = test.normalise(test.images[:5])
    expected = session(images)
    assert isinstance(expected, Tensor)
    assert (expected.argmax(1) == test.labels[:5]).any()
    of_array = session(images.numpy())
    assert isinstance(of_array, np.ndarray)
    np.testing.assert_array_equal(of_array, expected.numpy())

    class Foreign:
        """An array of another library, which speaks DLPack and nothing else."""

        def __dlpack__(self, **options: Any) -> Any:
            return images.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return images.__dlpack_device__()

    assert torch.equal(session(Foreign()), expected)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(session(strided.requires_grad_()), expected)
    for file in (session, InferenceSession(folded_file, CPU)):
        np.testing.assert_allclose(file(pictures(5)), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(file(pictures(5, 24)), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(file(pictures(1)[0]), expected[:1], rtol=1e-4, atol=1e-4)


def test_a_folder_and_a_generator_are_predicted_in_order(
    small_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inner").mkdir()
    names = [Path("a.png"), Path("b.bmp"), Path("inner/c.png"), Path("inner/d.PNG")]
    for name, picture in zip(names, pictures(4), strict=True):
        picture.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    session = InferenceSession(small_file, CPU)
    expected = session(pictures(4))
    from_folder = list(session.predict(tmp_path, batch_size=3))
    assert [path for path, _ in from_folder] == [tmp_path / name for name in names]
    np.testing.assert_allclose([logits for _, logits in from_folder], expected, atol=1e-5)
    taken = []

    def endless() -> Iterator[Image.Image]:
        while True:
            taken.append(1)
            yield pictures(4)[(len(taken) - 1) % 4]

    from_generator = session.predict(endless(), batch_size=2)
    first = [next(from_generator) for _ in range(4)]
    assert [number for number, _ in first] == [0, 1, 2, 3]
    assert len(taken) == 4
    np.testing.assert_allclose([logits for _, logits in first], expected, atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_picture_is_passed_by_and_a_broken_one_loses_no_other(
    small_file: Path, tmp_path: Path
) -> None:
    for number, picture in enumerate(pictures(4)):
        picture.save(tmp_path / f"{number}.png")
    (tmp_path / "album.jpg").mkdir()
    (tmp_path / "._0.png").write_bytes(b"of another system")
    (tmp_path / "weights.h5").write_bytes(b"no picture")
    session = InferenceSession(small_file, CPU)
    whole = dict(session.predict(tmp_path))
    assert [path.name for path in whole] == ["0.png", "1.png", "2.png", "3.png"]
    (tmp_path / "3.png").write_bytes(b"broken")
    got = []
    with pytest.raises(DataError, match=r"3\.png cannot be read"):
        got.extend(session.predict(tmp_path))
    assert [path.name for path, _ in got] == ["0.png", "1.png", "2.png"]
    for path, logits in got:
        np.testing.assert_allclose(logits, whole[path], atol=1e-5)


class Refusing:
    """What speaks DLPack, but not now."""

    def __dlpack__(self, **_: object) -> object:
        raise BufferError("not exportable")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def test_what_is_no_image_and_no_images_is_an_error(small_file: Path) -> None:
    session = InferenceSession(small_file, CPU)
    with pytest.raises(ExportError, match="Refusing cannot be read through DLPack: not exportable"):
        session(Refusing())
    for lone in (pictures(1)[0], 5):
        with pytest.raises(ExportError, match="a folder or an iterable of images"):
            session.predict(lone)  # type: ignore[arg-type]


def test_pictures_that_cannot_be_read_or_prepared_are_errors(
    small_file: Path, tmp_path: Path
) -> None:
    session = InferenceSession(small_file, CPU)
    with pytest.raises(DataError, match="holds no pictures"):
        session.predict(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        session.predict(tmp_path / "absent")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        list(session.predict(tmp_path))
    with pytest.raises(ExportError, match="several shapes"):
        list(session.predict([noise(1)[0], noise(1, 9)[0]]))
    with pytest.raises(ExportError, match="several shapes"):
        session([noise(1)[0].numpy(), noise(1, 9)[0].numpy()])
    with pytest.raises(ExportError, match="There are no images"):
        session([])
    with pytest.raises(ExportError, match="not str"):
        session("a.png")
    with pytest.raises(ZooError, match="batch_size"):
        session.predict(tmp_path, batch_size=0)
    model, _ = trained("cnet")
    export(model, tmp_path / "silent.onnx", inputs=noise(4))
    with pytest.raises(ExportError, match="does not say how pictures become its images"):
        InferenceSession(tmp_path / "silent.onnx", CPU)(pictures(1))


def test_a_read_only_array_is_taken_in_silence(small_file: Path) -> None:
    images = noise(2).numpy()
    expected = InferenceSession(small_file, CPU)(images)
    images.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(InferenceSession(small_file, CPU)(images), expected)


def test_a_gpu_sees_batches_of_one_shape_alone(small_file: Path) -> None:
    """The last one is filled up, and what that adds is dropped."""
    session = InferenceSession(small_file, CPU)
    plain = InferenceSession(small_file, CPU)
    shapes = []

    class Buffers:
        def run(self, images: Tensor) -> Tensor:
            shapes.append(tuple(images.shape))
            return plain(images)

    session._buffers = Buffers()
    images = noise(8)
    got = list(session.predict(images.numpy(), batch_size=3))
    assert shapes == [(3, 3, 8, 8)] * 3
    assert [number for number, _ in got] == list(range(8))
    np.testing.assert_allclose([logits for _, logits in got], plain(images), atol=1e-5)


def changed(path: Path, **properties: str) -> Path:
    """A copy of a file with other metadata."""
    file = onnx.load(path)
    known = {item.key: item.value for item in file.metadata_props}
    onnx.helper.set_model_props(file, known | properties)
    copy = path.with_name("changed.onnx")
    onnx.save(file, copy)
    return copy


def test_metadata_come_back_as_they_went_and_foreign_ones_are_let_be(small_file: Path) -> None:
    model, splits = trained("cnet")
    metadata = InferenceSession(small_file, CPU).metadata
    assert metadata.classes == splits.val.classes
    assert (metadata.mean, metadata.std) == (splits.val.mean, splits.val.std)
    assert metadata.image_shape == (3, 8, 8)
    assert metadata.compression_factor == model.pruning.plan.got
    with pytest.raises(ExportError, match="mean is 'grey' in the metadata"):
        InferenceSession(changed(small_file, mean="grey"), CPU)
    for values, message in (
        ({"mean": '"abc"'}, r"changed\.onnx\.mean: expected a list, got 'abc'"),
        ({"mean": '["a", "b", "c"]'}, "expected a number, got 'a'"),
        ({"image_shape": "[3, 8, 8.5]"}, "expected an integer, got 8.5"),
    ):
        with pytest.raises(ExportError, match=message):
            InferenceSession(changed(small_file, **values), CPU)
    with pytest.raises(ExportError, match="does not say how pictures become its images"):
        InferenceSession(changed(small_file, std="[1, 1]"), CPU)(pictures(1))
    with pytest.raises(ExportError, match="newer prunezoo"):
        InferenceSession(changed(small_file, prunezoo="2"), CPU)
    file = onnx.load(small_file)
    onnx.helper.set_model_props(file, {"mean": "grey"})
    onnx.save(file, small_file.with_name("foreign.onnx"))
    foreign = InferenceSession(small_file.with_name("foreign.onnx"), CPU)
    assert foreign.metadata.mean == ()
    assert foreign(noise(2)).shape == (2, 6)


@pytest.mark.parametrize(("field", "value"), [("opset", 99), ("ir", 99)])
def test_a_file_too_new_for_onnx_runtime_says_what_to_upgrade(
    field: str, value: int, small_file: Path
) -> None:
    file = onnx.load(small_file)
    if field == "opset":
        file.opset_import[0].version = value
    else:
        file.ir_version = value
    path = small_file.with_name("new.onnx")
    path.write_bytes(file.SerializeToString())
    with pytest.raises(ExportError, match=r"cannot load .*newer than onnxruntime [\d.]+: upgrade"):
        InferenceSession(path, CPU)


def test_a_provider_that_fails_at_run_time_is_one_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A reshape that only even batches survive."""
    tensors = onnx.TensorProto
    images = onnx.helper.make_tensor_value_info("images", tensors.FLOAT, ["batch", 3, 8, 8])
    logits = onnx.helper.make_tensor_value_info("logits", tensors.FLOAT, ["pairs", 384])
    shape = onnx.helper.make_tensor("shape", tensors.INT64, [2], [-1, 384])
    node = onnx.helper.make_node("Reshape", ["images", "shape"], ["logits"])
    graph = onnx.helper.make_graph([node], "pairs", [images], [logits], [shape])
    opset = [onnx.helper.make_opsetid("", 18)]
    path = tmp_path / "pairs.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    session = InferenceSession(path, CPU)
    assert session(noise(4)).shape == (2, 384)
    with pytest.raises(
        ExportError, match=r"CPUExecutionProvider failed on 3 images in pairs\.onnx"
    ):
        session(noise(3))
    assert capfd.readouterr() == ("", "")


def test_cuda_graphs_need_cuda(small_file: Path) -> None:
    for providers in (CPU, onnx_providers.TENSORRT, [onnx_providers.TENSORRT, onnx_providers.CUDA]):
        with pytest.raises(ExportError, match="CUDA graphs need CUDAExecutionProvider, not "):
            InferenceSession(small_file, providers, cuda_graph=True)
    if not torch.cuda.is_available():
        with pytest.raises(ExportError, match="CUDAExecutionProvider cannot be used here"):
            InferenceSession(small_file, cuda_graph=True)


class Machine:
    """An ONNX Runtime with providers of which some work; the others fail, or are left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: dict[str, str | None]) -> None:
        machine, self.tried = self, []

        class Session:
            def __init__(self, *_: Any, providers: list[tuple[str, dict]], **__: Any) -> None:
                self.names = [name for name, _ in providers]
                machine.tried.append(self.names)
                for name in self.names:
                    if failures.get(name):
                        raise RuntimeError(failures[name])

            def get_providers(self) -> list[str]:
                return [*(name for name in self.names if name not in failures), CPU]

        ort = onnx_providers.onnxruntime_module()
        built = [onnx_providers.TENSORRT, onnx_providers.CUDA, CPU]
        monkeypatch.setattr(ort, "InferenceSession", Session)
        monkeypatch.setattr(ort, "get_available_providers", lambda: built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_tensorrt_comes_before_cuda_and_cuda_behind_it(
    small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, cuda = onnx_providers.TENSORRT, onnx_providers.CUDA
    machine = Machine(monkeypatch, {})
    for asked, names in (
        (None, [tensorrt, cuda]),
        ([tensorrt], [tensorrt, cuda]),
        ([cuda], [cuda]),
        ([tensorrt, CPU], [tensorrt, cuda, CPU]),
    ):
        assert onnx_providers.open_session(small_file, asked, None, False).names == names
    assert onnx_providers.open_session(small_file, None, None, True).names == [cuda]
    assert len(machine.tried) == 5
    machine = Machine(monkeypatch, {tensorrt: None})
    assert onnx_providers.open_session(small_file, None, None, False).names == [cuda]
    assert machine.tried == [[tensorrt, cuda], [cuda]]


def test_the_reason_of_a_failure_is_quoted(
    small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, cuda = onnx_providers.TENSORRT, onnx_providers.CUDA
    Machine(monkeypatch, {cuda: "Failed to allocate 9 bytes.\nat line 8"})
    for options in ({"providers": [cuda]}, {"cuda_graph": True}):
        asked = {"providers": None, "threads": None, "cuda_graph": False} | options
        with pytest.raises(ExportError, match=r"here: Failed to allocate 9 bytes\. Av") as caught:
            onnx_providers.open_session(small_file, **asked)
        assert f"Available: {tensorrt}, {CPU}. " in str(caught.value)
        assert "line 8" not in str(caught.value)
    with pytest.warns(UserWarning, match="runs on the CPU.*It says: Failed to allocate 9 bytes"):
        assert onnx_providers.open_session(small_file, None, None, False).names == [CPU]


def test_tensorrts_engines_are_kept_by_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own names for them tell the file's name and its graph, and no weights."""
    model, splits = trained("cnet")

    def engines(path: Path) -> str:
        options = onnx_providers._provider_options(onnx_providers.TENSORRT, path, False)
        return options["trt_engine_cache_path"]

    path = tmp_path / "m.onnx"
    for external in (1 << 30, 1000):
        monkeypatch.setattr("zoo.deployment.files.EXTERNAL_BYTES", external)
        export(model, path, inputs=splits.val)
        first = engines(path)
        assert Path(first).is_dir()
        assert engines(path) == first
        export(tuned(model), path, inputs=splits.val)
        assert engines(path) != first
    (weights,) = tmp_path.glob("*.data")
    second = engines(path)
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    assert engines(path) != second


def tuned(model: nn.Module) -> nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    other.fc.weight.data.mul_(1.5)
    return other


def test_threads_are_onnx_runtimes(small_file: Path) -> None:
    session = InferenceSession(small_file, CPU, threads=3)
    options = session._session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    with pytest.raises(ZooError, match="threads"):
        InferenceSession(small_file, CPU, threads=0)


@pytest.mark.parametrize(
    "images",
    [
        noise(2, size=7),
        noise(2)[0],
        noise(0),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
    ],
)
def test_a_session_refuses_images_of_another_shape(
    images: np.ndarray | Tensor, small_file: Path
) -> None:
    with pytest.raises(ExportError, match=re.escape("of shape (N, 3, 8, 8), N at least 1; got")):
        InferenceSession(small_file, CPU)(images)


def test_missing_and_corrupt_files_are_errors(small_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        InferenceSession(tmp_path / "absent.onnx")
    corrupt = tmp_path / "corrupt.onnx"
    for content in (b"", b"not an onnx file", small_file.read_bytes()[:-500]):
        corrupt.write_bytes(content)
        with pytest.raises(ExportError, match=r"cannot load .*corrupt\.onnx") as caught:
            InferenceSession(corrupt)
        assert "\n" not in str(caught.value)


def test_a_file_that_takes_something_else_is_an_error(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
    result = onnx.helper.make_tensor_value_info("same", onnx.TensorProto.INT64, ["n"])
    node = onnx.helper.make_node("Identity", ["ids"], ["same"])
    graph = onnx.helper.make_graph([node], "tokens", [value], [result])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "ids")
    with pytest.raises(ExportError, match=re.escape("ids: tensor(int64)")):
        InferenceSession(tmp_path / "ids", CPU)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(onnx.TensorProto.FLOAT, ["n", 3, 8, 8]), (onnx.TensorProto.DOUBLE, ["n", 3])],
)
def test_a_file_that_gives_no_logits_is_an_error(
    kind: int, shape: list[str | int], tmp_path: Path
) -> None:
    value = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)
    result = onnx.helper.make_tensor_value_info("maps", kind, shape)
    node = onnx.helper.make_node("Cast", ["images"], ["maps"], to=kind)
    graph = onnx.helper.make_graph([node], "maps", [value], [result])
    opset = [onnx.helper.make_opsetid("", 18)]
    path = tmp_path / "maps.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    with pytest.raises(ExportError, match=r"gives maps: tensor\(.*; expected .* logits"):
        InferenceSession(path, CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CPUExecutionProvdier", "Did you mean 'CPUExecutionProvider'"),
        ("DmlExecutionProvider", "cannot be used here.*Available: .*CPUExecutionProvider.*needs"),
    ],
)
def test_an_absent_provider_is_an_error_that_names_those_present(
    name: str, message: str, small_file: Path
) -> None:
    with pytest.raises(ZooError, match=message):
        InferenceSession(small_file, [name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_gpu_provider_without_a_gpu_is_one_error_and_no_chatter(
    name: str, small_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=f"{name} cannot be used here") as caught:
        InferenceSession(small_file, [name, "CPUExecutionProvider"])
    assert "Available: CPUExecutionProvider." in str(caught.value)
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_onnx_runtime_cannot_use_falls_back_with_a_warning(
    small_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if "CUDAExecutionProvider" not in onnx_providers.onnxruntime_module().get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.warns(UserWarning, match="runs on the CPU: CUDAExecutionProvider needs") as caught:
        session = InferenceSession(small_file)
    assert "ONNX Runtime does not load it" in str(caught[0].message)
    assert session.providers == ("CPUExecutionProvider",)
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_computes(small_file: Path) -> None:
    session = InferenceSession(small_file, ["CUDAExecutionProvider"])
    assert session.providers[0] == "CUDAExecutionProvider"
    images = noise(4)
    expected = InferenceSession(small_file, CPU)(images)
    got = session(images.cuda())
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-2, atol=1e-2)
    again = session(noise(9).cuda())
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-2, atol=1e-2)
    assert again.shape == (9, 6)
    np.testing.assert_allclose(session(images.numpy()), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_cuda_graph_replays_for_every_shape_and_its_own_images(small_file: Path) -> None:
    session = InferenceSession(small_file, "CUDAExecutionProvider", cuda_graph=True)
    plain = InferenceSession(small_file, CPU)
    images = noise(60)
    start = 0
    for count in (4, 9, 4, 9, 4, 4):
        part = images[start : start + count]
        start += count
        torch.testing.assert_close(session(part.cuda()).cpu(), plain(part), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_threads_share_a_gpu_session(small_file: Path) -> None:
    session = InferenceSession(small_file, "CUDAExecutionProvider")
    plain = InferenceSession(small_file, CPU)
    images = noise(64 * 32).split(64)
    expected = [plain(part) for part in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, right in zip(pool.map(session, images), expected, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_closed_session_is_gone_at_once(small_file: Path) -> None:
    """With its memory, and no collector's help."""
    gc.disable()
    try:
        session = InferenceSession(small_file, "CUDAExecutionProvider")
        session(noise(4).cuda())
        inner = weakref.ref(session._session)
        del session
        assert inner() is None
    finally:
        gc.enable()


def test_only_device_discovery_lines_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with onnx_providers._without_lines("device_discovery.cc"):
        os.write(2, b"2026 [W:onnxruntime:Default, device_discovery.cc:164] card0/device/vendor\n")
        os.write(2, b"something that matters\n")
    os.write(2, b"and afterwards\n")
    assert capfd.readouterr().err == "something that matters\nand afterwards\n"
