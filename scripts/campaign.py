"""Continue the plan in campaign.toml, on any machine and for any time.

    python scripts/campaign.py status
    python scripts/campaign.py run --budget 25m --data-dir DIR --out runs/campaign
    python scripts/campaign.py merge runs/campaign

`run` does the most valuable job that fits into the rest of its budget, then the next, so that one
profile is finished before another is begun. A stopped job continues in the next run. `merge` copies
results into the repository, where every machine finds them: base networks and evidence into
campaign-results/, evaluations into registry/ledger/, profiles with a certificate into
registry/<architecture>/.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, BinaryIO

import tyro
from tyro.conf import Positional, arg

from zoo.common.documents import decode, read_json, write_json
from zoo.errors import DocumentError, ZooError, integer
from zoo.registry.store import folder_name, write_index
from zoo.search.estimates import Took, estimate, machine, next_job, read_took, told
from zoo.search.ledger import FILE, merge, open_alone
from zoo.search.schedule import Job, Plan, jobs_of
from zoo.search.settings import parse_budget
from zoo.search.stages import BASE, PROFILE, Workshop, check_results, perform
from zoo.search.tasks import say
from zoo.spec.profile import Profile

HERE = Path(__file__).resolve().parent
TOOK, SPENT = "took.jsonl", "spent.json"
H100 = "NVIDIA H100 80GB HBM3"
KEPT = (".json", ".safetensors")
LARGEST = 5 * 2**20
"""Largest file in bytes that `merge` copies; larger base networks are trained again if needed."""

ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": f"{1 << 30}", "MALLOC_TRIM_THRESHOLD_": f"{2**31 - 1}"}
"""With these glibc keeps a step's memory for the next; returned, it comes again page by page."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    plan: Path = HERE / "campaign.toml"
    """the plan"""
    out: Path = Path("runs/campaign")
    """folder of the jobs' folders"""
    merged: Path = HERE / "campaign-results"
    """where merged results are"""
    registry: Path = HERE.parent / "registry"
    """where merged evaluations and profiles are"""

    @cached_property
    def jobs(self) -> dict[str, Job]:
        return jobs_of(Plan.read(self.plan))

    @property
    def took(self) -> list[Took]:
        """What jobs took; the work of those in the plan is what the plan says now."""
        rows, jobs = read_took([self.merged / TOOK, self.out / TOOK]), self.jobs
        return [replace(row, work=jobs.get(row.job, row).work) for row in rows]

    def done(self, rows: list[Took]) -> set[str]:
        """Jobs that need not run: a base network too large for `merge` may have to, again."""
        done, jobs = {row.job for row in rows}, self.jobs
        wanted = {needed for name in jobs.keys() - done for needed in jobs[name].needs}
        folders = (self.out, self.merged)
        return {
            name
            for name in done
            if name not in wanted
            or jobs[name].stage != "base"
            or any((folder / name / BASE).is_file() for folder in folders)
        }

    @property
    def ledgers(self) -> Path:
        return self.registry / "ledger"


@dataclass(frozen=True, kw_only=True)
class Run(Shared):
    """Do the most valuable jobs that fit into the budget."""

    budget: str
    """wall time, as 25m or 1h30m"""
    data_dir: Path
    """folder of the data sets"""
    device: str = "auto"
    """auto, cpu or cuda"""
    together: int | None = None
    """jobs at a time: by default one per core, and eight on a CUDA device"""
    only: tuple[str, ...] = ()
    """run only jobs whose name begins with one of these"""


@dataclass(frozen=True, kw_only=True)
class Status(Shared):
    """Print what is done, what is next, and the hours left here and on an H100."""


@dataclass(frozen=True, kw_only=True)
class Merge(Shared):
    """Bring the finished jobs of any number of folders into the repository."""

    folders: Positional[tuple[Path, ...]]
    """folders that were --out of `run`"""


@dataclass(frozen=True, kw_only=True)
class One(Shared):
    """Do one job, as `run` does it in a process of its own."""

    job: Annotated[Positional[str], arg(metavar="JOB")]
    """its name"""
    data_dir: Path
    """folder of the data sets"""
    parent: int | None = None
    """id of the process that it ends with; by default the one that started it"""


# --- run ------------------------------------------------------------------------------------------


@dataclass
class _Running:
    """A running job; seconds `estimated` before its first run, and `spent` by earlier runs.

    `busy` are those of this run: of the processor where it does the work, because other work may
    share it; else of the clock.
    """

    job: Job
    process: subprocess.Popen
    started: float
    estimated: float
    spent: float
    busy: float = 0.0


@dataclass(frozen=True)
class _Spent:
    """The seconds of a job that are stored between its runs."""

    estimated: float
    spent: float


def run(options: Run) -> None:
    """Start jobs while one fits into the budget, and stop those that still run at its end.

    Raises:
        ZooError: for unusable options, another run in the same folder, and at the end if a job
            failed.
    """
    jobs, budget = options.jobs, parse_budget(options.budget)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    on = machine()
    if options.device == "cuda" and on.startswith("cpu"):
        raise ZooError("No CUDA device is visible.")
    if not options.data_dir.is_dir():
        raise ZooError(f"--data-dir {options.data_dir} is not a folder.")
    for start in options.only:
        if not any(name.startswith(start) for name in jobs):
            raise ZooError(f"--only {start}: no job's name begins so.")
    together = os.cpu_count() or 1 if on.startswith("cpu") else 8
    if options.together is not None:
        together = integer("--together", options.together, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with open_alone(options.out / TOOK) as took:
        failed = _carry_on(options, jobs, on, together, time.monotonic() + budget, took)
    status(options)
    if failed:
        raise ZooError(f"These failed, and their folders' log.txt say why: {', '.join(failed)}.")


def _carry_on(
    options: Run, jobs: dict[str, Job], on: str, together: int, deadline: float, took: BinaryIO
) -> list[str]:
    """Run jobs until the deadline, or until none fits; the names of those that failed."""
    others = {n for n in jobs if options.only and not n.startswith(options.only)}
    failed: list[str] = []
    running: dict[str, _Running] = {}
    try:
        while (left := deadline - time.monotonic()) > 0:
            for own in running.values():
                own.busy = max(own.busy, _busy(own, on))
            for name in [n for n, own in running.items() if own.process.poll() is not None]:
                if not _finish(options, running.pop(name), on, together, took):
                    failed.append(name)
            if len(running) < together:
                rows = options.took
                costs = {name: estimate(job, rows, on) for name, job in jobs.items()}
                seconds = {n: _remaining(options.out / n, cost) for n, cost in costs.items()}
                passed_by = {*others, *failed, *running}
                job = next_job(jobs, options.done(rows), passed_by, seconds, left)
                if job is not None:
                    say(f"{job.name}: about {seconds[job.name] / 60:.1f} min")
                    running[job.name] = _start(options, job, costs[job.name])
                    continue
            if not running:
                break
            time.sleep(min(1.0, left))
    finally:
        for own in running.values():
            own.process.terminate()
        for own in running.values():
            own.process.wait()
            _write_spent(options.out / own.job.name, own)
    return failed


def _start(options: Run, job: Job, estimated: float) -> _Running:
    folder = options.out / job.name
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _read_spent(folder)
    command = [sys.executable, __file__, "one", job.name, "--data-dir", options.data_dir]
    command += ["--plan", options.plan, "--out", options.out]
    command += ["--merged", options.merged, "--registry", options.registry]
    command += ["--parent", os.getpid()]
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", **ALLOCATION}, start_new_session=True,
        )  # fmt: skip
    spent = earlier or _Spent(estimated, 0.0)
    return _Running(job, process, time.monotonic(), spent.estimated, spent.spent)


def _finish(options: Run, own: _Running, on: str, together: int, took: BinaryIO) -> bool:
    """Record the seconds of a job that ended; return False if it failed."""
    folder, job = options.out / own.job.name, own.job
    seconds = _write_spent(folder, own)
    if own.process.returncode:
        say(f"{job.name} failed: see {folder / 'log.txt'}")
        return False
    row = Took(
        job.name, job.stage, job.network.arch, job.work, seconds, own.estimated, on, together
    )
    took.write(told(row).encode())
    took.flush()
    say(f"{job.name}: done in {seconds / 60:.1f} min, {own.estimated / 60:.1f} were estimated")
    return True


def _busy(own: _Running, on: str) -> float:
    """Seconds of this run of a job until now; of an ended one on a CPU, 0."""
    elapsed = time.monotonic() - own.started
    if not on.startswith("cpu"):
        return elapsed
    try:
        fields = Path(f"/proc/{own.process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended, or this is not Linux
        return 0.0 if sys.platform == "linux" else elapsed
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _write_spent(folder: Path, own: _Running) -> float:
    """Store and return the seconds that all runs of a job took until now."""
    seconds = own.spent + own.busy
    write_json(folder / SPENT, _Spent(own.estimated, round(seconds, 1)))
    return round(seconds, 1)


def _read_spent(folder: Path) -> _Spent | None:
    """The stored seconds; None if missing or damaged, which only makes the estimate worse."""
    try:
        return decode(_Spent, read_json(folder / SPENT), SPENT)
    except DocumentError:
        return None


def _remaining(folder: Path, estimated: float) -> float:
    """Estimated seconds left of a job; at least a tenth, because it may take longer."""
    earlier = _read_spent(folder)
    return max(estimated - (earlier.spent if earlier else 0.0), 0.1 * estimated)


def one(options: One) -> None:
    if options.job not in options.jobs:
        raise ZooError(f"The plan has no job {options.job!r}.")
    parent = options.parent or os.getppid()  # who started this may have ended already
    threading.Thread(target=_follow_parent, args=(parent,), daemon=True).start()
    job = options.jobs[options.job]
    data = Plan.read(options.plan).data
    known = tuple(options.ledgers.glob("*.parquet"))
    perform(job, Workshop(options.out, options.data_dir, data, (options.merged,), known))


def _follow_parent(parent: int) -> None:
    """End this process when the one that started it ends, in whatever way."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# --- status ---------------------------------------------------------------------------------------


def status(options: Shared) -> None:
    """Print what is done and left of every network and stage, and the next jobs."""
    jobs, rows, here = options.jobs, options.took, machine()
    done = options.done(rows)
    heads = ("network", "stage", "done", "of", f"hours left: {here}", H100)
    lines: dict[tuple[str, str], list[Job]] = defaultdict(list)
    for job in jobs.values():
        lines[f"{job.network.arch} at {job.network.size}", job.stage].append(job)
    print(f"{heads[0]:<34}{heads[1]:<10}{heads[2]:>5}{heads[3]:>5}  {heads[4]} | {heads[5]}")
    total = [0.0, 0.0]
    for (network, stage), own in lines.items():
        left = [job for job in own if job.name not in done]
        hours = [sum(estimate(job, rows, on) for job in left) / 3600 for on in (here, H100)]
        total = [a + b for a, b in zip(total, hours, strict=True)]
        print(
            f"{network:<34}{stage:<10}{len(own) - len(left):>5}{len(own):>5}"
            f"{hours[0]:>10.1f}{hours[1]:>10.2f}"
        )
    print(
        f"{'all':<44}{len(done & jobs.keys()):>5}{len(jobs):>5}{total[0]:>10.1f}{total[1]:>10.2f}"
    )
    costs = {name: estimate(job, rows, here) for name, job in jobs.items()}
    passed: set[str] = set()
    for _ in range(5):
        job = next_job(jobs, done, passed, costs, float("inf"))
        if job is not None:
            passed.add(job.name)
            print(f"next: {job.name}, {costs[job.name] / 60:.0f} min here")
    ratios = [row.seconds / row.estimated for row in rows if row.machine == here]
    if ratios:
        middle = statistics.median(ratios)
        print(f"Jobs took {middle:.2f} times what was estimated here (median of {len(ratios)}).")


# --- merge ----------------------------------------------------------------------------------------


def merge_all(options: Merge) -> None:
    """Copy the results of finished jobs, certified profiles and all evaluations.

    Raises:
        ZooError: if there is no folder, or at the end if files of a finished job are missing or
            damaged; the job is left out then, and another folder or a later merge may bring it.
    """
    jobs, damaged = options.jobs, list[str]()
    known = {row.job for row in read_took([options.merged / TOOK])}
    if not options.folders:
        raise ZooError("Name the folders to merge: those that were --out of `run`.")
    for folder in options.folders:
        if not folder.is_dir():
            raise ZooError(f"{folder} is not a folder.")
        brought = len(known)
        for row in read_took([folder / TOOK]):
            if row.job in known or row.job not in jobs:
                continue
            try:
                check_results(jobs[row.job], folder / row.job)
            except ZooError as error:
                damaged.append(f"{row.job}: {error}")
                continue
            for file in (folder / row.job).iterdir():
                wanted = file.suffix in KEPT and file.name not in (SPENT, PROFILE)
                if wanted and file.stat().st_size <= LARGEST:
                    target = options.merged / row.job / file.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)
            if (found := folder / row.job / PROFILE).is_file():
                profile = Profile.read(found)
                own = options.registry / folder_name(profile.architecture)
                profile.write(own / f"{profile.name}.json")
            options.merged.mkdir(parents=True, exist_ok=True)
            with (options.merged / TOOK).open("a") as stream:
                stream.write(told(row))
            known.add(row.job)
        say(f"{folder}: {len(known) - brought} jobs")
    ledgers: dict[str, list[Path]] = defaultdict(list)
    for folder in options.folders:
        for name, job in jobs.items():
            if files := sorted((folder / name).rglob(FILE)):
                ledgers[folder_name(job.network.arch)] += files
    for arch, files in ledgers.items():
        target = options.ledgers / f"{arch}.parquet"
        earlier = [target] if target.exists() else []
        say(f"{target.name}: {merge([*earlier, *files], target)} evaluations")
    write_index(options.registry)
    if damaged:
        raise ZooError("\n".join(("These jobs are left out:", *damaged)))


STEPS = {"run": Run, "status": Status, "merge": Merge, "one": One}


def main(options: Run | Status | Merge | One) -> None:
    actions = {Run: run, Status: status, Merge: merge_all, One: one}
    actions[type(options)](options)  # type: ignore[operator]


if __name__ == "__main__":
    try:
        main(tyro.extras.subcommand_cli_from_dict(STEPS, description=__doc__))
    except (ZooError, OSError) as error:
        sys.exit(f"campaign: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
