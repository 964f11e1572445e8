"""Warnings point at the user's line, through all of the zoo and its decorators."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import QUICK

import zoo
from zoo.models import build_model


def load() -> None:
    state = build_model("resnet20-16", 10).state_dict()
    zoo.load("resnet20-16", 2, {f"net.{n}": t for n, t in state.items()}, profile="equal")


def average() -> None:
    state = build_model("resnet20-16", 10).state_dict()
    zoo.load("resnet20-16", 2, {"model": state, "model_ema": state}, profile="equal")


def finetune(path: Path, images: zoo.ImageSet) -> None:
    torch.save(build_model("resnet20-16", 3).state_dict(), path)
    pruned = zoo.load("resnet20-16", 2, path, profile="equal")
    path.unlink()
    zoo.finetune(pruned, images, None, recipe=replace(QUICK, epochs=1), cpu=True)


def lines(function: Callable[..., object]) -> range:
    source, first = inspect.getsourcelines(function)
    return range(first, first + len(source))


@pytest.mark.parametrize("call", [load, average, finetune])
def test_a_warning_names_the_line_that_called_the_zoo(call, tmp_path, toy_images):
    given = (tmp_path / "base.pt", toy_images) if call is finetune else ()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call(*given)
    (warning,) = [w for w in told if "taken" in str(w.message) or "teacher" in str(w.message)]
    assert warning.category is UserWarning
    assert warning.filename == __file__
    assert warning.lineno in lines(call)
    assert "zoo." in Path(__file__).read_text().splitlines()[warning.lineno - 1]
