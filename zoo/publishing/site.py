"""The static site: every architecture, profile and document, to open from a folder or any server.

Nothing is asked of a network when it is read: scripts, styles and data lie in the folder, and every
link is relative, so that it works below any path.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from zoo.common.documents import write_text
from zoo.errors import ZooError
from zoo.publishing import charts, usage, verdicts
from zoo.publishing.catalogue import (
    CataloguedArchitecture,
    CataloguedProfile,
    catalogue,
    comparable,
    factor_name,
)
from zoo.publishing.drawings import network
from zoo.publishing.guides import Guides, block, inline
from zoo.publishing.reference import public_names

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
except ImportError:
    raise ZooError("The site needs Jinja2: pip install 'prunezoo[site]'.") from None

__all__ = ["TableRow", "table_rows", "write_site"]

ASSETS = ("style.css", "site.js")
"""Files of `templates/` that pages load as they are."""

HERO = "bundled:resnet20-16/params-cf4"
"""The profile whose drawing opens the first page."""

MARK = ".prunezoo-site"
"""The file by which a folder is known to be a site, and may be replaced."""

GUIDES = {
    "README.md": ("docs/index.html", "Start here"),
    "docs/networks.md": ("docs/networks.html", "Any network"),
    "docs/training.md": ("docs/training.html", "Training and serving"),
    "docs/searching.md": ("docs/searching.html", "Searching"),
    "docs/hub.md": ("docs/hub.html", "The Hub"),
    "docs/evidence.md": ("docs/evidence.html", "Evidence"),
    "docs/benchmarks.md": ("docs/benchmarks.html", "Benchmarks"),
    "docs/coverage.md": ("docs/coverage.html", "Coverage"),
    "docs/architecture.md": ("docs/architecture.html", "How the code works"),
    "docs/decisions.md": ("docs/decisions.html", "Decisions"),
    "SECURITY.md": ("docs/security.html", "Security"),
    "CONTRIBUTING.md": ("docs/contributing.html", "Contributing"),
    "scripts/README.md": ("docs/scripts.html", "Scripts"),
    "CHANGELOG.md": ("docs/changelog.html", "Changes"),
}
"""Document -> (its page, its name in the menu); documents that are missing are left out."""


@dataclass(frozen=True)
class TableRow:
    """One line of the first page's table: a profile, or an architecture without any.

    Attributes:
        factor: 0 without a profile.
        measured: accuracy on the first exam, and the dense network's; None if not measured here.
    """

    architecture: CataloguedArchitecture
    found: CataloguedProfile | None
    page: str
    metric: str
    factor: float
    origin: str
    measured: tuple[float, float] | None
    claimed: str


def write_site(root: Path, folder: Path) -> list[Path]:
    """Write the site of the repository at `root` into `folder`, in place of what it holds.

    Returns:
        The pages.

    Raises:
        ZooError: when an extra is missing, a document links to nothing, or `folder` holds other
            things than a site.
    """
    folder = folder.expanduser()
    _check_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        pages = _write(root, Path(scratch, folder.name))
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        Path(scratch, folder.name).rename(folder)
    return [folder / page for page in pages]


def _write(root: Path, folder: Path) -> list[str]:
    """Write everything into a new folder; the pages."""
    architectures = catalogue()
    pages = dict(_pages(root, architectures))
    guides = Guides(root, {name: page for name, (page, _) in _documents(root).items()})
    pages.update(_guide_pages(root, guides))
    for page, text in pages.items():
        write_text(folder / page, text)
    for name in ASSETS:
        write_text(folder / "assets" / name, (_templates() / name).read_text(encoding="utf-8"))
    write_text(folder / "assets" / "vega.js", charts.script())
    for file, copy in guides.copies.items():
        _copy(root / file, folder / copy)
    write_text(folder / ".nojekyll", "")
    write_text(folder / MARK, "")
    return list(pages)


def table_rows(architectures: Sequence[CataloguedArchitecture]) -> list[TableRow]:
    """Every profile, and every architecture that has none."""
    rows = []
    for of in architectures:
        for found in of.profiles or (None,):
            rows.append(_table_row(of, found))
    return rows


def _table_row(of: CataloguedArchitecture, found: CataloguedProfile | None) -> TableRow:
    page = f"networks/{of.folder}.html"
    if found is None:
        return TableRow(of, None, page, "", 0.0, "policy", None, "")
    profile = found.profile
    measured = None
    if found.exams:
        exam = found.exams[0]
        own, base = exam.row(found.origin), exam.base
        if own is not None and base is not None:
            measured = own.evidence.mean, base.evidence.mean
    return TableRow(
        architecture=of,
        found=found,
        page=f"{page}#{found.slug}",
        metric=profile.metric,
        factor=profile.cf,
        origin=found.origin,
        measured=measured,
        claimed=profile.published.claimed if profile.published else "",
    )


def _pages(
    root: Path, architectures: Sequence[CataloguedArchitecture]
) -> Iterator[tuple[str, str]]:
    menu = _menu(root)
    yield (
        "index.html",
        _render(
            "index.html",
            "index.html",
            menu,
            rows=table_rows(architectures),
            hero=next(
                (of, found)
                for of in architectures
                for found in of.profiles
                if found.reference == HERO
            ),
            searched=[of for of in architectures if any(f.exams for f in of.profiles)],
            architectures=architectures,
        ),
    )
    for of in architectures:
        page = f"networks/{of.folder}.html"
        yield page, _render("network.html", page, menu, of=of, plots=_plots(of))
    entries = public_names(root)
    yield "reference.html", _render("reference.html", "reference.html", menu, entries=entries)


def _guide_pages(root: Path, guides: Guides) -> Iterator[tuple[str, str]]:
    menu = _menu(root)
    for document, page in guides.pages.items():
        yield page, _render("guide.html", page, menu, guide=guides.render(document))


def _plots(of: CataloguedArchitecture) -> list[tuple[str, str]]:
    """(title, specifications as JSON) of every set of comparable exams."""
    return [
        (title, json.dumps(charts.accuracy_charts(exams, "searched"), sort_keys=True))
        for title, exams in comparable(of)
    ]


def _documents(root: Path) -> dict[str, tuple[str, str]]:
    return {name: entry for name, entry in GUIDES.items() if (root / name).is_file()}


def _menu(root: Path) -> list[tuple[str, str]]:
    return list(_documents(root).values())


def _render(template: str, page: str, menu: list[tuple[str, str]], **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("zoo.publishing", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = lambda text: Markup(inline(text))
    environment.filters["block"] = lambda text: Markup(block(text))
    environment.filters["script"] = lambda text: Markup(text.replace("</", "<\\/"))
    environment.globals.update(
        network=lambda *given: Markup(network(*given)),
        factor_name=factor_name,
        verdicts=verdicts,
        usage=usage,
    )
    up = "../" * (len(PurePosixPath(page).parts) - 1)
    return environment.get_template(template).render(page=page, up=up, menu=menu, **values)


def _templates() -> Path:
    return Path(__file__).with_name("templates")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        names = sorted(path.name + "/" * path.is_dir() for path in source.iterdir())
        write_text(target, "\n".join(name for name in names if not name.startswith((".", "__"))))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _check_place(folder: Path) -> None:
    """Refuse a folder that holds other things than a site of ours."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ZooError(f"{folder} is not a folder; name one for the site.")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ZooError(f"{folder} holds other things than a site; name an empty folder.")
