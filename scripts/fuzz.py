"""Feed damaged and hostile files to everything that reads what users and the network give.

    python scripts/fuzz.py --count 100000

Each input must be read or refused with the project's own error, within seconds and bounded memory,
without running anything: an audit hook watches for processes, sockets and files written elsewhere.
Inputs follow from `--seed`; one that fails is kept in `--out`, and `--only NAME` repeats a target.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import tyro
from fuzzing import TARGETS, Target

from zoo.errors import ZooError

SECONDS = 20
"""After which an input counts as a hang."""

MEMORY = 2 << 30
"""Bytes that a process may take beyond what it has when it starts."""

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen",
             "pty.spawn", "socket.connect", "socket.bind", "ctypes.dlopen", "webbrowser.open",
             "os.remove", "os.rename", "shutil.rmtree", "os.putenv")  # fmt: skip
"""Audit events that no reading of a file has a reason for, outside the scratch folder."""


@dataclass(frozen=True)
class Options:
    count: int = 100_000
    """inputs in all, shared evenly among the targets"""
    seed: int = 0
    """of the inputs"""
    only: tuple[str, ...] = ()
    """names of targets; by default all"""
    jobs: int = os.cpu_count() or 1
    """processes at a time"""
    out: Path = Path("fuzz-findings")
    """folder of the inputs that failed"""


class Violation(BaseException):
    """Something was done that reading a file has no reason for."""


@dataclass(frozen=True)
class Finding:
    """An input that was neither read nor refused properly."""

    target: str
    number: int
    what: str


def main(options: Options) -> int:
    """Run, print what became of the inputs by target, and return 1 if any failed."""
    targets = [t for t in TARGETS if not options.only or t.name in options.only]
    each = -(-options.count // len(targets))
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the pool ends with it
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, maxtasksperchild=1) as pool:
        shares = [(t.name, options.seed, each, options.out) for t in targets]
        results = [pool.apply_async(_in_child, share) for share in shares]
        told = []
        for target, result in zip(targets, results, strict=True):
            told.append(result.get())
            print(f"{target.name}: {len(told[-1][1])} findings", file=sys.stderr, flush=True)
    print("| target | inputs | read | refused | failed |")
    print("|---|---:|---:|---:|---:|")
    findings = [finding for _, found in told for finding in found]
    for target, (counts, found) in zip(targets, told, strict=True):
        total = counts["read"] + counts["refused"] + len(found)
        print(f"| {target.name} | {total:,} | {counts['read']:,} | {counts['refused']:,} "
              f"| {len(found)} |")  # fmt: skip
    alike = Counter((finding.target, finding.what) for finding in findings)
    for (name, what), count in alike.most_common():
        first = next(f.number for f in findings if (f.target, f.what) == (name, what))
        print(f"{count} x {name}, first {first}: {what}")
    print(f"{len(findings)} findings in {time.monotonic() - started:.0f} s, seed {options.seed}")
    return 1 if findings else 0


def _in_child(name: str, seed: int, count: int, out: Path) -> tuple[Counter[str], list[Finding]]:
    """One target in processes of its own: one that dies is followed by another."""
    (target,) = (each for each in TARGETS if each.name == name)
    counts, findings, done = Counter[str](), list[Finding](), 0
    while done < count:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            code = 1
            try:
                with os.fdopen(writer, "w") as stream:
                    _child(target, seed, done, count, out, stream)
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader) as stream:
            for line in stream:
                kind, number, what = line.rstrip("\n").split("\t", 2)
                done = int(number) + 1
                if kind == "failed":
                    findings.append(Finding(name, int(number), what))
                else:
                    counts[kind] += 1
        _, status = os.waitpid(child, 0)
        if status:
            findings.append(Finding(name, done, f"the process ended with status {status}"))
            done += 1
    return counts, findings


def _child(target: Target, seed: int, first: int, count: int, out: Path, stream) -> None:
    import resource

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seeds = target.seeds(folder)
        for name in ("torchvision", "timm", "torch._inductor"):
            importlib.import_module(name)  # which loads libraries, and sets variables
        for seed_file in seeds:
            told = run(target, seed_file, folder)
            if told[0] != "read":
                raise AssertionError(f"{target.name}: a valid file is {told}")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        sys.addaudithook(lambda event, given: _watch(event, given, scratch))
        for number in range(first, count):
            random = Random(f"{seed}:{target.name}:{number}")
            content = spoilt(target, random, seeds)
            kind, what = run(target, content, folder)
            if kind == "failed":
                out.mkdir(parents=True, exist_ok=True)
                (out / f"{target.name}-{number}").write_bytes(content)
            print(f"{kind}\t{number}\t{what}", file=stream, flush=True)


def spoilt(target: Target, random: Random, seeds: Sequence[bytes]) -> bytes:
    """One input; its integers may be longer than Python reads."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return target.spoil(random, seeds)
    finally:
        sys.set_int_max_str_digits(limit)


def run(target: Target, content: bytes, folder: Path) -> tuple[str, str]:
    """("read" | "refused" | "failed", why): what becomes of one input."""
    global watching
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS)
    watching = True
    try:
        target.read(content, folder)
    except ZooError as error:
        return ("refused", "") if str(error).strip() else ("failed", "an error without a message")
    except (Exception, Violation) as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = next((f for f in reversed(frames) if "/zoo/" in f.filename), frames[-1])
        text = " ".join(str(error).split())[:200]
        return "failed", f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {text}"
    finally:
        watching = False
        signal.alarm(0)
    return "read", ""


def _hang(*_: object) -> None:
    raise Violation(f"no end after {SECONDS} s")


watching = False
"""Whether an input is being read."""


def _watch(event: str, given: tuple[object, ...], scratch: str) -> None:
    if not watching:
        return
    if event.startswith(FORBIDDEN):
        raise Violation(f"{event}{given!r}"[:200])
    if event == "open" and isinstance(given[0], str) and isinstance(given[1], str):
        writes = set(given[1]) & set("wax+")
        if writes and not given[0].startswith((scratch, "/dev/null")):
            raise Violation(f"{given[0]} was written")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
