"""What the jobs of a plan take on a machine, from those it did, and which job comes next."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.common.documents import decode, encode
from zoo.search.schedule import Job

__all__ = ["START", "Took", "estimate", "machine", "next_job", "read_took", "told"]

START = 6.0
"""Seconds that a job takes for its imports and for reading its data."""

SECONDS_PER_WORK = {"cpu": 15.0, "cuda": 0.4}
"""Seconds per `Job.work` on machines without jobs yet: one core, or one H100 with several jobs."""


@dataclass(frozen=True)
class Took:
    """The time that one finished job took, beside its estimate.

    Attributes:
        job, stage, arch, work: of the job.
        seconds: wall time of all its runs; `estimated` before the first.
        machine: the machine that finished it, as `machine()` names it.
        together: number of jobs that the machine ran at a time.
    """

    job: str
    stage: str
    arch: str
    work: float
    seconds: float
    estimated: float
    machine: str
    together: int = 1


def read_took(paths: Iterable[Path]) -> list[Took]:
    """The rows of the files that exist; for each job, the first.

    A line that was cut short is skipped: its job runs again, and continues from its files.
    """
    rows: dict[str, Took] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(ValueError):
                row = decode(Took, json.loads(line), str(path))
                rows.setdefault(row.job, row)
    return list(rows.values())


def told(row: Took) -> str:
    """The row as one line of JSON, with a newline before it in case the last line was cut short."""
    return "\n" + json.dumps(encode(row))


def machine() -> str:
    """The name of this machine: that of its CUDA device, or the CPU's instruction set."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def estimate(job: Job, rows: Iterable[Took], on: str) -> float:
    """Estimated seconds of `job` on the machine `on`, at the median rate of similar jobs there.

    Similar jobs have the same stage and architecture; else the same architecture; else the same
    stage; else they are any. Without jobs on that machine, `SECONDS_PER_WORK` is a guess.
    """
    own = [row for row in rows if row.machine == on]
    for alike in (
        lambda row: (row.stage, row.arch) == (job.stage, job.network.arch),
        lambda row: row.arch == job.network.arch,
        lambda row: row.stage == job.stage,
        lambda _: True,
    ):
        rates = [max(row.seconds - START, 0.0) / row.work for row in own if alike(row)]
        if rates:
            return START + job.work * statistics.median(rates)
    return START + job.work * SECONDS_PER_WORK["cpu" if on.startswith("cpu") else "cuda"]


def next_job(
    jobs: Mapping[str, Job],
    done: Collection[str],
    running: Collection[str],
    seconds: Mapping[str, float],
    left: float,
) -> Job | None:
    """The most valuable job that is ready and takes no longer than `left` seconds.

    A job is worth at least as much as any job that waits for it. Of equally valuable jobs that
    comes first which the result nearest to its end waits for, so that results are finished one by
    one; then the shortest, then the first in order.
    """
    worth = {name: job.value for name, job in jobs.items()}
    for job in reversed(list(jobs.values())):
        for needed in job.needs:
            worth[needed] = max(worth[needed], worth[job.name])
    rest = _rest(jobs, done, seconds)
    affordable = [
        job
        for name, job in jobs.items()
        if name not in done
        and name not in running
        and all(needed in done for needed in job.needs)
        and seconds[name] <= left
    ]
    return max(
        affordable,
        key=lambda job: (worth[job.name], -rest[job.name], -seconds[job.name]),
        default=None,
    )


def _rest(
    jobs: Mapping[str, Job], done: Collection[str], seconds: Mapping[str, float]
) -> dict[str, float]:
    """For each open job the fewest seconds of open jobs to a result that it is part of.

    A result is a job that no other needs, with all that it needs itself.
    """
    parts = {name: {name} for name in jobs}
    for name, job in jobs.items():
        parts[name].update(*(parts[needed] for needed in job.needs))
    inner = {needed for job in jobs.values() for needed in job.needs}
    rest: dict[str, float] = {}
    for result in jobs.keys() - inner:
        left = parts[result] - set(done)
        total = sum(seconds[name] for name in left)
        rest |= {name: min(total, rest.get(name, total)) for name in left}
    return rest
