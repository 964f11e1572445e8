"""Model cards: one Markdown file per architecture, with its pictures, from the registry alone.

A card is compared as data: its front matter by value, because a library whose spelling may change
writes its YAML, and its text and pictures byte by byte, because they are written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zoo.common.documents import write_text
from zoo.publishing.catalogue import (
    CataloguedArchitecture,
    CataloguedProfile,
    Exam,
    Row,
    catalogue,
    comparable,
    factor_name,
)
from zoo.publishing.drawings import accuracy_plot, network, standalone
from zoo.publishing.model_card import TAG
from zoo.publishing.usage import CHECKPOINT, featured, python_lines, reproduction_lines, shell_lines
from zoo.publishing.verdicts import RULE, limits, percent, shows, spread
from zoo.registry.hub import card_parts, card_text

__all__ = ["FIGURES", "card", "figures", "metadata", "stale_cards", "write_cards"]

FIGURES = "figures"
"""The folder of the pictures, beside the cards."""

LICENCE = "Apache-2.0"
"""Of this project: its profiles, weights and figures."""

HUB_SETS = {"CIFAR-10": "uoft-cs/cifar10"}
"""Name of a data set in the registry -> its name on the Hub; others are named in words alone."""


def write_cards(folder: Path) -> list[Path]:
    """Write every card and its pictures into `folder`, and remove those of nothing that is left."""
    expected = dict(_files())
    for name, text in expected.items():
        write_text(folder / name, text)
    for name in _extra(folder, expected):
        (folder / name).unlink()
    return [folder / name for name in expected]


def stale_cards(folder: Path) -> list[str]:
    """One line for each file of `folder` that is not what the registry says now."""
    expected = dict(_files())
    found = []
    for name, text in expected.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif not _same(path.read_text(encoding="utf-8"), text, path.suffix):
            found.append(f"{name} is out of date")
    return found + [f"{name} is of nothing in the registry" for name in _extra(folder, expected)]


def card(of: CataloguedArchitecture) -> str:
    """The card of one architecture, with its front matter."""
    parts = [
        f"# {of.name}, pruned",
        _introduction(of),
        *_use(of),
        *_plots(of),
        *(part for found in of.profiles for part in _profile(of, found)),
        *([] if of.profiles else _without_profiles(of)),
        *_weights(of),
        *_licence(of),
    ]
    return card_text(metadata(of), _results(of), "\n\n".join(parts) + "\n")


def metadata(of: CataloguedArchitecture) -> dict[str, Any]:
    """The front matter of a card, without results: as the Hub reads it."""
    licences = sorted({LICENCE} if of.weights or not of.profiles else set()) or []
    licences += [_licence_of(found) for found in of.profiles]
    spelled = sorted({licence.lower() for licence in licences})
    names = [weights.data for weights in of.weights]
    names += [exam.data for found in of.profiles for exam in found.exams]
    known = [HUB_SETS[name] for name in dict.fromkeys(map(_set, names)) if name in HUB_SETS]
    origins = dict.fromkeys(found.origin for found in of.profiles)
    return {
        "model_name": of.name,
        "library_name": TAG,
        "pipeline_tag": "image-classification",
        "tags": [
            "pruning",
            "channel-pruning",
            "model-compression",
            *(f"{o}-profile" for o in origins),
        ],
        "license": spelled[0] if len(spelled) == 1 else "other",
        **({"license_name": "-and-".join(spelled)} if len(spelled) > 1 else {}),
        **({"datasets": known} if known else {}),
    }


def figures(of: CataloguedArchitecture) -> Iterator[tuple[str, str]]:
    """(name, picture): a drawing for each profile, and a plot for each set of comparable rows."""
    for found in of.profiles:
        label = f"Channels kept of each layer of {of.name} by {found.reference}"
        drawn = network(of, found.profile.kept, label)
        yield f"{of.folder}-{found.slug}.svg", standalone(drawn)
    for number, (title, exams) in enumerate(comparable(of), start=1):
        label = f"Accuracy against parameters: {title}"
        drawn = accuracy_plot(exams, "searched", label)
        yield f"{of.folder}-accuracy-{number}.svg", standalone(drawn)


def _files() -> Iterator[tuple[str, str]]:
    for of in catalogue():
        if of.has_card:
            yield f"{of.folder}.md", card(of)
            for name, picture in figures(of):
                yield f"{FIGURES}/{name}", picture


def _extra(folder: Path, expected: dict[str, str]) -> list[str]:
    written = [*folder.glob("*.md"), *(folder / FIGURES).glob("*.svg")]
    names = sorted(path.relative_to(folder).as_posix() for path in written)
    return [name for name in names if name not in expected]


def _same(old: str, new: str, suffix: str) -> bool:
    return card_parts(old) == card_parts(new) if suffix == ".md" else old == new


def _introduction(of: CataloguedArchitecture) -> str:
    counts = {"searched": 0, "published": 0}
    for found in of.profiles:
        counts[found.origin] += 1
    have = " and ".join(f"{count} {origin}" for origin, count in counts.items() if count)
    many = "s" if len(of.profiles) > 1 else ""
    what = f"{have} pruning profile{many}" if have else "the trained weights"
    return (
        f"This card is of {what} of `{of.name}`. A profile says how many channels of each layer to "
        "keep; it holds no weights, so that it fits your checkpoint. The dense network has "
        f"{of.cost.params:,} parameters and {of.cost.macs:,} multiply-accumulates (MACs) at "
        f"{of.num_classes:,} classes and {of.image_size}x{of.image_size} pixels, in "
        f"{len(of.layers)} groups of channels that are cut together."
    )


def _plots(of: CataloguedArchitecture) -> list[str]:
    return [
        f"![Accuracy against parameters]({FIGURES}/{of.folder}-accuracy-{number}.svg)\n\n"
        f"*{title}; mean and standard deviation over seeds.*"
        for number, (title, _) in enumerate(comparable(of), start=1)
    ]


def _profile(of: CataloguedArchitecture, found: CataloguedProfile) -> list[str]:
    profile = found.profile
    claims = shows(found)
    parts = [
        f"## {factor_name(profile)}, {found.origin}: `{found.reference}`",
        f"{found.params_factor:.2f}x fewer parameters ({found.cost.params:,}) and "
        f"{found.macs_factor:.2f}x fewer MACs ({found.cost.macs:,}), at the reference.",
        f"![Channels kept of each layer]({FIGURES}/{of.folder}-{found.slug}.svg)",
        "*A column for each channel group in order, as high as the square root of its channels; "
        "the fill is the share that is kept, the number the pixels of its maps.*",
        *_claim(found),
        *([] if not claims else ["### What the evidence shows", *_list(claims), RULE]),
        *(part for exam in found.exams for part in _table(exam)),
        "### What it does not show",
        *_list(limits(of, found)),
    ]
    if profile.provenance is not None:
        parts += ["### How to repeat it", *_repeat(found)]
    return parts


def _claim(found: CataloguedProfile) -> list[str]:
    origin = found.profile.published
    if origin is None:
        return []
    claim = (
        f"**The authors' claim, not measured here:** {origin.claimed}." if origin.claimed else ""
    )
    note = f" Note: {origin.note}." if origin.note else ""
    return [
        part
        for part in (f"Source: {origin.source}. Licence: {origin.licence}.{note}", claim)
        if part
    ]


def _table(exam: Exam) -> list[str]:
    lines = [
        "| policy | accuracy | without training | parameters | MACs | seeds | dominated by |",
        "|---|---:|---:|---:|---:|---|---|",
        *(_line(row) for row in exam.rows),
    ]
    how = "; ".join(exam.fidelities)
    network = f", base network {exam.network[:12]}" if exam.network else ""
    dominated = (
        "A dominated row is less accurate than another, although it has no fewer parameters and "
        "MACs (within 1 %)."
    )
    return ["\n".join(lines), f"*{exam.data}{network}; {how}. {dominated}*"]


def _line(row: Row) -> str:
    own = row.evidence
    name = "dense" if row.is_base else own.policy
    before = "" if row.before is None else percent(row.before)
    seeds = ", ".join(map(str, own.seeds)) if not row.is_base else ""
    costs = f"{own.params:,} ({row.params_factor:.2f}x) | {own.macs:,} ({row.macs_factor:.2f}x)"
    others = ", ".join(f"`{policy}`" for policy in row.dominated_by)
    cells = f"`{name}`", spread(row.evidence), before, costs, seeds, others
    return f"| {' | '.join(cells)} |"


def _use(of: CataloguedArchitecture) -> list[str]:
    """The lines for one profile; those of another differ in its reference alone."""
    found = featured(of)
    own = f"With your own checkpoint for `{CHECKPOINT}`, in a shell:"
    others = ["The reference of any other profile below may stand in place of this one."]
    return [
        "## Use",
        _code("python", python_lines(of, found)),
        "In a shell:" if of.weights else own,
        _code("sh", shell_lines(of, found)),
        *(others if len(of.profiles) > 1 else []),
    ]


def _repeat(found: CataloguedProfile) -> list[str]:
    origin = found.profile.provenance
    assert origin is not None
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    return [
        f"Found by {origin.agent}, seed {origin.seed}, {origin.evaluations:,} evaluations in "
        f"{origin.seconds:,.0f} s on {origin.machine}, {origin.date}; {versions}. The first line "
        "searched it, with base networks trained as the guide on searching says; the second prints "
        "the tables above from the registry.",
        _code("sh", reproduction_lines(found)),
        *_list(
            [*origin.tasks, f"Fidelity: {origin.fidelity}", f"Split: {origin.split_digest[:12]}"]
        ),
    ]


def _without_profiles(of: CataloguedArchitecture) -> list[str]:
    return ["## What is not shown", *_list(limits(of, None))]


def _weights(of: CataloguedArchitecture) -> list[str]:
    if not of.weights:
        return []
    return [
        "## Bundled weights",
        *_list(
            [
                f"`{own.reference}`: {percent(own.test_accuracy)} on the test split of {own.data}, "
                f"{own.epochs} epochs, seed {own.seed}; written by `scripts/store_weights.py`."
                for own in of.weights
            ]
        ),
    ]


def _licence(of: CataloguedArchitecture) -> list[str]:
    lines = []
    if of.weights or any(found.origin == "searched" for found in of.profiles):
        lines.append(f"Searched profiles, weights and figures: {LICENCE}.")
    for found in of.profiles:
        if (origin := found.profile.published) is not None:
            lines.append(f"`{found.reference}`: {origin.licence}, {origin.source}.")
    return ["## Licence and sources", *_list(lines), "Generated from `registry/` by `make cards`."]


def _licence_of(found: CataloguedProfile) -> str:
    origin = found.profile.published
    return origin.licence if origin else LICENCE


def _results(of: CataloguedArchitecture) -> list[dict[str, Any]]:
    """What was measured here, as the Hub's model index has it."""
    found = [
        _result(weights.data, weights.test_accuracy, f"dense, {weights.reference}")
        for weights in of.weights
    ]
    for one in of.profiles:
        for exam in one.exams:
            row = exam.row(one.origin)
            if row is not None:
                seeds = len(row.evidence.seeds)
                name = f"{one.reference}, {row.evidence.fidelity}, mean of {seeds} seeds"
                found.append(_result(exam.data, row.evidence.mean, name))
    return found


def _result(data: str, accuracy: float, name: str) -> dict[str, Any]:
    return {
        "task_type": "image-classification",
        "dataset_type": HUB_SETS.get(_set(data), "imagefolder"),
        "dataset_name": data,
        "metric_type": "accuracy",
        "metric_name": name,
        "metric_value": round(accuracy, 6),
    }


def _set(data: str) -> str:
    """The name of a data set without its encoding, size, classes and split."""
    return data.partition(" (")[0].partition(" at ")[0]


def _list(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines)]


def _code(language: str, lines: str) -> str:
    return f"```{language}\n{lines}\n```"
