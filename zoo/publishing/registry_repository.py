"""A registry as a data set of the Hub: its files as they are, with a card and their checksums."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from zoo.common.documents import write_text
from zoo.errors import ZooError
from zoo.publishing.checksums import files_in, write_checksums
from zoo.publishing.model_card import TAG, spelled_tag
from zoo.registry.hub import card_text
from zoo.registry.store import (
    INDEX,
    folder_name,
    index_entry,
    profile_path,
    read_entries,
    write_entries,
)
from zoo.spec.profile import Profile
from zoo.storage.artefacts import README

__all__ = ["add_profile", "write_registry"]

_OWN = re.compile(
    r"index\.json|[^/]+/groups\.json|[^/]+/[^/]+-cf[^/]+\.json|published/[^/]+\.json|"
    r"ledger/[^/]+\.parquet|weights/[^/]+\.(safetensors|json)|policy/[^/]+\.(safetensors|json)"
)
"""The files of a registry."""


def write_registry(folder: Path, out: Path, reference: str, licence: str | None) -> None:
    """Write the repository of the registry at `folder` into the folder `out`.

    Args:
        folder: of a registry.
        out: empty, or `folder` itself.
        reference: of the repository, for its card.
        licence: of the profiles, as the Hub names it.
    """
    for name in registry_files(folder) if folder != out else ():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    write_text(out / README, _card(out, reference, licence))
    write_checksums(out)


def registry_files(folder: Path) -> list[str]:
    """The paths of the files of a registry; others that lie in its folder are not published.

    Raises:
        ZooError: for a link, which may lead anywhere.
    """
    found = [name for name in files_in(folder) if _OWN.fullmatch(name)]
    for name in found:
        if (folder / name).is_symlink():
            raise ZooError(f"{folder / name} is a link: a registry is published without links.")
    return found


def add_profile(profile: Profile, folder: Path) -> None:
    """Add a profile to the registry at `folder`, or to a new one in an empty folder.

    It replaces the one of the same architecture, metric and factor.
    """
    path = folder / folder_name(profile.architecture) / f"{profile.name}.json"
    profile.write(path)
    entry = index_entry(path)
    entries = read_entries(folder) if (folder / INDEX).is_file() else ()
    write_entries(folder, [*(e for e in entries if e.reference != entry.reference), entry])


def _card(out: Path, reference: str, licence: str | None) -> str:
    """The card of the data set whose files are in `out`."""
    entries = read_entries(out)
    ledgers = [name for name in files_in(out) if name.endswith(".parquet")]
    metadata: dict[str, Any] = {
        **({"license": licence} if licence else {}),
        "pretty_name": "Pruning profiles",
        "tags": [
            TAG,
            "pruning",
            "channel-pruning",
            *dict.fromkeys(spelled_tag(entry.architecture) for entry in entries),
        ],
    }
    if ledgers:
        metadata["configs"] = [
            {"config_name": Path(name).stem, "data_files": name} for name in ledgers
        ]
    rows = [
        f"| {entry.architecture} | {entry.metric} | {entry.cf:g}x | `{profile_path(entry)}` |"
        for entry in entries
    ]
    first = entries[0] if entries else None
    usage = (
        f"""
```python
import zoo

for entry in zoo.list_profiles(source="{reference}"):
    print(entry.reference)
profile = zoo.get_profile("{reference}/{profile_path(first)}")
```
"""
        if first
        else ""
    )
    body = f"""# Pruning profiles

How much to keep of every layer of a network, for [prunezoo](https://pypi.org/project/prunezoo/).
`zoo verify {reference}` checks every file.
{usage}
| architecture | metric | factor | file |
|---|---|---:|---|
{chr(10).join(rows)}

{_ledgers(ledgers)}"""
    return card_text(metadata, [], body)


def _ledgers(names: list[str]) -> str:
    if not names:
        return ""
    return """## Evaluations

`ledger/` holds a table for each architecture: what the searches measured, a row for each network
that was pruned and measured.

| column | meaning |
|---|---|
| `network` | sha256 of the base network's checkpoint |
| `split` | digest of its training images and of those measured on; `test-` and it for test images |
| `classes`, `image_size` | of the data; pixels per side |
| `widths` | channels kept, per channel group in the order of the architecture's `groups.json` |
| `criterion`, `seed` | what chose the channels |
| `fidelity` | what was done before the accuracy was taken |
| `accuracy` | in [0, 1], on the validation images or, for final evidence, on test images |
| `seconds` | that it took |
| `source` | the agent or policy that asked for it, where it is known |

Accuracies of equal `network`, `split` and `fidelity` can be compared. Choose nothing by those of
test images. `zoo.ledger_lookup` finds the rows nearest to a profile, and
`zoo.search.ledger_benchmark` makes a search problem of them.
"""
