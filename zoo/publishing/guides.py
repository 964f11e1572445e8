"""Markdown documents as pages of the site: the only importer of markdown-it-py.

A link to another document becomes a link to its page; one to any other file of the repository is
answered by a copy of that file, so that no link is dead without the repository.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from zoo.errors import ZooError

try:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token
    from mdit_py_plugins.anchors import anchors_plugin
except ImportError:
    raise ZooError("The site needs markdown-it-py: pip install 'prunezoo[site]'.") from None

__all__ = ["Guide", "Guides", "inline"]

TEXT = {".md", ".py", ".toml", ".json", ".jsonl", ".sh", ".cff", ".txt", ""}
"""Suffixes of files that a browser should show; a copy of one ends in .txt."""

BOX = '<div class="scroll" tabindex="0" role="region" aria-label="Table">'
"""Around a table, so that it scrolls alone and a keyboard reaches it."""


@dataclass(frozen=True)
class Guide:
    """One page: its title, its body as HTML, and its headings of the second level."""

    title: str
    body: str
    headings: tuple[tuple[str, str], ...]


@dataclass
class Guides:
    """The documents of a repository, and the files that they link to.

    Attributes:
        root: of the repository.
        pages: document, relative to the root -> its page, relative to the site.
        copies: file, relative to the root -> its copy in the site; filled while rendering.
    """

    root: Path
    pages: Mapping[str, str]
    copies: dict[str, str] = field(default_factory=dict)

    def render(self, document: str) -> Guide:
        """The page of a document, relative to the root."""
        text = (self.root / document).read_text(encoding="utf-8")
        tokens = _parser().parse(text)
        self._relink(tokens, document)
        title, headings = document, []
        for opening, inside in itertools.pairwise(tokens):
            if opening.type == "heading_open" and opening.tag == "h1":
                title = _plain(inside)
            elif opening.type == "heading_open" and opening.tag == "h2":
                headings.append((str(opening.attrs.get("id", "")), _plain(inside)))
        body = _parser().renderer.render(tokens, _parser().options, {})
        return Guide(title, _wide(body), tuple(headings))

    def _relink(self, tokens: list[Token], document: str) -> None:
        for token in tokens:
            for name in ("href", "src"):
                if name in token.attrs:
                    token.attrs[name] = self._target(str(token.attrs[name]), document)
            self._relink(token.children or [], document)

    def _target(self, link: str, document: str) -> str:
        path, mark, anchor = link.partition("#")
        if re.match(r"[a-z][a-z0-9+.-]*:", link) or not path:
            return link
        file = os.path.normpath(PurePosixPath(document).parent / path)
        if not (self.root / file).exists():
            raise ZooError(f"{document} links to {link}, which does not exist.")
        target = self.pages.get(file) or self._copy(file)
        here = PurePosixPath(self.pages[document]).parent
        return os.path.relpath(target, here) + mark + anchor

    def _copy(self, file: str) -> str:
        suffix = PurePosixPath(file).suffix
        self.copies[file] = f"files/{file}{'.txt' if suffix in TEXT else ''}"
        return self.copies[file]


def inline(text: str) -> str:
    """A sentence of Markdown as HTML."""
    return str(_parser().renderInline(text))


def block(text: str) -> str:
    """Paragraphs of Markdown as HTML."""
    return str(_parser().render(text))


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return parser.use(anchors_plugin, max_level=4, slug_func=_slug)


def _slug(title: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def _plain(token: Token) -> str:
    return "".join(child.content for child in token.children or [])


def _wide(body: str) -> str:
    """Tables and code in boxes of their own that scroll, reachable by keyboard."""
    body = body.replace("<table>", f"{BOX}<table>").replace("</table>", "</table></div>")
    return body.replace("<pre>", '<pre tabindex="0">')
