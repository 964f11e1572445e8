"""The example server answers what the session computes."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from learnt import halves, trained
from PIL import Image

from zoo.deployment.exporting import export
from zoo.deployment.runtime import InferenceSession

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PATHS = [str(SCRIPTS), str(SCRIPTS.parent)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """An exported file, and the address that it is served at."""
    path = tmp_path_factory.mktemp("served") / "small.onnx"
    model, splits = trained("cnet")
    export(model, path, inputs=splits.val)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "serve:app", "--port", str(port)]
    environment = os.environ | {"MODEL": str(path)}
    environment["PYTHONPATH"] = os.pathsep.join(PATHS)
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None, "the server has stopped"
                time.sleep(0.1)
            yield path, f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def post(address: str, body: bytes) -> dict:
    with urllib.request.urlopen(urllib.request.Request(address, body), timeout=60) as answer:
        return json.load(answer)


def test_a_posted_picture_is_classified_as_the_session_does(served: tuple[Path, str]) -> None:
    path, address = served
    pixels = halves(8).test.images[3].permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    body = io.BytesIO()
    picture.save(body, "PNG")
    session = InferenceSession(path, "CPUExecutionProvider")
    (expected,) = session(picture)
    for _ in range(2):
        answer = post(address, body.getvalue())
        np.testing.assert_allclose(answer["logits"], expected, rtol=1e-4, atol=1e-4)
        assert answer["class"] == session.metadata.classes[expected.argmax()]


def test_a_body_that_is_no_picture_is_refused_and_the_server_goes_on(
    served: tuple[Path, str],
) -> None:
    _, address = served
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(whole, "PNG")
    for body, reason in (
        (b"no picture", "identify"),
        (whole.getvalue()[: len(whole.getvalue()) // 2], "truncated"),
        (whole.getvalue()[:30], "cannot be read as an image"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, body)
        assert refused.value.code == 400
        told = json.load(refused.value)["error"]
        assert reason in told
        assert " at 0x" not in told
    assert len(post(address, whole.getvalue())["logits"]) == 6


def test_a_file_that_takes_no_pictures_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "plain.onnx"
    export(trained("cnet")[0], path)  # noise, without mean and std
    done = subprocess.run(
        [sys.executable, "-c", "import serve"],
        env=os.environ | {"MODEL": str(path), "PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "plain.onnx does not say how pictures become its images" in done.stderr


def test_the_guide_quotes_the_server() -> None:
    guide = (SCRIPTS.parent / "docs" / "training.md").read_text(encoding="utf-8")
    (quoted,) = re.findall(r"```py\n(.*?)```", guide, flags=re.DOTALL)
    assert "InferenceSession" in quoted
    assert quoted in (SCRIPTS / "serve.py").read_text(encoding="utf-8")
