"""Sessions: what they take and give, and what they say of files and images that they refuse."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import CPU, noise
from learnt import halves, trained
from PIL import Image
from torch import Tensor

from zoo.deployment.exporting import export
from zoo.deployment.options import ExportOptions
from zoo.deployment.runtime import InferenceSession
from zoo.errors import DataError, ExportError, ZooError


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
    for values, message in (
        ({"mean": "grey"}, r"changed\.onnx\.mean is not valid JSON"),
        ({"mean": "[" * 100_000}, r"changed\.onnx\.mean is not .*nested too deeply"),
        ({"std": "[1, NaN, 1]"}, r"changed\.onnx\.std is not a document"),
        ({"std": "[1, 1e999, 1]"}, r"changed\.onnx\.std is not a document"),
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


def test_a_path_may_begin_at_home(small_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(small_file.parent))
    assert InferenceSession(f"~/{small_file.name}", CPU).path == small_file
