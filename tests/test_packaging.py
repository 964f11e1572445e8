from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
import zipfile
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "torchvision", "timm", "numpy", "accelerate", "onnx", "onnxruntime", "rich")


def run_python(code: str, folder: Path, path: Path | None = None) -> str:
    """What `code` prints in a fresh interpreter that starts in `folder`."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    install = [sys.executable, "-m", "pip", "install", *options, str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder


def test_the_wheel_holds_the_package_and_its_registry_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"zoo", "prunezoo-0.1.0.dist-info"}
    files = {p.relative_to(ROOT / "registry") for p in (ROOT / "registry").rglob("*.*")}
    inside = {Path(n).relative_to("zoo/_registry") for n in names if n.startswith("zoo/_registry/")}
    assert inside == files
    sources = {p.relative_to(ROOT) for p in (ROOT / "zoo").rglob("*.py")}
    assert {Path(name) for name in names if name.endswith(".py")} == sources
    assert {f"zoo/training/recipes/{name}.toml" for name in zoo.RECIPES} <= set(names)
    assert "zoo/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_lists_its_profiles_from_another_folder(installed, tmp_path):
    code = (
        "import json, zoo\n"
        "entries = zoo.list_profiles()\n"
        "cuts = {e.reference: zoo.get_profile(e.reference).kept for e in entries}\n"
        "print(json.dumps([zoo.__file__, cuts]))"
    )
    where, cuts = json.loads(run_python(code, tmp_path, installed))
    assert Path(where).is_relative_to(installed)
    here = {e.reference: zoo.get_profile(e.reference).kept for e in zoo.list_profiles()}
    assert cuts == here
    assert "bundled:resnet20-16/params-cf4" in cuts


def test_an_installed_wheel_knows_the_groups_of_its_architectures(installed, tmp_path):
    code = (
        "from zoo.registry.store import stored_groups\n"
        "names = ('cnet', 'resnet20-16', 'resnet20-64')\n"
        "print([len(stored_groups(name).groups) for name in names])"
    )
    assert json.loads(run_python(code, tmp_path, installed)) == [6, 13, 13]


@pytest.mark.parametrize("statement", ["import zoo", "import zoo; zoo.list_profiles()"])
def test_importing_the_zoo_and_listing_profiles_imports_nothing_heavy(tmp_path, statement):
    code = f"{statement}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run_python(code, tmp_path))
    assert not [name for name in HEAVY if name in loaded]


def test_every_public_name_resolves_and_is_listed():
    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
    assert set(zoo.__all__) <= set(dir(zoo))
    for name in ("load", "prune", "plan", "finetune", "evaluate", "export", "list_profiles"):
        returned = typing.get_type_hints(getattr(zoo, name))["return"]
        types = typing.get_args(returned) or (returned,)
        assert all(t.__module__.startswith("torch") or t is getattr(zoo, t.__name__) for t in types)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = zoo.lod


@pytest.mark.slow
def test_an_environment_can_use_the_packages_of_the_python_it_was_made_with(tmp_path: Path) -> None:
    """What is installed there already is not downloaded again: the new folder stays small."""
    new = tmp_path / "venv"
    make = ["make", "venv", f"PYTHON={sys.executable}", "SITE=1", f"VENV={new}"]
    subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
    code = "import torch, zoo; print(torch.__file__, zoo.__file__)"
    done = subprocess.run([new / "bin/python", "-c", code], capture_output=True, text=True)
    torch, zoo_file = done.stdout.split()
    assert Path(torch).is_relative_to(sys.prefix)
    assert Path(zoo_file).is_relative_to(ROOT)
    (packages,) = new.glob("lib/python*/site-packages")
    assert not (packages / "torch").exists()
    assert sum(file.stat().st_size for file in new.rglob("*") if file.is_file()) < 2e8
