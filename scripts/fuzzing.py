"""The targets of `fuzz.py`: valid files, how they are spoilt, and who reads them."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

import zoo
from zoo.deployment.metadata import Metadata
from zoo.publishing.checksums import read_checksums
from zoo.publishing.model_repository import config_of
from zoo.registry.store import read_entries, read_groups, registry_folder
from zoo.spec.plans import PruningRecord
from zoo.spec.profile import Profile
from zoo.storage.checkpoints import read_checkpoint

__all__ = ["TARGETS", "Target"]

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e308, 1e-320, float("nan"),
    float("inf"), "", "\x00", "../../../etc/passwd", "/dev/zero", "C:\\con", "timm:resnet50",
    "resnet20-16", "torchvision:vgg19", "a" * 70_000, "hf:a/b", "file:/dev/zero", "\ud800", [], {},
    [[]], {"": None}, [10**9] * 3, "__class__", "schema_version",
)  # fmt: skip

CALLS = ("os\nsystem", "builtins\neval", "builtins\nexec", "subprocess\nPopen", "posix\nsystem",
         "torch\nload", "torch.hub\nload", "builtins\ngetattr", "numpy\nload", "torch.jit\nload",
         "shutil\nrmtree", "importlib\nimport_module", "argparse\nNamespace", "pathlib\nPosixPath",
         "collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2")  # fmt: skip

Spoil = Callable[[Random, Sequence[bytes]], bytes]


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
        name: for the report.
        seeds: valid files, made with a scratch folder at hand.
        spoil: a bad file from the valid ones.
        read: what reads it, given its content and a scratch folder.
    """

    name: str
    seeds: Callable[[Path], list[bytes]]
    spoil: Spoil
    read: Callable[[bytes, Path], object]


# --- spoiling -------------------------------------------------------------------------------------


def spoilt_bytes(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Flipped, cut, repeated, inserted and overwritten bytes."""
    content = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(content) + 1)
        at = min(at, random.choice((8, 64, 1024, len(content))))
        kind = random.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + random.randrange(1, 64)]
        elif kind == 3:
            content[at:at] = random.randbytes(random.randrange(1, 32))
        elif kind == 4:
            content[at : at + 8] = struct.pack("<Q", random.choice((0, 1, 2**31, 2**63, 2**64 - 1)))
        else:
            content[at:at] = content[at : at + random.randrange(1, 256)] * random.randrange(1, 8)
    return bytes(content)


def spoilt_json(random: Random, seeds: Sequence[bytes]) -> bytes:
    """A document with nasty values, other keys, deep nesting; now and then one that is none."""
    if random.random() < 0.15:
        return spoilt_bytes(random, seeds)
    if random.random() < 0.02:
        depth = random.choice((100, 5_000, 200_000))
        return random.choice((b"[", b'{"a":')) * depth
    document = json.loads(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        document = _with_edit(random, document)
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _with_edit(random: Random, document: Any) -> Any:
    """The document with one value somewhere in it replaced, removed, added or repeated."""
    whole = copy.deepcopy(document)
    at = whole
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return _nasty(random)
        key = random.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and random.random() < 0.7:
            at = at[key]
            continue
        kind = random.random()
        if kind < 0.7:
            at[key] = _nasty(random)
        elif kind < 0.85:
            del at[key]
        elif isinstance(at, dict):
            at[str(_nasty(random))[:64]] = at[key]
        else:
            at.extend([at[key]] * random.choice((1, 1000)))
        return whole


def _nasty(random: Random) -> Any:
    value = random.choice(NASTY)
    return 10**5_000 if value == 10**400 and random.random() < 0.3 else value


def spoilt_safetensors(random: Random, seeds: Sequence[bytes]) -> bytes:
    """A spoilt header before the tensors' bytes, or spoilt bytes."""
    if random.random() < 0.4:
        return spoilt_bytes(random, seeds)
    content = random.choice(seeds)
    length = int.from_bytes(content[:8], "little")
    header = spoilt_json(random, [content[8 : 8 + length]])
    told = len(header) if random.random() < 0.9 else random.choice((0, 2**40, 2**63))
    return struct.pack("<Q", told) + header + content[8 + length :]


def spoilt_pickle(random: Random, seeds: Sequence[bytes]) -> bytes:
    """A checkpoint whose pickle calls for code, claims more than it holds, or is spoilt."""
    kind = random.random()
    content = random.choice(seeds)
    if kind < 0.4:
        return spoilt_bytes(random, [content])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in parts if name.endswith("data.pkl"))
    if kind < 0.6:
        parts[name] = spoilt_bytes(random, [parts[name]])
    elif kind < 0.8:
        call = random.choice(CALLS)
        parts[name] = pickle.PROTO + b"\x02c" + call.encode() + b"\n(X\x04\x00\x00\x00truetR."
    else:
        shape = random.choice(((2**40,), (2**20, 2**20), (2**62, 4), (-1,), (0,), (3, 3)))
        tensor = torch.zeros(1).expand(3, 3)
        buffer = io.BytesIO()
        torch.save({"conv1.weight": tensor, "shape": shape}, buffer)
        with zipfile.ZipFile(buffer) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        (name,) = (name for name in parts if name.endswith("data.pkl"))
        wanted = pickle.dumps(3, 2)[2:-1] * 2 + b"\x86"
        claimed = b"".join(pickle.dumps(size, 2)[2:-1] for size in (shape * 2)[:2]) + b"\x86"
        parts[name] = parts[name].replace(wanted, claimed)
    bomb = random.random() < 0.05
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED) as archive:
        for part, data in parts.items():
            archive.writestr(part, bytes(1 << 27) if bomb and "/data/" in part else data)
    return out.getvalue()


def spoilt_png(random: Random, seeds: Sequence[bytes]) -> bytes:
    """A picture that claims other sizes, with a right checksum; or spoilt bytes."""
    if random.random() < 0.7:
        return spoilt_bytes(random, seeds)
    content = bytearray(random.choice(seeds))
    sides = random.choices((0, 1, 31, 2**15, 2**31 - 1), k=2)
    content[16:24] = struct.pack(">II", *sides)
    content[24] = random.choice((1, 2, 4, 8, 16, 3))
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


# --- valid files, and who reads them --------------------------------------------------------------


def _documents(pattern: str) -> Callable[[Path], list[bytes]]:
    return lambda _: [path.read_bytes() for path in sorted(registry_folder().glob(pattern))][:4]


def _network(folder: Path) -> Path:
    place = folder / "network"
    if not place.is_dir():
        zoo.save(zoo.load("cnet", 4, "bundled:cnet/cifar10"), place)
    return place


def _records(folder: Path) -> list[bytes]:
    """Records of a pruned network; one in forty is of a traced program, which is slow to read."""
    content = (_network(folder) / "pruning.json").read_bytes()
    return [*[content] * 39, content.replace(b'"rewritten": false', b'"rewritten": true')]


def _configs(folder: Path) -> list[bytes]:
    record = PruningRecord.read(_network(folder) / "pruning.json")
    return [json.dumps(config_of(record, [f"class {n}" for n in range(10)])).encode()]


def _verify_with_config(content: bytes, folder: Path) -> object:
    (_network(folder) / "config.json").write_bytes(content)
    return zoo.verify(_network(folder))


def _part(name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(_network(folder) / name).read_bytes()]


def _read_part(name: str) -> Callable[[bytes, Path], object]:
    """A reader of the network with the file `name` in place of its own, which comes back."""

    def read(content: bytes, folder: Path) -> object:
        path = _network(folder) / name
        own = path.read_bytes()
        path.write_bytes(content)
        try:
            return zoo.load_pruned(path.parent)
        finally:
            path.write_bytes(own)

    return read


def _file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    def with_content(content: bytes, folder: Path) -> object:
        path = folder / "given" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return read(path)

    return with_content


def _pickles(_: Path) -> list[bytes]:
    state = zoo.create_model("cnet", 10).state_dict()
    found = []
    for content in (state, {"state_dict": state, "epoch": 3}, {"model_ema": state, "model": state}):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        found.append(buffer.getvalue())
    return found


def _load(path: Path) -> object:
    read_checkpoint(path)
    return zoo.load("cnet", 4, path, profile="equal")


def _safetensors(_: Path) -> list[bytes]:
    state = zoo.create_model("cnet", 10).state_dict()
    return [safetensors.torch.save(state, {"arch": "cnet"})]


def _pictures(_: Path) -> list[bytes]:
    from PIL import Image

    found = []
    for kind, mode in (("PNG", "RGB"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "P"), ("BMP", "L")):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((31, 17)).convert(mode).save(buffer, kind)
        found.append(buffer.getvalue())
    return found


def _read_picture(path: Path) -> object:
    from zoo.data.images import open_picture, to_rgb

    return to_rgb(open_picture(path))


def _read_ledger(path: Path) -> object:
    from zoo.search import ledger

    return ledger.read([path])


def _metadata(_: Path) -> list[bytes]:
    facts = Metadata(architecture="cnet", num_classes=10, classes=("a",) * 10, mean=(0.5,) * 3,
                     std=(0.5,) * 3, image_shape=(3, 32, 32), compression_factor=4.0)  # fmt: skip
    return [json.dumps(facts.properties()).encode()]


def _read_metadata(content: bytes, _: Path) -> object:
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict):
        return None
    texts = {key: value if isinstance(value, str) else json.dumps(value)
             for key, value in raw.items()}  # fmt: skip
    return Metadata.read(texts, "file.onnx")


def _registry(name: str) -> Callable[[bytes, Path], object]:
    """`zoo.verify` of a small registry in which a document is spoilt."""

    def read(content: bytes, folder: Path) -> object:
        place = folder / "registry"
        for part in ("index.json", "cnet/groups.json", "cnet/params-cf4.json"):
            (place / part).parent.mkdir(parents=True, exist_ok=True)
            (place / part).write_bytes((registry_folder() / part).read_bytes())
        (place / name).write_bytes(content)
        return zoo.verify(place)

    return read


def _checksums(_: Path) -> list[bytes]:
    return [b"".join(b"%064x  %s\n" % (n, name) for n, name in enumerate((b"a", b"b/c.json")))]


TARGETS = (
    Target("profile", _documents("cnet/params*.json"), spoilt_json,
           _file("profile.json", Profile.read)),
    Target("groups", _documents("cnet/groups.json"), spoilt_json,
           _file("groups.json", read_groups)),
    Target("index", _documents("index.json"), spoilt_json,
           _file("index.json", lambda path: read_entries(path.parent))),
    Target("registry index", _documents("index.json"), spoilt_json, _registry("index.json")),
    Target("registry profile", _documents("cnet/params-cf4.json"), spoilt_json,
           _registry("cnet/params-cf4.json")),
    Target("checksums", _checksums, spoilt_bytes,
           _file("SHA256SUMS", lambda path: read_checksums(path.parent))),
    Target("pruning.json", _records, spoilt_json, _read_part("pruning.json")),
    Target("config.json", _configs, spoilt_json, _verify_with_config),
    Target("model.safetensors", _part("model.safetensors"), spoilt_safetensors,
           _read_part("model.safetensors")),
    Target("safetensors checkpoint", _safetensors, spoilt_safetensors,
           _file("checkpoint.safetensors", _load)),
    Target("pickled checkpoint", _pickles, spoilt_pickle, _file("checkpoint.pt", _load)),
    Target("ledger", lambda _: [(registry_folder() / "ledger" / "cnet.parquet").read_bytes()],
           spoilt_bytes, _file("ledger.parquet", _read_ledger)),
    Target("picture", _pictures, spoilt_png, _file("picture", _read_picture)),
    Target("onnx metadata", _metadata, spoilt_json, _read_metadata),
)  # fmt: skip
