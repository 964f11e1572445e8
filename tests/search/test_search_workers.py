from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data.datasets import ImageSet
from zoo.errors import ZooError
from zoo.models import build_model
from zoo.search.evaluation import Evaluator
from zoo.search.fidelities import FineTuning, Recalibration
from zoo.search.ledger import Ledger
from zoo.search.tasks import Candidate, Task
from zoo.search.workers import InProcess, Pool, Processes, pool_of
from zoo.tracing.graph import channel_groups
from zoo.training.recipes import Recipe

OWN = [str(folder) for folder in Path(__file__).parents[:2]]
"""Where processes that are started find this file and what it imports."""


def noise(classes: int = 4) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (256, 3, 8, 8), generator=generator).to(torch.uint8)
    labels = torch.randint(0, classes, (256,), generator=generator)
    names = tuple("abcd"[:classes])
    return ImageSet("noise", images, labels, names, (0.5,) * 3, (0.5,) * 3)


def untrained(name: str, seed: int) -> Task:
    module = build_model("cnet", 4, image_size=8, seed=seed).eval()
    groups = channel_groups(module, torch.zeros(1, 3, 8, 8))
    features = tuple(np.ones(size) for size in groups.sizes)
    return Task(name, name, module, groups, noise(), noise(), 0.5, "split", features)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [untrained("first", 1), untrained("second", 2)]


@pytest.fixture
def candidates(tasks) -> list[Candidate]:
    criteria = ("random", "l1", "fpgm")
    return [Candidate(tasks[n % 2], (8 + n,) * 6, n, criteria[n % 3]) for n in range(6)]


@pytest.fixture(scope="module", params=["processes", "ray"])
def pool(request) -> Pool:
    if request.param == "processes":
        made: Pool = Processes(2)
    else:
        pytest.importorskip("ray")
        from zoo.search.cluster import RayPool

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(OWN))
            made = RayPool("local", 2)
    yield made
    made.close()


def accuracies(pool: Pool, candidates, fidelity) -> list[float]:
    found = {index: accuracy for index, accuracy, _ in pool.run(candidates, fidelity)}
    return [found[index] for index in range(len(candidates))]


@dataclass(frozen=True)
class Deadly:
    """Kills the process that measures candidate 3, as long as its mark is not there."""

    mark: Path
    name: str = "deadly"

    def measure(self, candidate: Candidate) -> float:
        if candidate.seed == 3 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return candidate.seed / 10


@dataclass(frozen=True)
class Hopeless:
    name: str = "hopeless"

    def measure(self, candidate: Candidate) -> float:
        del candidate
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0


@dataclass(frozen=True)
class Slow:
    name: str = "slow"

    def measure(self, candidate: Candidate) -> float:
        time.sleep(60)
        return candidate.seed / 10


@pytest.mark.slow
def test_where_candidates_are_measured_changes_no_bit(pool, candidates):
    for fidelity in (Recalibration(128, 200), FineTuning(Recipe(epochs=1, lr=0.02), 128)):
        assert accuracies(pool, candidates, fidelity) == accuracies(
            InProcess(), candidates, fidelity
        )


def test_a_killed_worker_loses_nothing(pool, candidates, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    fidelity = Deadly(tmp_path / "mark")
    measured = Evaluator(ledger, pool)(candidates, fidelity)
    assert fidelity.mark.exists()
    assert measured == [n / 10 for n in range(6)]
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 6
    ledger.close()


@pytest.mark.slow
def test_a_death_before_anything_was_finished_is_no_reason_to_give_up(candidates, tmp_path):
    pool, fidelity = Processes(1), Deadly(tmp_path / "mark")
    assert accuracies(pool, [candidates[3]], fidelity) == [0.3]
    pool.close()


@pytest.mark.slow
def test_workers_that_always_die_are_an_error_and_the_pool_goes_on(candidates):
    pool = Processes(1)
    with pytest.raises(ZooError, match="die before they finish one"):
        list(pool.run(candidates[:2], Hopeless()))
    assert accuracies(pool, candidates[:1], Recalibration(64, 64)) == accuracies(
        InProcess(), candidates[:1], Recalibration(64, 64)
    )
    pool.close()


def test_one_worker_is_this_process():
    assert isinstance(pool_of(1), InProcess)
    assert isinstance(pool_of(3), Processes)


@pytest.mark.slow
def test_workers_end_with_a_search_that_is_killed(tmp_path):
    """SIGKILL leaves no time to clean up, and no orphans."""
    script = tmp_path / "search.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = {OWN!r}
            from test_search_workers import Candidate, Processes, Slow, untrained
            if __name__ == "__main__":
                task = untrained("t", 0)
                pool = Processes(2)
                list(pool.run([Candidate(task, (8,) * 6, n) for n in range(2)], Slow()))
            """
        )
    )
    search = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    try:
        workers = _wait(lambda: [p for p in _session(search.pid) if p != search.pid], 3)
        assert len(workers) >= 2
    finally:
        search.kill()
        search.wait()
    assert not _wait(lambda: _session(search.pid), 0)


def _session(leader: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def _wait(count, wanted: int, seconds: float = 60):
    """What `count` gives, as soon as that is at least `wanted` (or nothing, for 0)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = count()
        if (not found) if wanted == 0 else len(found) >= wanted:
            return found
        time.sleep(0.2)
    return count()
