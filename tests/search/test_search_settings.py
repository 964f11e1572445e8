"""Settings of a search: what they mean, how they are written down, and what is refused."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from tiny_search import load, search, tiny_search

from zoo.data.datasets import load_data
from zoo.errors import ZooError
from zoo.models import build_model
from zoo.search.env import EnvSettings
from zoo.search.provenance import command_of, shortened
from zoo.search.run import SearchConfig
from zoo.search.settings import parse_budget
from zoo.search.tasks import task_data
from zoo.storage.artefacts import save_checkpoint

pytest.importorskip("stable_baselines3")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SearchConfig:
    return tiny_search(tmp_path_factory.mktemp("campaign"))


def test_the_command_of_a_profile_is_its_search(tmp_path):
    import tyro

    config = SearchConfig(
        arch="cnet", tasks=("a@cifar10[:5]", "hf:o/r/b.pt@v1@imagefolder:data[5:]"), out=tmp_path,
        cf=(2.0, 4.5), env=EnvSettings(metric="macs", sigma=0.5), val_images=None, budget="20m",
        finetune_images=None, conditioned=True, cluster="ray://head:10001", seed=0, resume=True,
        start="bundled:cnet/params-cf4",
    )  # fmt: skip
    program, command, *flags = shlex.split(command_of(config, 160))
    assert (program, command) == ("zoo", "search")
    again = tyro.cli(SearchConfig, args=flags)
    assert again == dataclasses.replace(
        config, out=Path(tmp_path.name), episodes=160, budget=None, resume=False
    )
    absolute = dataclasses.replace(config, tasks=("/x/y/s0.pt@imagefolder:/data/tiny[:50]",))
    assert "s0.pt@imagefolder:tiny[:50]" in command_of(absolute, 1)
    assert "/x" not in command_of(absolute, 1)
    assert (
        shortened("cnet=/x/y/s0.pt@imagefolder:/data/tiny[:50]")
        == "cnet=s0.pt@imagefolder:tiny[:50]"
    )
    assert shortened("--out") == "--out"


@pytest.mark.parametrize(
    "changes",
    [
        {"episodes": 0}, {"episodes": -8}, {"screen": 0}, {"distill_steps": 0},
        {"episode_images": 0}, {"calibration_images": 0},
        {"val_images": -60}, {"finalists": 0}, {"final_seeds": 0}, {"workers": 0},
        {"finetune_images": 0}, {"std": 0.0}, {"finetune_lr": -1.0}, {"cf": ()},
        {"budget": "soon"}, {"seed": -1}, {"seed": 2**32},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_at_once(changes):
    (name,) = changes
    with pytest.raises(ZooError, match="factor" if name == "cf" else name):
        SearchConfig("cnet", ("a",), Path("out"), **changes)


@pytest.mark.parametrize(
    ("agent", "changes"),
    [
        ("cma-es", {"std": 0.2}), ("gnn", {"env": EnvSettings(observation="raw")}),
        ("random", {"env": EnvSettings(features="live")}), ("genetic", {"screen": 4}),
        ("ppo", {"cluster": "ray://head:10001", "workers": 2}),
    ],
)  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(agent, changes):
    SearchConfig("cnet", ("a",), Path("out"), agent=agent)
    with pytest.raises(ZooError, match=r"is for (ppo|random)|leave out workers"):
        SearchConfig("cnet", ("a",), Path("out"), agent=agent, **changes)


def test_without_a_number_the_budget_says_how_many_episodes_are_played():
    def most(**settings):
        return SearchConfig("cnet", ("a",), Path("out"), **settings).most_episodes

    assert (most(), most(episodes=8, budget="1h"), most(episodes=9)) == (320, 8, 9)
    assert most(budget="1h") > 3000


def test_tasks_that_share_a_file_name_have_names_of_their_own(config, tmp_path):
    (tmp_path / "other").mkdir()
    copies = [tmp_path / "b.safetensors", tmp_path / "other" / "b.safetensors"]
    for path, copy in zip(config.tasks, copies, strict=True):
        copy.write_bytes(Path(path).read_bytes())
    for ending in ("", "@digits"):
        tasks = tuple(f"{copy}{ending}" for copy in copies)
        named = [task.name for task in load(dataclasses.replace(config, tasks=tasks))]
        assert named == ["b.safetensors", "b.safetensors (2)"]


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("a.pt", ("a.pt", "digits")),
        ("a.pt@cifar10", ("a.pt", "cifar10")),
        ("a.pt@cifar10[:5]", ("a.pt", "cifar10[:5]")),
        ("a.pt@imagefolder:/x/y[5:]", ("a.pt", "imagefolder:/x/y[5:]")),
        ("hf:o/r/a.pt@v1", ("hf:o/r/a.pt@v1", "digits")),
        ("hf:o/r/a.pt@v1@cifar10", ("hf:o/r/a.pt@v1", "cifar10")),
        ("hf:o/r/a.pt@digits2", ("hf:o/r/a.pt@digits2", "digits")),
        ("a.pt@hf:o/data@v2[:5]", ("a.pt", "hf:o/data@v2[:5]")),
        ("hf:o/r/a.pt@v1@hf:o/data", ("hf:o/r/a.pt@v1", "hf:o/data")),
    ],
)
def test_a_task_names_its_data_behind_the_last_at(reference, parts):
    assert task_data(reference, "digits") == parts


@pytest.mark.parametrize(
    ("text", "seconds"), [("20m", 1200), ("1h30m", 5400), ("90s", 90), ("2h", 7200), ("1m1s", 61)]
)
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "0m", "20 m", "-5m", "5d", "30m1h"])
def test_what_is_no_budget(text):
    with pytest.raises(ZooError, match="no budget"):
        parse_budget(text)


def test_bad_input_is_refused(config, tmp_path):
    def refused(match: str, **changes) -> None:
        with pytest.raises(ZooError, match=match):
            search(dataclasses.replace(config, out=tmp_path, resume=True, **changes))

    refused("reaches", cf=(500.0,))
    refused("at least one task", tasks=())
    refused("Did you mean 'ppo'", agent="ppp")
    splits = load_data("digits", size=8)
    path = str(tmp_path / "base.safetensors")
    save_checkpoint(build_model("cnet", 10, image_size=8), path, {"split_digest": "f00"})
    refused("another validation split", tasks=(path,))
    save_checkpoint(build_model("cnet", 10, image_size=8), path, {"split_digest": splits.digest})
    refused("near chance", tasks=(path,))
    save_checkpoint(build_model("resnet20", 10, image_size=8), path, {})
    refused("resnet20", tasks=(config.tasks[0], path))
    refused("classes", tasks=(f"{config.tasks[0]}@digits[:4]",))
