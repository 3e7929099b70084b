"""The documentation as a site: every page has its place, every link leads somewhere, and the search finds it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from crysldnet.inference import load

ROOT = Path(__file__).parents[1]


def navigation() -> dict[str, list[str]]:
    """Return the pages of each part of the site."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return {
        title: [page for entry in pages for page in entry.values()] for part in nav for title, pages in part.items()
    }


def test_the_site_has_the_pages_of_the_readme_in_the_same_order() -> None:
    readme = (ROOT / "README.md").read_text().split("\n## Documentation\n")[1].split("\n## ")[0]
    parts = dict(part.split("\n", 1) for part in readme.split("\n### ")[1:])
    site = navigation()
    assert list(parts) == list(site)
    for title, text in parts.items():
        named = re.findall(r"^\| \[[^]]+\]\(docs/([\w.]+)\)", text, re.MULTILINE)
        assert named == [page for page in site[title] if (ROOT / "docs" / page).exists()]
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= {page for pages in site.values() for page in pages}


class Links(HTMLParser):
    """What a page links to and loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.names: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        given = dict(attributes)
        self.found += [given[name] for name in ("href", "src") if given.get(name)]
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    commands = pytest.importorskip("mkdocs.commands.build", reason="MkDocs isn't installed")
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        commands.build(config)  # raises at the first warning
    return folder


def test_every_link_of_the_site_leads_somewhere_and_nothing_comes_from_elsewhere(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 30
    for page, links in pages.items():
        for link in links.found:
            if link.startswith(("https:", "mailto:", "data:")):
                continue
            path, _, name = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.relative_to(site)}: {link}"
            assert not name or target not in pages or name in pages[target].names | {"__comments"}, (page, link)
        loaded = re.findall(
            r'<(?:script|link rel="(?:stylesheet|preconnect)"|img)[^>]*(?:src|href)="(\w+:[^"]*)"', page.read_text()
        )
        assert loaded == []


def test_the_reference_shows_signatures_and_docstrings(site: Path) -> None:
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    page = Links(site / "api.html")
    assert len(named) > 20
    assert set(named) <= page.names
    assert "crysldnet.inference.predictor.Predictor.predict" in page.names
    text = (site / "api.html").read_text()
    assert str(load.__doc__).splitlines()[0] in text
    assert ":func:" not in text


def test_the_search_knows_every_page(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text())
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    pages = {
        page.replace(".md", ".html").replace("README.html", "index.html")
        for part in navigation().values()
        for page in part
    }
    assert {page or "index.html" for page in places} >= pages
    assert any("crysldnet.inference.load" in entry["location"] for entry in index["docs"])
