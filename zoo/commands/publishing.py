"""`zoo publish` and `zoo verify`: the Hugging Face Hub, and whether what came from it is whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

import zoo
from zoo.commands.shared import printable
from zoo.errors import ZooError
from zoo.publishing.options import PublishOptions

if TYPE_CHECKING:
    from zoo.data.images import AnyImages

__all__ = ["PublishCommand", "VerifyCommand", "publish", "verify"]

NOT_OK = 1
"""Exit code of `zoo verify` when something is wrong."""


@dataclass(frozen=True, kw_only=True)
class PublishCommand(PublishOptions):
    """Publish a pruned network, a profile or a registry to the Hugging Face Hub, in one commit."""

    what: Annotated[Positional[str], arg(metavar="WHAT")]
    """folder of a pruned network or of a registry, `bundled` for the one that ships, or the
    reference of a profile, such as file:PATH"""
    repo: Annotated[Positional[str], arg(metavar="ORG/REPO")]
    """repository; created if there is none"""
    data: str | None = None
    """data set whose test images a network's accuracy is measured on and its ONNX files are
    compared on, and whose classes, mean and std are published"""
    data_dir: Path | None = None
    """folder of the data set's files"""
    public: bool = False
    """make a new repository public"""
    dry_run: bool = False
    """show what would be sent, and send nothing"""


def publish(command: PublishCommand) -> None:
    published = zoo.publish(
        command.what,
        command.repo,
        private=not command.public,
        data=_images(command),
        dry_run=command.dry_run,
        options=command,
    )
    would = "would be " if published.dry_run else ""
    for path, size in published.sent.items():
        print(f"{would}sent     {path} ({size:,} bytes)")
    for path in published.deleted:
        print(f"{would}deleted  {path}")
    if not published.sent and not published.deleted:
        print("Nothing to send: the repository holds all of it.")
    seen = "private" if published.private else "public"
    if published.dry_run:
        print(f"{published.url} would be {seen}")
    else:
        print(f"{published.url} ({seen}) is at {published.reference}")


def _images(command: PublishCommand) -> AnyImages | None:
    """The test images at the size of the network."""
    if command.data is None:
        return None
    from zoo.spec.plans import PruningRecord
    from zoo.storage.checkpoints import RECORD

    path = Path(command.what, RECORD)
    if not path.is_file():
        raise ZooError("--data is for a network; this is a profile or a registry.")
    record = PruningRecord.read(path)
    return zoo.load_data(command.data, command.data_dir, size=record.size).test


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """Check a pruned network, a profile or a registry: files, record, costs, factors, exports."""

    what: Annotated[Positional[str], arg(metavar="WHAT")]
    """folder, reference of a profile, hf:[datasets/]ORG/REPO[@REVISION], or `bundled`"""


def verify(command: VerifyCommand) -> int:
    found = zoo.verify(command.what)
    for word, lines in (("ok", found.passed), ("?", found.unchecked), ("WRONG", found.failed)):
        for line in lines:
            print(f"{word:5}  {printable(line)}")
    print(f"{found.what}: {len(found.passed)} checks passed, {len(found.failed)} found wrong")
    return 0 if found.ok else NOT_OK
