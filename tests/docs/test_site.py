"""The documentation builds strictly, loads nothing from elsewhere, and has every equation and column that the code speaks of."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import ROOT

from mgvq.analysis.report import FIGURES, figure_path

OUTSIDE = re.compile(r"^(?:https?:)?//")
NAMES_OF_STANDARDS = re.compile(r"https?://www\.w3\.org/[\w/.#-]*")  # of SVG and MathML: names, nothing is fetched
LOADING = {"src", "srcset", "data", "poster", "action", "background"}  # attributes whose address a browser fetches by itself
CITATION = re.compile(r"docs/method\.md, eqs?\. ((?:\([\w-]+\)(?:, | and )?)+)")


class Html(HTMLParser):
    """What a page loads, where it links to, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self._in_script = tag == "script"
        self.loads += [found[name] for name in LOADING & set(found)]
        if "href" in found:
            (self.links if tag == "a" else self.loads).append(found["href"])
        self.loads += re.findall(r"url\(([^)]*)\)", found.get("style", ""))
        self.anchors |= {found[name] for name in ("id", "name") if name in found}

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, where a proxy that refuses everything stands before the network."""
    place = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Html]:
    return {page: Html(page.read_text()) for page in sorted(site.rglob("*.html"))}


def test_no_page_loads_anything_from_elsewhere(pages: dict[Path, Html]) -> None:
    outside = {(page.name, address) for page, html in pages.items() for address in html.loads if OUTSIDE.match(address)}
    assert not outside
    assert sum(len(html.loads) for html in pages.values()) > len(pages), "pages have a style sheet: something is found at all"


def test_no_style_sheet_and_no_script_names_an_address_to_load(site: Path, pages: dict[Path, Html]) -> None:
    for sheet in site.rglob("*.css"):
        addresses = re.findall(r"url\(\s*[\"']?([^)\"']*)|@import\s+[\"']([^\"']*)", sheet.read_text())
        assert not [one for pair in addresses for one in pair if OUTSIDE.match(one)], sheet.name
    scripts = {script.name: script.read_text() for script in site.rglob("*.js")}
    scripts |= {f"in {page.name}": text for page, html in pages.items() for text in html.scripts}
    for name, text in scripts.items():
        code = NAMES_OF_STANDARDS.sub("", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))  # licences in comments
        assert not re.findall(r"[\"'`]((?:https?:)?//[\w-]+\.[^\"'`\s]*)", code), name


def test_every_link_between_pages_arrives(site: Path, pages: dict[Path, Html]) -> None:
    """mkdocs checks the links that it knows; this one also those in generated tables, docstrings and the theme."""
    for page, html in pages.items():
        for link in html.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or page.name == "404.html":
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)} links to {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].anchors | {"__skip"}, f"{page.relative_to(site)} links to {link}"


def test_every_equation_that_is_cited_is_on_the_page(site: Path, pages: dict[Path, Html]) -> None:
    anchors = pages[site / "method.html"].anchors
    promised = {"kronecker", "ldlq", "two-sided-ldlq", "shift", "refit", "obs", "gram", "fisher", "sketch-a", "sketch-b",
                "natural-gradient", "water-filling", "global-local", "mbq", "guided", "foem"}  # fmt: skip
    assert promised <= anchors
    cited = {
        (str(file.relative_to(ROOT)), name)
        for folder in ("mgvq", "conf", "tests", "benchmarks", "experiments")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".yaml", ".md") and file != Path(__file__)
        for names in CITATION.findall(re.sub(r"\s*\n\s*#?\s*", " ", file.read_text()))
        for name in re.findall(r"\(([\w-]+)\)", names)
    }
    assert len(cited) > 10, "the configuration cites equations"
    assert not {(file, name) for file, name in cited if name not in anchors}


def test_every_variant_and_setting_has_its_place(pages: dict[Path, Html], site: Path) -> None:
    for file in (ROOT / "conf").glob("*/*.yaml"):
        page = site / "configuration" / f"{file.parent.name}.html"
        assert file.stem in pages[page].anchors
        text = page.read_text()
        for name, value in yaml.safe_load(file.read_text()).items():
            if not name.startswith("_") and name not in ("defaults", "shape") and not isinstance(value, dict):
                assert f"<code>{name}</code>" in text, f"{file.name}: {name}"
    assert all((site / "studies" / f"{f.parent.name}.html").is_file() for f in (ROOT / "experiments").glob("*/study.yaml"))


def test_a_studys_page_has_all_its_figures(site: Path) -> None:
    """With the captions of the one list that reports are made from."""
    for file in (ROOT / "experiments").glob("*/study.yaml"):
        name, page = file.parent.name, " ".join((site / "studies" / f"{file.parent.name}.html").read_text().split())
        for figure in FIGURES:
            if (path := figure_path(ROOT / "results", name, figure)).is_file():
                assert path.name in page
                assert f"<em>{figure.caption}</em>" in page, path.name


def test_the_design_names_every_room() -> None:
    tree = (ROOT / "docs" / "design.md").read_text().split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"[\w.]+", tree))
    rooms = {f.name for f in (ROOT / "mgvq").iterdir() if f.is_dir() or f.suffix == ".py"} - {"__init__.py", "__pycache__"}
    rooms |= {f.name for f in (ROOT / "tests").iterdir() if f.is_dir()} - {"__pycache__", "data"}
    assert not rooms - named


def test_every_yaml_has_a_headline() -> None:
    for file in (ROOT / "conf").rglob("*.yaml"):
        first, *rest = [line for line in file.read_text().splitlines() if "@package" not in line]
        assert rest
        assert first.startswith("# "), f"{file} begins without a comment that says what it is"


def test_tables_are_on_the_pages(site: Path) -> None:
    for page, table in (("index", "e00_demo"), ("numbers", "benchmarks"), ("numbers", "trust"), ("numbers", "paper")):
        text = (site / f"{page}.html").read_text()
        lines = (ROOT / "results" / "tables" / f"{table}.md").read_text().splitlines()
        header = next(line for line in lines if line.startswith("|"))
        for cell in header.strip("| ").split("|"):
            assert f">{cell.strip()}</th>" in text, f"{table} is not on the page {page}"
        assert "<!-- table" not in text


def test_the_search_finds_what_a_user_would_ask(site: Path) -> None:
    """The three questions that the site has to answer alone, each by words that a user would type."""
    index = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    texts = [(entry["location"].partition("#")[0], (entry["title"] + entry["text"]).lower()) for entry in index]

    def best(*words: str) -> set[str]:
        return {page for page, text in texts if all(word in text for word in words)}

    assert "run_folder.html" in best("first_order", "change of the loss")
    assert "how_to/transform.html" in best("rotations", "transform")
    assert "how_to/sensitivity.html" in best("sensitivity", "in a study")


def test_the_readme_is_short_and_shows_what_there_is() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 8000
    for word in ("make demo", "make test", "mgvq-run", "<!-- table e00_demo -->"):
        assert word in text
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert urlsplit(link).scheme or (ROOT / link).exists(), link


def test_one_version_in_three_places() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == version


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    import mgvq

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert mgvq.__version__ == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_alone_lists_every_target() -> None:
    done = subprocess.run(["make", "--silent"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets == set(re.findall(r"^ *make (\S+)", done.stdout, re.MULTILINE))
