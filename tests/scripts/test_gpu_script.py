"""scripts/gpu.sh, rehearsed on the CPU with small sizes: every step, and what it brings back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from bench_deploy import read
from test_campaign import BASES, PLAN, REST

from zoo.search.estimates import read_took
from zoo.search.stages import BASE

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu.sh"


def gpu(tmp_path: Path, *step: object, **variables: object) -> str:
    own = {"PYTHON": sys.executable, "KEPT": tmp_path / "kept", "SITE": tmp_path / "site"}
    environment = {**os.environ, **{k: str(v) for k, v in (own | variables).items()}}
    done = subprocess.run(
        ["bash", SCRIPT, *map(str, step)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_checks_are_the_tests_for_gpus(tmp_path: Path) -> None:
    told = gpu(tmp_path, "checks", tmp_path / "out", TESTS="tests/deployment/test_providers.py")
    assert (tmp_path / "out" / "checks.txt").read_text() == told
    assert re.search(r"\b4 (skipped|passed)", told.splitlines()[-1])


def test_the_results_of_a_campaign_come_back_in_files_that_are_small(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "unused.tar.xz", "w:xz") as archive:
        archive.add(plan, "unused/plan.toml")
    out, run = tmp_path / "out", tmp_path / "run"
    step = ("campaign", out, tmp_path / "data")
    gpu(tmp_path, *step, PLAN=plan, RUN=run, DEVICE="cpu", BUDGET="3m")
    assert (run / "data" / "unused" / "plan.toml").is_file()
    back = tmp_path / "back"
    back.mkdir()
    parts = sorted(out.glob("results.tar.*"))
    assert all(part.stat().st_size <= 15 * 2**20 for part in parts)
    whole = tmp_path / "results.tar"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(whole) as archive:
        archive.extractall(back, filter="data")
    assert {row.job for row in read_took([back / "took.jsonl"])} == {*BASES, *REST}
    assert all((back / name / BASE).is_file() for name in BASES)


def test_the_benchmarks_run_and_a_wheel_in_pieces_is_joined_before(tmp_path: Path) -> None:
    wheel = tmp_path / "onnxruntime_of_pieces-1.0-py3-none-any.whl"
    noise = os.urandom(300_000)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("of_pieces/capi/library.so", noise)
        archive.writestr("of_pieces/capi/library_tensorrt.so", noise)
    assert "3 pieces" in gpu(tmp_path, "pieces", wheel, tmp_path / "pieces", SIZE="100K")
    for number in (2, 1, 3):
        gpu(tmp_path, "take", tmp_path / "pieces" / str(number))
    told = gpu(
        tmp_path, "bench", tmp_path / "out",
        TRAIN="--images 128 --val-images 64 --size 8 --batch-size 32 --rounds 1",
        DEPLOY="--architectures resnet20-16 --factors 2 --metrics params --aligns 1 --pads "
        "--options.batch-sizes 1 --options.repeats 3 --options.warmup 1 --options.no-memory "
        "--options.providers CPUExecutionProvider",
    )  # fmt: skip
    joined = tmp_path / "site" / "of_pieces" / "capi"
    assert (joined / "library.so").read_bytes() == noise
    assert not (joined / "library_tensorrt.so").exists()
    assert "textbook loop" in (tmp_path / "out" / "train.txt").read_text()
    assert "| as they come | 1 | " in told
    (case,) = read(tmp_path / "out" / "deploy.jsonl")
    assert case["architecture"] == "resnet20-16"


def test_without_a_step_it_says_what_it_does() -> None:
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "gpu.sh campaign OUT DATA" in done.stderr
    assert "set -euo" not in done.stderr
