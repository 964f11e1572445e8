"""The public names of the package with their docstrings: the only importer of griffe."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

try:
    import griffe
except ImportError:
    raise ZooError("The site needs griffe: pip install 'prunezoo[site]'.") from None

__all__ = ["Entry", "Section", "public_names"]


@dataclass(frozen=True)
class Section:
    """A part of a docstring: text alone, or a list of (name, annotation, description)."""

    title: str
    text: str = ""
    items: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Entry:
    """One public name.

    Attributes:
        kind: `function`, `class` or `attribute`.
        signature: what to write, on one line or one line for each parameter.
        source: the file and line, relative to the repository.
    """

    name: str
    kind: str
    signature: str
    source: str
    sections: tuple[Section, ...]


def public_names(root: Path, package: str = "zoo") -> tuple[Entry, ...]:
    """An entry for every name of the package's `__all__`, functions first; nothing is imported.

    Args:
        root: the folder that holds the package.
        package: its name.
    """
    logging.getLogger("griffe").setLevel(logging.ERROR)
    options = griffe.GoogleOptions(
        returns_multiple_items=False, returns_named_value=False, warnings=False
    )
    module = griffe.load(
        package, search_paths=[str(root)], docstring_parser="google", docstring_options=options
    )
    entries = [_entry(module[str(name)], str(name), root) for name in module.exports or ()]
    order = {"function": 0, "class": 1, "attribute": 2}
    return tuple(sorted(entries, key=lambda entry: (order[entry.kind], entry.name.lower())))


def _entry(found: Any, name: str, root: Path) -> Entry:
    target = found.final_target if found.is_alias else found
    kind = str(target.kind.value)
    source = f"{Path(target.filepath).relative_to(root).as_posix()}:{target.lineno}"
    sections = _sections(target)
    if kind == "class":
        sections = (*sections, *_members(target, sections))
    return Entry(name, kind, _signature(target, name, kind), source, sections)


def _signature(target: Any, name: str, kind: str) -> str:
    if kind == "attribute":
        return f"zoo.{name}"
    if kind == "class":
        bases = ", ".join(str(base) for base in target.bases)
        return f"class zoo.{name}" + (f"({bases})" if bases else "")
    whole = f"zoo.{target.signature(return_type=True)}"
    if len(whole) <= 80:
        return whole
    return _broken(whole)


def _broken(signature: str) -> str:
    """A long signature with a line for each parameter."""
    head, _, rest = signature.partition("(")
    depth, parts, current, end = 0, [], "", 0
    for end, letter in enumerate(rest):  # noqa: B007
        if letter == ")" and depth == 0:
            break
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    lines = "".join(f"    {part},\n" for part in [*parts, current.strip()] if part)
    return f"{head}(\n{lines}{rest[end:]}"


def _sections(target: Any) -> tuple[Section, ...]:
    parsed = target.docstring.parsed if target.docstring else []
    return tuple(_section(part) for part in parsed)


def _section(part: Any) -> Section:
    if isinstance(part.value, str):
        return Section("", part.value)
    if not isinstance(part.value, list):
        return Section("", str(part.value.contents if hasattr(part.value, "contents") else ""))
    items = tuple(
        (
            str(getattr(item, "name", "") or ""),
            str(getattr(item, "annotation", "") or ""),
            str(getattr(item, "description", item)),
        )
        for item in part.value
    )
    return Section(part.kind.value.replace("_", " ").capitalize(), items=items)


def _members(target: Any, sections: tuple[Section, ...]) -> list[Section]:
    """The fields of a dataclass that the docstring does not describe, and its public methods."""
    told = {name for section in sections for item in section.items for name in item[0].split(", ")}
    fields, methods = [], []
    for name, member in target.members.items():
        if name.startswith("_") or name in told:
            continue
        text = member.docstring.value if member.docstring else ""
        if member.is_attribute and "property" not in member.labels:
            fields.append((name, str(member.annotation or ""), text))
        elif text:
            first = text.partition("\n")[0]
            methods.append((name, "", first))
    named = ("Fields", fields), ("Methods and properties", methods)
    return [Section(title, items=tuple(items)) for title, items in named if items]
