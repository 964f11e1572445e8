"""The site has no dead link and asks nobody for anything; in a browser it sorts and draws."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import zoo
from zoo.errors import ZooError
from zoo.publishing.catalogue import catalogue
from zoo.publishing.site import GUIDES, table_rows, write_site

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

PLOTTED = "networks/resnet20-16.html"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site below a folder that a server would call a sub-path."""
    folder = tmp_path_factory.mktemp("served") / "zoo" / "site"
    write_site(ROOT, folder)
    return folder


class Page(HTMLParser):
    """The anchors, links and loaded files of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.labelled: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.add(values.get("id", ""))
        self.labelled += values.get("aria-labelledby", "").split()
        if tag == "a":
            self.links.append(values["href"])
        self.loaded += [values["src"]] if "src" in values else []
        self.loaded += [values["href"]] if tag == "link" else []


def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    links = 0
    for path, page in pages.items():
        assert {"main", *page.labelled} <= page.ids, path
        for loaded in page.loaded:
            if not loaded.startswith("data:"):
                assert (path.parent / loaded).is_file(), (path, loaded)
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme == "https", link
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), (path, link)
            if parts.fragment:
                assert parts.fragment in pages[target].ids, (path, link)
            links += 1
    assert links > 500


def test_it_holds_every_architecture_profile_document_and_public_name(site: Path) -> None:
    index = (site / "index.html").read_text(encoding="utf-8")
    for of in catalogue():
        page = (site / "networks" / f"{of.folder}.html").read_text(encoding="utf-8")
        for found in of.profiles:
            assert found.reference in page
            assert f"networks/{of.folder}.html#{found.slug}" in index
            claim = found.profile.published.claimed if found.profile.published else ""
            assert ("not measured here" in page.split(f'id="{found.slug}"')[1]) or not claim
    documents = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert documents <= set(GUIDES)
    reference = Page(site / "reference.html")
    assert set(zoo.__all__) <= reference.ids


def test_no_page_names_a_folder_of_this_machine(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text
        assert "/home/" not in text


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years", encoding="utf-8")
    with pytest.raises(ZooError, match="other things"):
        write_site(ROOT, tmp_path)
    assert (tmp_path / "thesis.tex").is_file()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def trouble() -> list[str]:
    """What a browser complained about, or asked of other hosts; must stay empty."""
    return []


@pytest.fixture
def view(browser: Any, site: Path, trouble: list[str]) -> Iterator[Any]:
    """Opens a page of the site: (path, what to pass to the browser's context) -> the page."""
    contexts = []

    def seen(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("file", "data", "blob") and parts.hostname != "127.0.0.1":
            trouble.append(f"asked for {request.url}")

    def opened(path: str, base: str = "", **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", seen)
        page.on("requestfailed", lambda request: trouble.append(f"failed: {request.url}"))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None
        )
        page.goto((base or site.as_uri()) + "/" + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def shown(page: Any) -> list[str]:
    return page.locator("[data-table] tbody tr:not([hidden]) th").all_inner_texts()


@needs_chromium
def test_filters_filter(view: Any) -> None:
    page = view("index.html")
    rows = table_rows(catalogue())
    assert len(shown(page)) == len(rows)
    page.get_by_label("Factor of").select_option("macs")
    assert len(shown(page)) == sum(row.metric == "macs" for row in rows)
    page.get_by_label("Found by").select_option("searched")
    searched = [entry.reference for entry in zoo.list_profiles(metric="macs")]
    assert {"bundled:" + "/".join(text.split()) for text in shown(page)} == {*searched}
    told = page.get_by_role("status").inner_text()
    assert told == f"{len(searched)} of {len(rows)} entries"
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("How much").select_option("4.5-999")
    assert len(shown(page)) == sum(row.factor > 4.5 for row in rows)
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("Network").fill("RESNET50")
    assert all("resnet50" in text for text in shown(page))
    assert 4 < len(shown(page)) < len(rows)


@needs_chromium
def test_sorting_sorts_and_says_so(view: Any) -> None:
    page = view("index.html")
    head = page.get_by_role("columnheader", name="Parameters")
    for order, sign in (("ascending", 1), ("descending", -1)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        cells = page.locator("[data-table] tbody tr td:nth-child(5)")
        values = [sign * int(cell.get_attribute("data-value")) for cell in cells.all()]
        assert values == sorted(values)
    page.get_by_role("columnheader", name="Network").get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert shown(page)[0].startswith("cnet")


@needs_chromium
def test_plots_are_drawn_and_change_with_their_axis(view: Any) -> None:
    page = view(PLOTTED)
    (of,) = [of for of in catalogue() if of.name == "resnet20-16"]
    points = page.locator(".chart svg .mark-symbol.role-mark path")
    points.first.wait_for()
    policies = sum(len(exam.policies) for found in of.profiles for exam in found.exams)
    assert points.count() == policies
    assert page.locator(".chart svg").count() == len(page.locator("[data-plot]").all()) == 3
    across = page.locator(".chart svg").first.text_content()
    page.get_by_label("MACs", exact=True).check()
    page.get_by_text("multiply-accumulates (MACs)").first.wait_for()
    assert page.locator(".chart svg").first.text_content() != across
    page.get_by_label("within 8 points").check()
    page.wait_for_function(
        f"document.querySelectorAll('.chart .role-mark path').length < {policies}"
    )
    assert page.locator("figure > svg rect.kept").count() == 4 * len(of.layers)


@needs_chromium
def test_colours_follow_the_readers_scheme(view: Any) -> None:
    fill = "getComputedStyle(document.querySelector('svg .kept')).fill"
    light, dark = (view(PLOTTED, color_scheme=name).evaluate(fill) for name in ("light", "dark"))
    assert light != dark


@needs_chromium
@pytest.mark.parametrize(
    "path",
    ["index.html", PLOTTED, "networks/torchvision--resnet50.html", "docs/evidence.html",
     "docs/index.html", "docs/coverage.html", "reference.html", "networks/resnet20.html"],
)  # fmt: skip
def test_a_phone_scrolls_in_one_direction_alone(view: Any, path: str) -> None:
    page = view(path, viewport=PHONE)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    if path == PLOTTED:
        page.locator(".chart svg").first.wait_for()
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0


@needs_chromium
def test_a_keyboard_reaches_everything(view: Any) -> None:
    page = view("index.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top >= 0")
    wanted, reached = {"text", "metric", "factor", "origin"}, set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.name || document.activeElement.innerText")
        )
    assert wanted <= reached
    assert {"Show all", "Parameters", "Accuracy"} <= {text.strip() for text in reached}
    page.get_by_role("columnheader", name="Factor").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort=ascending]").count() == 1


@needs_chromium
def test_code_is_copied(view: Any) -> None:
    page = view("index.html", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").first.click()
    page.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == page.locator("pre").first.inner_text().strip()


@needs_chromium
def test_it_works_below_a_path_of_a_server(view: Any, site: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site.parents[1]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/zoo/site"
        page = view("index.html", base)
        page.get_by_role("link", name="resnet20-16").first.click()
        page.locator(".chart svg").first.wait_for()
        page.get_by_role("link", name="Guides").click()
        assert page.locator("h1").inner_text() == "prunezoo"
        server.shutdown()


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    for name in ("assets/style.css", "precious.txt"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("p", "file", "link"):
        with pytest.raises(ZooError, match=r"holds other things than a site|is not a folder"):
            write_site(ROOT, tmp_path / name)
    assert (tmp_path / "p" / "precious.txt").read_text() == "mine"
