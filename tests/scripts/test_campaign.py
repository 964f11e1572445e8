"""scripts/campaign.py: killed at any time it goes on, and folders of several machines are one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import campaign
import pytest
import torch

from zoo.errors import ZooError
from zoo.registry.store import stored_groups
from zoo.search.ledger import read
from zoo.search.schedule import Plan, Took, jobs_of, read_took
from zoo.search.schedule import told as told_line
from zoo.search.stages import BASE, ROWS, Workshop, perform
from zoo.spec.cost import cost_model
from zoo.spec.profile import Profile

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.slow

PLAN = """
[data]
digits = "digits"

[[network]]
arch = "cnet"
size = 8
value = 1
epochs = 6
lr = 0.05
bases = { digits = 2 }
ledger = ["digits-0"]
figures = ["digits-0"]
random = 2
exams = ["digits-1"]
metrics = ["params"]
cf = [2]
policies = ["equal", "increasing"]
finetune_epochs = 1
finetune_images = 128
"""
BASES = ["base/cnet/8/digits-0", "base/cnet/8/digits-1"]
REST = [
    "evidence/cnet/8/params-cf2/digits-1",
    "figures/cnet/8/params-cf2/digits-0",
    "ledger/cnet/8/params-cf2/digits-0",
]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    path.write_text(PLAN)
    return path


def command(plan: Path, out: Path, *more: str) -> subprocess.Popen:
    arguments = ["run", "--plan", plan, "--out", out, "--merged", out.parent / "merged"]
    arguments += ["--ledgers", out.parent / "ledgers"]
    arguments += ["--data-dir", out.parent, "--together", "2", "--device", "cpu", *more]
    script = Path(campaign.__file__)
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def until(condition, seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_campaign_that_was_killed_goes_on_and_ends_as_one_that_was_not(plan, tmp_path) -> None:
    out = tmp_path / "out"
    history = out / BASES[0] / "training" / "history.jsonl"
    first = command(plan, out, "--budget", "5m")
    until(lambda: history.exists() and len(history.read_text().splitlines()) >= 2)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert not read_took([out / campaign.TOOK])
    spent = json.loads((out / BASES[0] / campaign.SPENT).read_text())
    assert spent["spent"] > 0

    second = command(plan, out, "--budget", "5m")
    told, _ = second.communicate(timeout=240)
    assert second.returncode == 0, told
    rows = {row.job: row for row in read_took([out / campaign.TOOK])}
    assert sorted(rows) == sorted(BASES + REST)
    assert rows[BASES[0]].seconds > spent["spent"]
    assert rows[BASES[0]].estimated == spent["estimated"]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        straight = Workshop(tmp_path / "straight", tmp_path, {"digits": "digits"})
        for job in jobs_of(Plan.read(plan)).values():
            perform(job, straight)
    finally:
        torch.set_num_threads(threads)
    for name in BASES:
        mine, theirs = ((folder / name / BASE).read_bytes() for folder in (out, straight.out))
        assert mine == theirs
    evidence = [json.loads((f / REST[0] / ROWS).read_text()) for f in (out, straight.out)]
    assert evidence[0] == evidence[1]
    assert [row["policy"] for row in evidence[0]] == ["base", "equal", "increasing"]


def test_results_of_two_machines_become_one_and_are_known_to_a_third(plan, tmp_path) -> None:
    places = {"merged": tmp_path / "merged", "ledgers": tmp_path / "ledgers"}
    for name, own in (("one", BASES[:1]), ("two", BASES[1:])):
        done = command(plan, tmp_path / name, "--budget", "3m", "--only", *own)
        told, _ = done.communicate(timeout=200)
        assert done.returncode == 0, told
    options = campaign.Merge(
        plan=plan, folders=(tmp_path / "one", tmp_path / "two", tmp_path / "one"), **places
    )
    campaign.merge_all(options)
    third = command(plan, tmp_path / "three", "--budget", "3m")
    told, _ = third.communicate(timeout=200)
    assert third.returncode == 0, told
    assert {row.job for row in read_took([tmp_path / "three" / campaign.TOOK])} == set(REST)

    campaign.merge_all(campaign.Merge(plan=plan, folders=(tmp_path / "three",), **places))
    merged = read([places["ledgers"] / "cnet.parquet"])
    # profiles by fidelities; policies by seeds by both; figures by seeds, three of them by both
    assert len(merged) == 2 * 2 + 2 * 2 * 2 + 6 * 2 + 3 * 2
    assert {row.source for row in merged} == {"random", "equal", "increasing", "decreasing"}
    assert {row.key.criterion for row in merged} == {"random", "l1", "taylor"}
    assert (places["merged"] / REST[0] / ROWS).is_file()

    before = (places["merged"] / campaign.TOOK).read_text()
    campaign.merge_all(options)
    assert (places["merged"] / campaign.TOOK).read_text() == before
    assert read([places["ledgers"] / "cnet.parquet"]) == merged


def test_a_job_that_fails_is_named(tmp_path) -> None:
    broken = tmp_path / "plan.toml"
    broken.write_text(PLAN.replace('digits = "digits"', 'digits = "imagefolder:{dir}/none"', 1))
    done = command(broken, tmp_path / "out", "--budget", "1m", "--only", BASES[0])
    told, _ = done.communicate(timeout=100)
    assert f"{BASES[0]} failed: see" in told
    assert told.splitlines()[-1].startswith("campaign: These failed, and their folders' log.txt")
    assert "none has no train/ folder" in (tmp_path / "out" / BASES[0] / "log.txt").read_text()
    assert done.returncode == 1


def test_a_budget_is_kept(plan, tmp_path) -> None:
    started = time.monotonic()
    done = command(plan, tmp_path / "out", "--budget", "1s")
    told, _ = done.communicate(timeout=60)
    assert done.returncode == 0, told
    assert "done" in told
    assert not read_took([tmp_path / "out" / campaign.TOOK])
    assert time.monotonic() - started < 60


def test_evidence_is_beside_what_the_search_found(tmp_path) -> None:
    pytest.importorskip("stable_baselines3")
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace("ledger = [", 'episodes = 8\ntasks = ["digits-0"]\nledger = [', 1))
    workshop = Workshop(tmp_path / "out", tmp_path, {"digits": "digits"})
    jobs = jobs_of(Plan.read(path))
    for name in (*BASES, "search/cnet/8/params-cf2", REST[0]):
        perform(jobs[name], workshop)
    profile = Profile.read(workshop.out / "search/cnet/8/params-cf2/params-cf2.json")
    rows = json.loads((workshop.out / REST[0] / ROWS).read_text())
    assert [row["policy"] for row in rows] == ["base", "searched", "equal", "increasing"]
    groups = stored_groups("cnet")
    assert groups
    own = cost_model(groups)(tuple(profile.kept[name] for name in groups.names))
    assert rows[1]["params"] == own.params


def test_a_base_network_that_is_not_at_hand_is_named(plan, tmp_path) -> None:
    job = jobs_of(Plan.read(plan))[REST[1]]
    with pytest.raises(ZooError, match=r"base/cnet/8/digits-0 is done, but its base\.safetensors"):
        perform(job, Workshop(tmp_path, tmp_path, {"digits": "digits"}))


def test_one_run_at_a_time_and_no_job_outlives_its_run(tmp_path) -> None:
    out, long = tmp_path / "out", tmp_path / "plan.toml"
    long.write_text(PLAN.replace("epochs = 6", "epochs = 2000", 1))
    log = out / BASES[0] / "training" / "history.jsonl"
    first = command(long, out, "--budget", "9h")
    until(log.exists)
    second = command(long, out, "--budget", "9h")
    told, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "is being written by another run" in told
    first.kill()
    first.communicate(timeout=60)
    until(lambda: not _running(out))


def _running(out: Path) -> list[str]:
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in processes.stdout.splitlines() if f"--out {out}" in line]


def test_damaged_notes_cost_no_more_than_a_job_done_again(plan, tmp_path) -> None:
    out = tmp_path / "out"
    job = out / BASES[0]
    job.mkdir(parents=True)
    for text in ("{bad", "[1]", '{"estimated": 1, "spent": "x"}'):
        (job / campaign.SPENT).write_text(text)
        assert campaign._remaining(job, 10.0) == 10.0
    row = Took("a", "base", "cnet", 1.0, 2.0, 3.0, "cpu")
    (out / campaign.TOOK).write_text('{"job": "half a li')
    with (out / campaign.TOOK).open("a") as stream:
        stream.write(told_line(row))
    assert read_took([out / campaign.TOOK]) == [row]
    assert campaign.Status(plan=plan, out=out, merged=tmp_path).took == [row]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "bsae"), "--only bsae: no job's name begins so"),
        (("--together", "0"), "--together must be an integer of at least 1"),
        (("--budget", "soon"), "'soon' is no budget"),
        (("--data-dir", "/no/such"), "--data-dir /no/such is not a folder"),
        (("--out", "/dev/null/x"), "Not a directory"),
    ],
)
def test_options_that_nothing_can_be_done_by(plan, tmp_path, arguments, message) -> None:
    done = command(plan, tmp_path / "out", "--budget", "1m", *arguments)
    told, _ = done.communicate(timeout=60)
    assert done.returncode == 1
    assert message in told
    assert "Traceback" not in told
