"""Evaluations on a Ray cluster (`--cluster`). No other file imports ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from zoo.errors import ZooError
from zoo.search.fidelities import Fidelity
from zoo.search.tasks import Candidate, Task
from zoo.search.workers import Result, measured

try:
    import ray
    from ray.exceptions import RayError
except ImportError:
    raise ZooError("A cluster needs Ray: pip install 'prunezoo[cluster]'.") from None

__all__ = ["LOCAL", "RayPool"]

LOCAL = "local"
RETRIES = 5
"""How often an evaluation whose worker or machine died is repeated."""

GPU_SHARE = 0.25
"""Share of a GPU per evaluation, if the cluster has GPUs: small networks do not fill one."""


class RayPool:
    """Measures candidates on a Ray cluster; every task is sent there once.

    An evaluation whose worker dies is repeated elsewhere, at most `RETRIES` times.

    Args:
        address: of the cluster's head (`HOST:PORT`, `ray://...`, `auto`), or `local` for workers on
            this machine alone.
        workers: processes of a `local` cluster; one per core by default.

    Raises:
        ZooError: when the cluster cannot be reached.
    """

    def __init__(self, address: str = LOCAL, workers: int | None = None) -> None:
        local = address == LOCAL
        try:
            ray.init(
                address=LOCAL if local else address,
                num_cpus=workers if local else None,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ZooError(f"The Ray cluster {address!r} cannot be used: {error}") from None
        resources = ray.cluster_resources()
        self.size = int(resources.get("CPU", 1))
        gpus = GPU_SHARE if resources.get("GPU") else 0
        self._measure = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_measure)
        self._tasks: dict[int, tuple[Task, Any]] = {}

    def run(self, candidates: Sequence[Candidate], fidelity: Fidelity) -> Iterator[Result]:
        """Measure `candidates` as workers become free.

        Raises:
            ZooError: when an evaluation still fails after `RETRIES` repeats.
        """
        pending = {
            self._measure.remote(self._task(c.task), c.widths, c.seed, c.criterion, fidelity): index
            for index, c in enumerate(candidates)
        }
        try:
            while pending:
                (done,), _ = ray.wait(list(pending), num_returns=1)
                yield pending.pop(done), *ray.get(done)
        except RayError as error:
            raise ZooError(f"An evaluation failed on the cluster: {error}") from None
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        """Disconnect from the cluster; a local one ends."""
        ray.shutdown()

    def _task(self, task: Task) -> Any:
        if id(task) not in self._tasks:
            self._tasks[id(task)] = task, ray.put(task)
        return self._tasks[id(task)][1]


def _measure(
    task: Task, widths: tuple[int, ...], seed: int, criterion: str, fidelity: Fidelity
) -> tuple[float, float]:
    torch.set_num_threads(1)
    return measured(Candidate(task, widths, seed, criterion), fidelity)
