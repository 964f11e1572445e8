"""What tests of deployment share: an exported file."""

from __future__ import annotations

from pathlib import Path

import pytest
from learnt import trained

from zoo.deployment.exporting import export


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cnet for images of 8x8 that knows its classes, mean and std."""
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    model, splits = trained("cnet")
    export(model, path, inputs=splits.val)
    return path
