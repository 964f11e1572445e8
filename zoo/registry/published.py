"""Profiles that others published: their channel counts as profiles of another origin. No torch.

`registry/published/` holds one document for each. Those of timm's own pruned networks hold no
counts: these are read from the installed timm, which ships them.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.common.digests import sha256_of
from zoo.common.documents import decode_document, read_json
from zoo.errors import DocumentError, ZooError
from zoo.spec.cost import cost_model, extents
from zoo.spec.groups import ChannelGroups
from zoo.spec.profile import Profile, Publication, Reference

__all__ = ["TimmCounts", "digest_of", "profile_of", "read_published"]

Counts = dict[str, tuple[int, ...]]
"""Tensor name -> its shape in the pruned network."""


@dataclass(frozen=True)
class TimmCounts:
    """A pruned network of timm's, whose shapes are in a file of the installed package.

    Attributes:
        architecture: the dense network, as `zoo.load` takes it.
        file: below timm/models/_pruned.
        sha256: of that file.
        reference: what the factor is counted at.
        published: where the counts come from.
    """

    architecture: str
    file: str
    sha256: str
    reference: Reference
    published: Publication

    @property
    def path(self) -> Path:
        """Of the installed file.

        Raises:
            ZooError: when timm is not installed, or `file` is no file's name.
        """
        if not re.fullmatch(r"\w[\w.-]*\.txt", self.file):
            raise ZooError(f"{self.file!r} is not the name of a file that timm ships.")
        found = importlib.util.find_spec("timm")
        if found is None or not found.submodule_search_locations:
            raise ZooError(f"The published profile {self.file} needs timm, which is not installed.")
        return Path(found.submodule_search_locations[0]) / "models" / "_pruned" / self.file


def read_published(path: Path, groups: ChannelGroups) -> Profile:
    """The profile in the document at `path`, for an architecture of these `groups`.

    Raises:
        DocumentError: for a malformed document, or counts that these groups cannot have.
        ZooError: when timm is not installed, or holds another file than it should.
    """
    raw = read_json(path)
    if not _is_timm(raw):
        return Profile.from_json(raw, str(path))
    source = decode_document(TimmCounts, raw, str(path))
    if (found := sha256_of(source.path)) != source.sha256:
        raise ZooError(
            f"{source.file} of the installed timm is not the one that was published (sha256 "
            f"{found[:12]} instead of {source.sha256[:12]})."
        )
    kept = _kept(_shapes(source.path), groups, source.file)
    return profile_of(source.architecture, kept, groups, source.reference, source.published)


def profile_of(
    architecture: str,
    kept: dict[str, int],
    groups: ChannelGroups,
    reference: Reference,
    published: Publication,
) -> Profile:
    """The profile of published counts; its factor is the one in MACs, to two decimals."""
    if set(kept) != set(groups.names):
        odd = sorted(set(kept) ^ set(groups.names))[0]
        raise DocumentError(f"Published counts of {architecture}: {odd!r} is not in both.")
    for group in groups.groups:
        if not 1 <= kept[group.name] <= group.size:
            raise DocumentError(
                f"Published counts of {architecture}: {group.name!r} keeps {kept[group.name]} of "
                f"{group.size} channels."
            )
    got = cost_model(groups).factor([kept[name] for name in groups.names], "macs")
    return Profile(
        architecture=architecture,
        metric="macs",
        cf=round(got, 2),
        got=got,
        reference=reference,
        keep_ratios={group.name: kept[group.name] / group.size for group in groups.groups},
        kept={name: kept[name] for name in groups.names},
        policy="published",
        published=published,
    )


def digest_of(path: Path) -> str:
    """sha256 of the file that holds the counts of the document at `path`."""
    raw = read_json(path)
    if _is_timm(raw):
        return decode_document(TimmCounts, raw, str(path)).sha256
    return sha256_of(path)


def _is_timm(raw: Any) -> bool:
    return isinstance(raw, dict) and "file" in raw


def _shapes(path: Path) -> Counts:
    """What timm wrote: `name:[shape]` of every tensor, with three asterisks between."""
    entries = path.read_text(encoding="utf-8").strip().split("***")
    try:
        pairs = (entry.split(":", 1) for entry in entries)
        return {name: tuple(map(int, json.loads(shape))) for name, shape in pairs}
    except (ValueError, TypeError) as error:
        raise DocumentError(f"{path} is not a list of shapes: {error}.") from error


def _kept(shapes: Counts, groups: ChannelGroups, where: str) -> dict[str, int]:
    """Group name -> its channels in a pruned network of these shapes; every shape must agree."""
    made_of = extents(groups)
    widths: list[int] = []
    for group in groups.groups:
        for slot in group.filter_slots:
            extent = made_of[slot.tensor][slot.dim]
            if slot.tensor in shapes and len(extent.per) == 1:
                ((_, per),) = extent.per
                widths.append((shapes[slot.tensor][slot.dim] - extent.fixed) // per)
                break
        else:
            raise DocumentError(f"{where} has no shape that tells the width of {group.name!r}.")
    for name, shape in shapes.items():
        expected = tuple(extent(widths) for extent in made_of.get(name, ()))
        if name in made_of and expected != shape:
            raise DocumentError(f"{where}: {name} has the shape {shape}, its groups {expected}.")
    return dict(zip(groups.names, widths, strict=True))
