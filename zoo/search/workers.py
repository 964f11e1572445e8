"""Where evaluations run: in this process, or in several that each have one thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Protocol

import torch

from zoo.errors import ZooError
from zoo.search.tasks import Candidate, Task

if TYPE_CHECKING:
    from zoo.search.fidelities import Fidelity

__all__ = ["InProcess", "Pool", "Processes", "Result", "measured", "pool_of"]

PATIENCE = 3
"""The search fails after this many rounds in a row in which processes die without a result."""

Result = tuple[int, float, float]
"""The index of a candidate, its accuracy in [0, 1] and the seconds that it took."""


class Pool(Protocol):
    """Measures candidates in any order, `size` of them at a time."""

    @property
    def size(self) -> int: ...

    def run(self, candidates: Sequence[Candidate], fidelity: Fidelity) -> Iterator[Result]: ...

    def close(self) -> None: ...


class InProcess:
    """Measures candidates one by one in this process, with one CPU thread."""

    size = 1

    def run(self, candidates: Sequence[Candidate], fidelity: Fidelity) -> Iterator[Result]:
        for index, candidate in enumerate(candidates):
            with _one_thread():
                accuracy, seconds = measured(candidate, fidelity)
            yield index, accuracy, seconds

    def close(self) -> None:
        """There is nothing to end."""


class Processes:
    """Measures candidates in single-threaded processes, with the accuracies that one process gives.

    A process that dies is replaced, and its candidates are measured again. Processes start when
    they are first needed. They end with this process, even if it is killed.

    Args:
        size: number of processes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._tasks: dict[int, Task] = {}
        self._executor: ProcessPoolExecutor | None = None

    def run(self, candidates: Sequence[Candidate], fidelity: Fidelity) -> Iterator[Result]:
        """Measure `candidates` as processes become free.

        Raises:
            ZooError: when processes die again and again without finishing one evaluation.
        """
        remaining, fruitless = list(range(len(candidates))), 0
        while remaining:
            finished: set[int] = set()
            try:
                for result in self._round(candidates, remaining, fidelity):
                    finished.add(result[0])
                    yield result
            except BrokenProcessPool:
                self.close()
                fruitless = 0 if finished else fruitless + 1
                if fruitless == PATIENCE:
                    raise ZooError(
                        "The processes that measure candidates die before they finish one. They "
                        "may lack memory: use fewer workers. Or the script that they import has "
                        'no `if __name__ == "__main__":`.'
                    ) from None
            except BaseException:
                self.close()
                raise
            remaining = [index for index in remaining if index not in finished]

    def close(self) -> None:
        """End the processes; what they were measuring is lost."""
        executor, self._executor = self._executor, None
        if executor is not None:
            for process in list((executor._processes or {}).values()):
                process.terminate()
            executor.shutdown(wait=True, cancel_futures=True)

    def _round(
        self, candidates: Sequence[Candidate], indices: Sequence[int], fidelity: Fidelity
    ) -> Iterator[Result]:
        executor = self._started([candidates[index].task for index in indices])
        futures: dict[Future, int] = {}
        for index in indices:
            own = candidates[index]
            job = id(own.task), own.widths, own.seed, own.criterion, fidelity
            futures[executor.submit(_measure, *job)] = index
        for future in as_completed(futures):
            yield futures[future], *future.result()

    def _started(self, tasks: Sequence[Task]) -> ProcessPoolExecutor:
        """The running processes, which know these tasks and all earlier ones."""
        new = {id(task): task for task in tasks if id(task) not in self._tasks}
        if new:
            self.close()
            self._tasks |= new
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self.size,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_install,
                initargs=(self._tasks,),
            )
        return self._executor


def pool_of(workers: int | None) -> Pool:
    """A pool of `workers` processes; by default one per CPU core, or with CUDA this process."""
    if workers is None:
        workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    return InProcess() if workers <= 1 else Processes(workers)


def measured(candidate: Candidate, fidelity: Fidelity) -> tuple[float, float]:
    """One accuracy in [0, 1], and the seconds that it took."""
    started = time.perf_counter()
    accuracy = fidelity.measure(candidate)
    return accuracy, time.perf_counter() - started


_installed: dict[int, Task] = {}


def _install(tasks: dict[int, Task]) -> None:
    """Prepare a new process: tasks, one thread, Ctrl-C ignored, ended with its parent."""
    global _installed
    _installed = tasks
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _measure(
    task: int, widths: tuple[int, ...], seed: int, criterion: str, fidelity: Fidelity
) -> tuple[float, float]:
    return measured(Candidate(_installed[task], widths, seed, criterion), fidelity)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
