"""scripts/campaign.py: killed at any time it goes on, and folders of several machines are one."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import campaign
import pytest
import torch

import zoo
from zoo.errors import ZooError
from zoo.planning.best import best_policies
from zoo.registry.store import stored_groups
from zoo.search.estimates import Took, read_took
from zoo.search.estimates import told as told_line
from zoo.search.ledger import Ledger, read
from zoo.search.lookup import ledger_path
from zoo.search.schedule import Plan, jobs_of
from zoo.search.stages import BASE, ROWS, Workshop, perform
from zoo.spec.cost import cost_model
from zoo.spec.profile import Evidence, Profile
from zoo.storage.artefacts import save_checkpoint
from zoo.storage.checkpoints import read_checkpoint

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
    arguments += ["--registry", out.parent / "registry"]
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
    places = {"merged": tmp_path / "merged", "registry": tmp_path / "registry"}
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
    merged = read([places["registry"] / "ledger" / "cnet.parquet"])
    # profiles by fidelities; policies by seeds by both; figures by seeds, three of them by both
    assert len(merged) == 2 * 2 + 2 * 2 * 2 + 6 * 2 + 3 * 2
    assert {row.source for row in merged} == {"random", "equal", "increasing", "decreasing"}
    assert {row.key.criterion for row in merged} == {"random", "l1", "taylor"}
    assert (places["merged"] / REST[0] / ROWS).is_file()

    before = (places["merged"] / campaign.TOOK).read_text()
    campaign.merge_all(options)
    assert (places["merged"] / campaign.TOOK).read_text() == before
    assert read([places["registry"] / "ledger" / "cnet.parquet"]) == merged


def test_damaged_results_are_left_out_and_a_sound_copy_still_comes(plan, tmp_path) -> None:
    workshop = Workshop(tmp_path / "sound", tmp_path, {"digits": "digits"})
    jobs = jobs_of(Plan.read(plan))
    rows = [Took(name, job.stage, "cnet", 1.0, 1.0, 1.0, "cpu") for name, job in jobs.items()]
    for job in jobs.values():
        perform(job, workshop)
    (workshop.out / campaign.TOOK).write_text("".join(map(told_line, rows)))
    broken, merged, registry = (tmp_path / name for name in ("broken", "merged", "registry"))
    shutil.copytree(workshop.out, broken)
    for file in (broken / BASES[0] / BASE, broken / REST[0] / ROWS):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    shutil.rmtree(broken / REST[1])

    places = {"plan": plan, "merged": merged, "registry": registry}
    with pytest.raises(ZooError) as caught:
        campaign.merge_all(campaign.Merge(folders=(broken,), **places))
    left_out = {BASES[0], *REST[:2]}
    assert {line.partition(": ")[0] for line in str(caught.value).splitlines()[1:]} == left_out
    assert {row.job for row in read_took([merged / campaign.TOOK])} == jobs.keys() - left_out
    fewer = len(read([registry / "ledger" / "cnet.parquet"]))

    campaign.merge_all(campaign.Merge(folders=(workshop.out,), **places))
    assert {row.job for row in read_took([merged / campaign.TOOK])} == jobs.keys()
    for name, file in ((BASES[0], BASE), (REST[0], ROWS)):
        assert (merged / name / file).read_bytes() == (workshop.out / name / file).read_bytes()
    assert len(read([registry / "ledger" / "cnet.parquet"])) > fewer


def test_what_an_unfinished_search_measured_is_merged(tmp_path) -> None:
    (row, *_) = read([ledger_path("cnet")])
    with Ledger(tmp_path / "search/cnet/16/params-cf2/ppo/ledger.jsonl") as ledger:
        ledger.add(row)
    registry = tmp_path / "registry"
    places = {"merged": tmp_path / "merged", "registry": registry}
    campaign.merge_all(campaign.Merge(folders=(tmp_path,), **places))
    assert read([registry / "ledger" / "cnet.parquet"]) == [row]


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


def test_a_searched_profile_goes_into_the_registry_with_its_certificate(tmp_path) -> None:
    pytest.importorskip("stable_baselines3")
    path = tmp_path / "plan.toml"
    path.write_text(
        PLAN.replace("digits = 2", "digits = 3")
        .replace('ledger = ["digits-0"]', 'ledger = ["digits-1"]')
        .replace('exams = ["digits-1"]', 'exams = ["digits-1", "digits-2"]')
        .replace("cf = [2]", 'cf = [2]\nrecipe = ["digits-2"]\nrecipe_epochs = 1')
        .replace("random = 2", 'random = 3\nepisodes = 8\ntasks = ["digits-0"]\nstart = "best"')
        .replace("figures = [", "# [")
    )
    workshop = Workshop(tmp_path / "out", tmp_path, {"digits": "digits"})
    jobs = jobs_of(Plan.read(path))
    for job in jobs.values():
        perform(job, workshop)
    search, certificate = "search/cnet/8/params-cf2", "certificate/cnet/8/params-cf2"
    (workshop.out / campaign.TOOK).write_text(
        told_line(Took(certificate, "certificate", "cnet", 1.0, 1.0, 1.0, "cpu"))
    )
    registry = tmp_path / "registry"
    options = {"plan": path, "merged": tmp_path / "merged", "registry": registry}
    campaign.merge_all(campaign.Merge(folders=(workshop.out,), **options))

    profile = Profile.read(registry / "cnet" / "params-cf2.json")
    assert json.loads((registry / "index.json").read_text())["profiles"]
    assert profile.kept == Profile.read(workshop.out / search / "ppo.json").kept
    groups = stored_groups("cnet")
    assert groups
    cost = cost_model(groups)
    tuned: list[Evidence] = []
    for exam in dict.fromkeys(row.exam for row in profile.evidence):
        rows = {row.policy: row for row in profile.evidence if row.exam == exam}
        best = best_policies("params", 2, data=True)[0]
        standard = [f"{name}, recipe standard" for name in ("searched", best)]
        assert list(rows) == [
            "base", "searched", "cma-es", "equal", "increasing",
            *(standard if len(rows) == 7 else ()),
        ]  # fmt: skip
        tuned += [rows[name] for name in standard if name in rows]
        for agent, policy in (("ppo", "searched"), ("cma-es", "cma-es")):
            kept = Profile.read(workshop.out / search / f"{agent}.json").kept
            assert rows[policy].params == cost(tuple(kept[name] for name in groups.names)).params

    assert len(tuned) == 2
    assert all("teacher" in row.fidelity for row in tuned)

    found = profile.certificate
    assert found is not None
    ((ranked,), measured) = found.ranks, read([registry / "ledger" / "cnet.parquet"])
    assert ranked.data.endswith("8x8), test split")
    short = [
        r for r in measured if (r.key.fidelity, r.key.network) == (ranked.fidelity, ranked.network)
    ]
    random = [row for row in short if row.source == "random"]
    own = [row.accuracy for row in short if row.source == "searched"]
    assert len(random) == ranked.profiles == 3
    assert len(own) == ranked.draws == 8
    better = [row for row in random if row.accuracy >= statistics.fmean(own)]
    assert len(better) == ranked.at_least_as_good
    assert [each.rival for each in found.comparisons] == ["cma-es", "equal", "increasing"]
    assert {each.networks for each in found.comparisons} == {2}
    assert found.verdict.startswith("Provisional: not surely among the best 5%")

    text = path.read_text().replace("recipe_epochs", "recipe_best = false\nrecipe_epochs")
    path.write_text(text)
    recipe = "recipe/cnet/8/params-cf2/digits-2"
    alone = jobs_of(Plan.read(path))[recipe]
    perform(alone, workshop)
    rows = json.loads((workshop.out / recipe / "evidence.json").read_text())
    assert [row["policy"] for row in rows] == ["base", "searched, recipe standard"]
    assert alone.work == jobs[recipe].work / 2


def test_the_work_of_earlier_jobs_is_what_the_plan_says_now(plan, tmp_path) -> None:
    """Rates stay right when a stage's work is counted otherwise than when its jobs ran."""
    kept = Took("no/longer/planned", "base", "cnet", 3.0, 9.0, 9.0, "cpu")
    old = Took(BASES[0], "base", "cnet", 1.0, 60.0, 60.0, "cpu")
    (tmp_path / campaign.TOOK).write_text(told_line(old) + told_line(kept))
    rows = campaign.Shared(plan=plan, merged=tmp_path, out=tmp_path / "out").took
    assert [row.work for row in rows] == [jobs_of(Plan.read(plan))[BASES[0]].work, kept.work]


def test_a_base_network_that_was_not_merged_is_trained_again_for_those_that_need_it(
    plan, tmp_path
) -> None:
    names = [*BASES, *REST]
    done = [Took(name, "base", "cnet", 1.0, 1.0, 1.0, "cpu") for name in names]
    shared = campaign.Shared(plan=plan, merged=tmp_path / "merged", out=tmp_path / "out")
    assert shared.done(done) == set(names)
    assert shared.done(done[:-1]) == {*names} - {BASES[0], REST[2]}
    stored = tmp_path / "merged" / BASES[0] / BASE
    stored.parent.mkdir(parents=True)
    stored.touch()
    assert shared.done(done[:-1]) == {*names} - {REST[2]}


def test_a_base_network_may_start_from_a_checkpoint(tmp_path) -> None:
    start = zoo.create_model("cnet", 10, image_size=8, seed=7)
    save_checkpoint(start, tmp_path / "start.safetensors", {})
    path = tmp_path / "plan.toml"
    own = 'lr = 1e-9\npretrained = "{dir}/start.safetensors"'
    path.write_text(PLAN.replace("lr = 0.05", own).replace("epochs = 6", "epochs = 1"))
    workshop = Workshop(tmp_path / "out", tmp_path, {"digits": "digits"})
    perform(jobs_of(Plan.read(path))[BASES[0]], workshop)
    found = read_checkpoint(workshop.out / BASES[0] / BASE)
    assert found.metadata["pretrained"] == "start.safetensors"
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(found.state[name].float(), tensor, rtol=1e-3, atol=1e-4)


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


def test_a_job_ends_whose_run_ended_before_it_began(plan, tmp_path) -> None:
    run = subprocess.Popen(["true"])
    run.wait()
    job = [campaign.__file__, "one", BASES[0], "--plan", plan, "--out", tmp_path / "out"]
    job += ["--data-dir", tmp_path, "--parent", run.pid]
    done = subprocess.run([sys.executable, *map(str, job)], capture_output=True, timeout=100)
    assert done.returncode == 1
    assert not (tmp_path / "out" / BASES[0] / BASE).exists()


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


def test_a_merge_of_nothing_and_a_job_that_is_not_planned_are_errors(plan, tmp_path) -> None:
    with pytest.raises(ZooError, match="Name the folders to merge"):
        campaign.merge_all(campaign.Merge(plan=plan, folders=(), merged=tmp_path))
    with pytest.raises(ZooError, match="The plan has no job 'bsae/x'"):
        campaign.one(campaign.One(plan=plan, job="bsae/x", data_dir=tmp_path))
