"""What a plan's jobs cost, which of them comes next, and plans that say what cannot be."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.search.estimates import START, Took, estimate, next_job, read_took, told
from zoo.search.schedule import Job, Plan, jobs_of

PLAN = """
[data]
a = "digits"
b = "imagefolder:{dir}/b"

[[network]]
arch = "cnet"
size = 16
value = 2
epochs = 10
bases = { a = 2, b = 1 }
tasks = ["a-0"]
held_back = ["b-0"]
exams = ["a-1"]
ledger = ["a-0"]
metrics = ["params"]
cf = [2, 4]

[[network]]
arch = "resnet20"
size = 32
value = 0.5
epochs = 10
bases = { a = 1 }
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return Plan.read(path)


@pytest.fixture
def jobs(plan: Plan) -> dict[str, Job]:
    return jobs_of(plan)


def took(job: Job, rate: float, machine: str = "cpu x") -> Took:
    seconds = START + rate * job.work
    return Took(job.name, job.stage, job.network.arch, job.work, seconds, 1.0, machine)


# --- jobs -----------------------------------------------------------------------------------------


def test_every_job_comes_after_those_that_it_needs(jobs: dict[str, Job]) -> None:
    seen: set[str] = set()
    for name, job in jobs.items():
        assert seen.issuperset(job.needs)
        seen.add(name)
    assert jobs["search/cnet/16/params-cf4"].needs == ("base/cnet/16/a-0", "base/cnet/16/b-0")
    evidence = jobs["evidence/cnet/16/params-cf2/a-1"]
    assert evidence.needs == ("base/cnet/16/a-1", "search/cnet/16/params-cf2")


def test_a_certificate_ranks_on_exams_and_needs_all_evidence(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        PLAN.replace('ledger = ["a-0"]', 'ledger = ["a-0", "a-1"]', 1)
        .replace("a = 2", "a = 3", 1)
        .replace('exams = ["a-1"]', 'exams = ["a-1", "a-2"]', 1)
    )
    jobs = jobs_of(Plan.read(path))
    assert jobs["certificate/cnet/16/params-cf2"].needs == (
        "base/cnet/16/a-1",
        "search/cnet/16/params-cf2",
        "evidence/cnet/16/params-cf2/a-1",
        "evidence/cnet/16/params-cf2/a-2",
        "ledger/cnet/16/params-cf2/a-1",
    )
    path.write_text(PLAN)  # its ledger is of no exam
    assert not any(name.startswith("certificate") for name in jobs_of(Plan.read(path)))


def test_the_work_of_a_training_is_three_passes_of_its_images(jobs: dict[str, Job]) -> None:
    """Of one image resnet20 has 40,551,040 multiply-accumulates; at half the size a quarter."""
    assert jobs["base/resnet20/32/a-0"].work == pytest.approx(3 * 45_000 * 10 * 40_551_040e-12)
    assert jobs["base/cnet/16/a-0"].work == pytest.approx(3 * 45_000 * 10 * 16_225_280e-12 / 4)


def test_the_work_follows_the_number_of_images(tmp_path: Path, jobs: dict[str, Job]) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace("[[network]]", "[images]\nb = 15_000\n\n[[network]]", 1))
    others = jobs_of(Plan.read(path))
    name = "base/cnet/16/b-0"
    assert others.pop(name).work == pytest.approx(jobs[name].work / 3)
    assert all(job.work == jobs[name].work for name, job in others.items())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[network]]", "[images]\nc = 9\n[[network]]", "counts the images of 'c': not in .data."),
        ('exams = ["a-1"]', 'exams = ["a-0"]', "searches of cnet see the exam 'a-0'"),
        ('exams = ["a-1"]', 'exams = ["b-0"]', "searches of cnet see the exam 'b-0'"),
        ('tasks = ["a-0"]', 'tasks = ["a-2"]', "cnet has no base network 'a-2'"),
        ("a = 2, b = 1", "a = 2, c = 1", "cnet names the data 'c'"),
        ('"resnet20"\nsize = 32', '"cnet"\nsize = 16', "cnet at 16 pixels twice"),
        ("epochs = 10", "epoch = 10", "unknown key 'epoch'. Did you mean 'epochs'"),
        ("[data]", "[data", "is no plan"),
        ("size = 16", "size = 0", "cnet's size must be an integer of at least 1"),
        ("cf = [2, 4]", "cf = [0.5]", "cnet's cf must be over 1"),
        ("value = 2", "value = 2\nlr = nan", "cnet's lr must be over 0"),
        ("value = 2", "value = nan", "cnet's value must be over 0"),
        ("value = 2", "value = 2\nseeds = []", "cnet has no seeds"),
        ('ledger = ["a-0"]', 'ledger = ["a-1"]', "cnet has one exam; a certificate needs two"),
        ('["params"]', '["flops"]', "cnet's metric"),
        ("cf = [2, 4]", 'cf = [2]\npolicies = ["eqal"]', "cnet's policy.*Did you mean 'equal'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace(old, new, 1))
    with pytest.raises(ZooError, match=message):
        Plan.read(path)


# --- estimates ------------------------------------------------------------------------------------


def test_the_nearest_jobs_tell_what_one_takes(jobs: dict[str, Job]) -> None:
    job = jobs["base/cnet/16/a-1"]
    other = jobs["base/resnet20/32/a-0"]
    search = jobs["search/cnet/16/params-cf2"]
    guess = estimate(job, [], "cpu x")
    assert guess == estimate(job, [took(other, 3.0, "another machine")], "cpu x")
    assert estimate(job, [], "a GPU") < guess
    for rows, rate in (
        ([took(other, 3.0)], 3.0),
        ([took(other, 3.0), took(search, 5.0)], 5.0),
        ([took(other, 3.0), took(search, 5.0), took(jobs["base/cnet/16/a-0"], 7.0)], 7.0),
    ):
        assert estimate(job, rows, "cpu x") == pytest.approx(START + rate * job.work)


def test_of_one_job_the_first_row_counts_and_missing_files_have_none(
    jobs: dict[str, Job], tmp_path: Path
) -> None:
    rows = [took(job, 2.0) for job in jobs.values()]
    for name, own in (("a", rows[:3]), ("b", rows[1:])):
        (tmp_path / name).write_text("".join(map(told, own)))
    assert read_took([tmp_path / "a", tmp_path / "missing", tmp_path / "b"]) == rows


# --- what comes next ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def campaign() -> dict[str, Job]:
    return jobs_of(Plan.read(Path(__file__).parents[2] / "scripts" / "campaign.toml"))


@given(left=st.floats(0, 5000), random=st.integers(0).map(Random))
def test_what_is_next_is_ready_affordable_and_worth_most(campaign, left: float, random) -> None:
    jobs = campaign
    costs = {name: random.uniform(1, 4000) for name in jobs}
    done = {name for name in jobs if random.random() < 0.5}
    running = {name for name in jobs if name not in done and random.random() < 0.2}
    job = next_job(jobs, done, running, costs, left)
    ready = [
        own
        for own in jobs.values()
        if own.name not in done | running and done.issuperset(own.needs) and costs[own.name] <= left
    ]
    assert (job is None) == (not ready)
    if job is not None:
        assert job in ready
        assert all(own.value <= _worth(job, jobs) for own in ready)


def _worth(job: Job, jobs: dict[str, Job]) -> float:
    waiting = [own for own in jobs.values() if job.name in own.needs]
    return max([job.value, *(_worth(own, jobs) for own in waiting)])


def test_a_cheap_base_network_of_little_value_comes_first_if_much_waits_for_it(
    jobs: dict[str, Job],
) -> None:
    costs = dict.fromkeys(jobs, 10.0)
    order, done = [], set[str]()
    while (job := next_job(jobs, done, (), costs, 10.0)) is not None:
        order.append(job.name)
        done.add(job.name)
    assert done == jobs.keys()
    assert order.index("base/resnet20/32/a-0") == len(order) - 1
    assert next_job(jobs, (), (), costs, 9.0) is None


@settings(max_examples=10)
@given(random=st.integers(0).map(Random))
def test_profiles_are_finished_one_after_the_other(campaign, random) -> None:
    jobs = campaign
    costs = {name: random.uniform(1, 4000) for name in jobs}
    done, begun = set[str](), set[str]()
    while (job := next_job(jobs, done, (), costs, 5000)) is not None:
        if job.stage in ("search", "evidence", "recipe") and job.network.tasks:
            begun.add("/".join(job.name.split("/")[1:4]))  # as resnet20/16/macs-cf4
            assert len(begun) == 1, f"{job.name} comes before a profile that was begun is finished"
        elif job.stage == "certificate":
            begun.clear()
        done.add(job.name)
    assert done == jobs.keys()
