# SPDX-License-Identifier: Apache-2.0
"""The documentation site builds without a warning, its links hold, and a browser finds no error on any page."""

import functools
import os
import shutil
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'verl-dvpo[docs]'")
pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'verl-dvpo[docs]'")

import yaml
from documents.browser import Browser, served
from site_pages import algorithms, equations, links, navigation

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Collects what a page names, loads and links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.equations = 0
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        self.equations += tag == "math"
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("img", "script", "iframe", "source") and given.get("src"):
            self.loads.append(given["src"])
        elif tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.loads.append(given["href"])

    def handle_data(self, data):
        self.text += data


@functools.cache
def parsed(file: Path) -> Page:
    return Page(file.read_text())


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Builds the site once, as ``make docs`` does, and says what it warned of."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


def pages(site: Path) -> list[str]:
    return sorted(file.relative_to(site).as_posix() for file in site.rglob("*.html"))


def is_elsewhere(link: str) -> bool:
    return urllib.parse.urlsplit(link).scheme not in ("", "data") or link.startswith("//")


def test_links_and_anchors_hold(site):
    """Read from the HTML, not asked of mkdocs."""
    broken = []
    for page in pages(site):
        for link in parsed(site / page).links + parsed(site / page).loads:
            parts = urllib.parse.urlsplit(link)
            if is_elsewhere(link) or parts.scheme == "data" or page == "404.html":
                continue
            target = (site / page).parent / urllib.parse.unquote(parts.path) if parts.path else site / page
            target = target / "index.html" if target.is_dir() else target
            anchor = urllib.parse.unquote(parts.fragment)
            if not target.resolve().is_file():
                broken.append(f"{page}: {link}")
            elif anchor and target.suffix == ".html" and anchor not in parsed(target.resolve()).names:
                broken.append(f"{page}: {link} (no such anchor)")
    assert not broken
    assert sum(len(parsed(site / page).links) for page in pages(site)) > 1000


def test_no_page_loads_from_another_host(site):
    assert not [(page, load) for page in pages(site) for load in parsed(site / page).loads if is_elsewhere(load)]
    style = "".join(file.read_text() for file in site.rglob("*.css"))
    assert "fonts.googleapis" not in style
    assert "url(http" not in style.replace("http://www.w3.org", "")


def test_equations_are_written_out(site):
    dollars = (DOCS / "concepts.md").read_text().replace("$$", "$").count("$")
    assert parsed(site / "concepts.html").equations == dollars / 2 > 20
    for page in pages(site):
        assert "arithmatex" not in (site / page).read_text(), page


def test_an_equation_that_cannot_be_read_stops_the_build():
    with pytest.raises(ValueError, match="must be LaTeX"):
        equations.with_mathml(r'<span class="arithmatex">\(x_1_2\)</span>')
    with pytest.raises(ValueError, match="does not know"):
        equations.with_mathml(r'<span class="arithmatex">\(\nosuchthing x\)</span>')


def test_every_page_is_in_the_navigation():
    """A page that is not appears under "More" on the site."""
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.UnsafeLoader)["nav"]
    pages = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}
    missing = navigation.missing(nav, pages)
    assert not missing, f"add {', '.join(missing)} to a section of nav in mkdocs.yml; until then it stands under More"


def test_the_navigation_bears_new_pages_and_absent_ones():
    nav = [{"Start": ["index.md", "gone.md"]}, {"Guides": ["gone_too.md"]}, {"One": "one.md"}]
    existing = {"index.md", "one.md", "new.md", "files/x.md"}
    assert navigation.fitted(nav, existing) == [{"Start": ["index.md"]}, {"One": "one.md"}, {"More": ["new.md"]}]


def test_every_algorithm_has_a_page(site):
    index = (DOCS / "algorithms" / "index.md").read_text()
    names = {file.stem for file in (ROOT / "config" / "algorithm").glob("[!_]*.yaml")}
    assert names == {file.stem for file in (DOCS / "algorithms").glob("*.md")} - {"index"} == set(algorithms.names())
    for name in names:
        text = (DOCS / "algorithms" / f"{name}.md").read_text()
        assert f"]({name}.md) | `{name}` |" in index
        assert f"`algorithm={name}`. Paper:" in text
        assert f"make train ALGORITHM={name}\n" in text
        assert all(f"\n## {heading}\n" in text for heading in ("Command", "What is rebuilt", "Result"))
        shown = parsed(site / "algorithms" / f"{name}.html")
        assert {"settings", "measured-here"} <= shown.names


def test_measured_rows_are_those_of_the_documents():
    """By hand from docs/demo.md: one row of ``dvpo``, none of ``dvpo_calibrated`` under its name."""
    (row,) = [row for row in algorithms.rows_of("dvpo") if row.page == "demo.md"]
    assert row.heading == "Every algorithm learns it"
    assert row.header[0].startswith("| `algorithm=` | before |")
    (line,) = row.rows
    assert line in (DOCS / "demo.md").read_text().splitlines()
    assert line.startswith("| `dvpo` |")


def test_links_of_github_become_links_of_the_site():
    text = (
        "[a](../README.md) [b](method.md#x) [c](../examples/own_family) [d](https://x.org/a)\n"
        "```\n[e](../README.md)\n```\n"
    )
    expected = (
        "[a](../index.md) [b](../method.md#x) [c](../files/examples/own_family/README.md) [d](https://x.org/a)\n"
        "```\n[e](../README.md)\n```\n"
    )
    assert links.rewrite(text.replace("](m", "](../docs/m"), source="docs/x.md", page="deep/x.md") == expected


@pytest.fixture(scope="module")
def browser(site, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: pages are not opened in a browser")
    pytest.importorskip("websockets", reason="websockets is not installed: pages are not opened in a browser")
    with served(site) as address:
        browser = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"), address)
        try:
            yield browser
        finally:
            browser.close()


def test_a_browser_finds_no_error_on_any_page(browser, site):
    errors = {page: found for page in pages(site) if page != "404.html" and (found := browser.errors_on(page))}
    assert errors == {}


def test_the_browser_finds_errors_that_are_there(browser, site):
    (site / "planted.html").write_text(
        "<!doctype html><title>x</title><link rel=icon href=data:,><img src=absent.png>"
        "<img src=http://elsewhere.invalid/a.png><script>console.error('told'); nothing.here()</script>"
    )
    found = "\n".join(browser.errors_on("planted.html"))
    (site / "planted.html").unlink()
    for expected in ("nothing is not defined", "told", "status 404", "asks another host: http://elsewhere.invalid"):
        assert expected in found


def test_a_browser_draws_the_equations(browser):
    assert browser.errors_on("concepts.html") == []
    heights = browser.value("[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().height)")
    assert len(heights) > 20
    assert min(heights) > 5


def test_the_search_of_the_site_finds_a_page(browser):
    assert browser.errors_on("index.html") == []
    found = browser.value(
        """fetch('search/search_index.json').then(r => r.json())
        .then(i => i.docs.some(d => d.location.startsWith('concepts.html') && d.text.includes('pinball')))"""
    )
    assert found is True
