"""Groups are traced once: those stored or cached are used only for the network they are of."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from helpers import randomised, same_tensors
from torch import nn
from torch.nn.utils import parametrizations

import zoo
from zoo.models import ARCHITECTURES, STORED, architecture, build_model
from zoo.registry import store as registry
from zoo.registry.store import stored_groups
from zoo.storage.dense import Uninitialised
from zoo.surgery.surgery import named_tensors
from zoo.tracing import dependencies, known_groups
from zoo.tracing.dependencies import trace_key
from zoo.tracing.fingerprint import fingerprint
from zoo.tracing.graph import channel_groups
from zoo.tracing.known_groups import traced_groups

SAMPLE = ("cnet", "resnet20-16", "resnet20", "torchvision:mobilenet_v3_small", "timm:resnet18")

SOURCE = """
import torch
from torch import nn
import helper

FACTOR = 1

class Net(nn.Module):
    shift = 0.0

    def __init__(self):
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head, self.note = nn.Linear(8, 4), "a"

    def middle(self, x):
        return self.mid(x)

    def forward(self, x):
        x = torch.relu(self.stem(x)) * FACTOR + self.shift
        return self.head(helper.act(self.middle(x)).mean((2, 3)))
"""
HELPER = """
import torch

def act(x):
    return torch.relu(x)
"""


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The class of every network that is traced, from an empty cache folder."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    export, seen = torch.export.export, []

    def counted(module: nn.Module, *rest: object, **options: object) -> object:
        seen.append(type(module).__name__)
        return export(module, *rest, **options)

    monkeypatch.setattr(torch.export, "export", counted)
    return seen


def imported(folder: Path, source: str = SOURCE, helper: str = HELPER) -> ModuleType:
    """The module `net` with this source, written to a folder and run anew."""
    folder.mkdir(exist_ok=True)
    modules = {}
    for name, text in (("helper", helper), ("net", source)):
        path = folder / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules["net"]


@pytest.fixture
def net(tmp_path: Path) -> nn.Module:
    return randomised(imported(tmp_path / "code").Net())


X = torch.zeros(1, 3, 8, 8)


# --- the user's cache -----------------------------------------------------------------------------


def test_a_live_network_is_traced_once(traces: list[str], net: nn.Module) -> None:
    first = zoo.prune(net, X, cf=2)
    again = copy.deepcopy(net)
    plan = zoo.plan(again, X, cf=2)
    second = zoo.prune(again.train(), X, cf=2)
    assert len(traces) == 1
    assert same_tensors(first, second)
    assert first.pruning == second.pruning
    assert plan == first.pruning.plan
    assert zoo.plan(randomised(again), X, cf=3).got > 2  # other weights, another factor
    assert len(traces) == 1
    assert traced_groups(net, X) == (None, channel_groups(net, X))


@pytest.mark.parametrize("kind", ["size", "batch", "input type", "weights' type", "width", "tied"])
def test_another_input_or_tensor_is_traced_again(
    traces: list[str], net: nn.Module, kind: str
) -> None:
    zoo.plan(net, X, cf=2)
    x = {"size": torch.zeros(1, 3, 12, 12), "batch": torch.zeros(2, 3, 8, 8)}.get(kind, X)
    if kind == "width":
        net.mid, net.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
    if kind == "tied":
        net.mid.bias = net.stem.bias
    if "type" in kind:
        assert trace_key(net, x) != trace_key(net, x.double())
        net, x = net.double(), x.double()
    plan = zoo.plan(net, x, cf=2)
    assert len(traces) == 2
    assert plan.image_size == x.shape[-1]


EDITS = {
    "forward": ("helper.act(self.middle(x))", "helper.act(self.middle(x) + x)"),
    "a method": ("return self.mid(x)", "return self.mid(x) + x"),
    "a global": ("FACTOR = 1", "FACTOR = 2"),
    "a class attribute": ("shift = 0.0", "shift = 1.0"),
    "an attribute": ('"a"', '"b"'),
    "a helper": ("return torch.relu(x)", "return torch.relu(x) + 1"),
    "a name in a helper": ("return torch.relu(x)", "return torch.tanh(x)"),
}


@pytest.mark.parametrize("what", EDITS)
@pytest.mark.parametrize("place", ["code", "other"])
def test_edited_code_is_traced_again(
    traces: list[str], net: nn.Module, tmp_path: Path, what: str, place: str
) -> None:
    zoo.plan(net, X, cf=2)
    source, helper = (text.replace(*EDITS[what]) for text in (SOURCE, HELPER))
    edited = imported(tmp_path / place, source, helper).Net()
    edited.load_state_dict(net.state_dict())
    pruned = zoo.prune(edited, X, cf=2)
    assert len(traces) == 2
    assert pruned(X).shape == (1, 4)
    assert traced_groups(edited, X) == (None, channel_groups(edited, X))


@pytest.mark.parametrize("what", EDITS)
def test_edited_code_of_an_installed_package_is_traced_again(
    traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Installed code may refer to what nobody can describe: that alone is told by its class."""
    monkeypatch.setattr(dependencies, "_installed", lambda name: name in ("net", "helper"))
    lock = "\nimport threading\nLOCK = threading.Lock()\n"
    source, helper = SOURCE + lock, HELPER.replace("return", "LOCK.locked()\n    return") + lock
    for _ in range(2):
        zoo.plan(imported(tmp_path, source, helper).Net(), X, cf=2)
    assert len(traces) == 1
    net = imported(tmp_path, source.replace(*EDITS[what]), helper.replace(*EDITS[what])).Net()
    zoo.plan(net, X, cf=2)
    assert len(traces) == 2
    monkeypatch.setattr(dependencies, "_installed", lambda _name: False)
    assert trace_key(net, X) is None


SPECIAL = """
import dataclasses
import torch
from torch import nn

class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.all = nn.ModuleList(nn.Conv2d(3 if not n else 8, 8, 1) for n in range(2))

    def __iter__(self):
        yield from (self[0], self[1])

    def __len__(self):
        return 2

    def __getitem__(self, at):
        return self.all[at]

    def __contains__(self, item):
        return True

class Shift:
    def __init__(self):
        self.by = 1.0

    def __radd__(self, x):
        return x + self.by

@dataclasses.dataclass
class Settings:
    sizes: list = dataclasses.field(default_factory=list)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = Blocks()
        self.head, self.settings = nn.Linear(8, 4), Settings()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        if "a" in self.blocks:
            x = self.blocks[-1](x) * len(self.blocks)
        return self.head((x + Shift()).mean((2, 3)))
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(self[0], self[1])", "(self[0], self[1], self[1])"),
        ("return 2", "return 3"),
        ("self.all[at]", "self.all[abs(at)]"),
        ("return True", "return False"),
        ("self.by = 1.0", "self.by = 2.0"),
        ("x + self.by", "x - self.by"),
    ],
)
def test_edited_special_methods_are_traced_again(
    traces: list[str], tmp_path: Path, old: str, new: str
) -> None:
    for _ in range(2):
        zoo.plan(imported(tmp_path, SPECIAL).Net(), X, cf=1.3)
    assert len(traces) == 1
    zoo.plan(imported(tmp_path, SPECIAL.replace(old, new)).Net(), X, cf=1.3)
    assert len(traces) == 2


def test_a_method_of_timm_that_is_patched_is_traced_again(
    traces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass of timm's classifier goes through `forward_head`."""
    net = zoo.create_model("timm:resnet10t", 4)
    images = torch.zeros(1, 3, 32, 32)
    known = zoo.plan(net, images, cf=2)
    head = type(net).forward_head
    monkeypatch.setattr(type(net), "forward_head", lambda self, x: head(self, x + x))
    assert zoo.plan(net, images, cf=2).kept.keys() == known.kept.keys()
    assert len(traces) == 2


def test_the_same_code_elsewhere_is_the_same(
    traces: list[str], net: nn.Module, tmp_path: Path
) -> None:
    zoo.plan(net, X, cf=2)
    zoo.plan(imported(tmp_path / "other").Net(), X, cf=2)
    assert len(traces) == 1


def test_what_is_changed_in_memory_is_traced_again(traces: list[str], net: nn.Module) -> None:
    module = sys.modules["net"]
    zoo.plan(net, X, cf=2)
    module.FACTOR = 3
    zoo.plan(net, X, cf=2)
    module.helper.act = torch.tanh
    zoo.plan(net, X, cf=2)
    module.Net.middle = lambda self, x: self.mid(x) + x
    assert len(zoo.plan(net, X, cf=2).kept) == 1
    assert len(traces) == 4


def test_a_library_class_that_is_patched_is_traced_again(
    traces: list[str], net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.plan(net, X, cf=2)
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: forward(self, x) + 1)
    zoo.plan(net, X, cf=2)
    assert len(traces) == 2


@pytest.mark.parametrize(
    "kind", ["forward hook", "pre-hook", "global hook", "parametrization", "forward", "object"]
)
def test_what_cannot_be_told_is_never_cached(traces: list[str], net: nn.Module, kind: str) -> None:
    handle = None
    if kind == "forward hook":
        net.mid.register_forward_hook(lambda *_: None)
    elif kind == "pre-hook":
        net.mid.register_forward_pre_hook(lambda *_: None)
    elif kind == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    elif kind == "parametrization":
        parametrizations.weight_norm(net.mid)
    elif kind == "forward":
        net.mid.forward = net.mid.forward
    else:
        net.note = object()
    try:
        assert trace_key(net, X) is None
        if kind in ("forward", "object"):
            for _ in range(2):
                zoo.plan(net, X, cf=2)
            assert len(traces) == 2
    finally:
        if handle is not None:
            handle.remove()


def test_a_damaged_cache_file_is_made_anew(
    traces: list[str], net: nn.Module, tmp_path: Path
) -> None:
    plan = zoo.plan(net, X, cf=2)
    (file,) = (tmp_path / "cache" / "groups").iterdir()
    whole = file.read_text()
    for text in ("", whole[:100], whole.replace('"groups"', '"gruops"'), "[]", "\0"):
        file.write_text(text)
        assert zoo.plan(net, X, cf=2) == plan
        assert file.read_text() == whole
    assert len(traces) == 6


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    traces: list[str], net: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    assert zoo.plan(net, X, cf=2) == zoo.plan(net, X, cf=2)
    assert len(traces) == 2


def test_an_unregistered_architecture_is_traced_once(traces: list[str]) -> None:
    base = zoo.create_model("torchvision:squeezenet1_1", 3)
    assert stored_groups("torchvision:squeezenet1_1") is None
    first, second = (known_groups.groups_of("torchvision:squeezenet1_1", base, 64) for _ in "ab")
    assert first == second
    assert len(traces) == 1


def test_a_key_is_the_same_in_another_process(net: nn.Module, tmp_path: Path) -> None:
    lines = (
        "import sys, torch",
        f"sys.path.insert(0, {str(tmp_path / 'code')!r})",
        "from net import Net",
        "from zoo.tracing.dependencies import trace_key",
        "print(trace_key(Net(), torch.zeros(1, 3, 8, 8)))",
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == trace_key(net, X)


# --- stored groups --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, *STORED])
def test_stored_groups_are_of_the_network_that_is_built(name: str) -> None:
    groups, known = stored_groups(name), architecture(name)
    assert groups is not None
    assert groups.image_size == known.image_size
    with Uninitialised():
        module = build_model(name, known.num_classes)
        others = [build_model(name, 3, image_size=64)]
        if name.startswith("timm:"):
            weights = timm.list_pretrained(f"{name.removeprefix('timm:')}.*")[0]
            others.append(build_model(f"timm:{weights}", 3))
    assert {fingerprint(other) for other in (module, *others)} == {groups.fingerprint}
    assert {k: tuple(t.shape) for k, t in named_tensors(module).items()} == groups.shapes


@pytest.mark.parametrize("name", SAMPLE)
def test_stored_groups_are_those_that_tracing_finds(name: str) -> None:
    groups, known = stored_groups(name), architecture(name)
    assert groups is not None
    x = torch.zeros(1, 3, known.image_size, known.image_size)
    traced = channel_groups(build_model(name, known.num_classes), x)
    assert traced == groups


def test_a_changed_network_has_another_fingerprint() -> None:
    def changed(path: str, name: str, value: object) -> str:
        module = build_model("resnet20-16", 10)
        setattr(module.get_submodule(path), name, value)
        return fingerprint(module)

    seen = [
        fingerprint(build_model("resnet20-16", 10)),
        changed("layer2.0.conv1", "stride", (1, 1)),
        changed("layer2.0.conv1", "groups", 2),
        changed("layer1.1", "bn2", nn.Identity()),
        changed("layer1.1", "bn2", nn.InstanceNorm2d(16)),
        changed("layer1.0.conv1", "bias", nn.Parameter(torch.zeros(16))),
        changed("", "extra", nn.ReLU()),
        changed("", "width", 3),
    ]
    assert len(set(seen)) == len(seen)


def test_groups_of_another_structure_are_not_used(
    traces: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundled = stored_groups("cnet")
    assert bundled is not None
    base = zoo.create_model("cnet", 3, image_size=16)
    expected = zoo.load("cnet", 2, base, profile="equal")
    assert traces == []
    registry.store_groups("cnet", replace(bundled, fingerprint="of another"), tmp_path)
    monkeypatch.setattr(registry, "registry_folder", lambda: tmp_path)
    for _ in range(2):
        model = zoo.load("cnet", 2, base, profile="equal")
        assert same_tensors(model, expected)
    assert len(traces) == 1
    zoo.save(model, tmp_path / "m")
    assert same_tensors(zoo.load_pruned(tmp_path / "m"), model)
    assert len(traces) == 1


def test_callers_do_not_share_what_was_read() -> None:
    first = stored_groups("cnet")
    assert first is not None
    for own in (first.shapes, first.positions, first.unprunable, first.attributes):
        own.clear()
    second = stored_groups("cnet")
    assert second is not None
    assert second.shapes
    assert second.positions


# --- torchvision's classifiers --------------------------------------------------------------------

FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf"),
    *("regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0"),
    *("swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32", "wide_resnet50_2"),
)


@pytest.mark.parametrize("member", FAMILIES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_classifier_of_every_torchvision_family(member: str) -> None:
    with Uninitialised():
        module = build_model(f"torchvision:{member}", 7)
    last = list(module.state_dict())[-1].rpartition(".")[0]
    assert architecture(f"torchvision:{member}").classifier == last
    assert module.get_submodule(last).weight.shape[0] == 7
