"""Build the site from the repository's pages: MkDocs calls the functions named ``on_…``.

A page in ``docs/`` links to files as they lie in the repository. The README is the first page of the site, and whatever
a page links to outside ``docs/`` comes along, so that the same links work in both.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
"""The path that a Markdown link leads to, without the part after ``#``."""
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):(?=<code>)")
"""A role of Sphinx in a docstring, before the name that it marks."""
FIRST = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "experiments/README.md", "benchmarks/README.md")


def site_path(path: str) -> str:
    """Return a repository file's path on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def repository_path(path: str) -> str:
    """Return a site file's path in the repository."""
    if path == "index.md":
        return "README.md"
    return f"docs/{path}" if (ROOT / "docs" / path).exists() else path


def links_of(path: str) -> list[str]:
    """Return the paths in the repository that a page links to."""
    if not path.endswith(".md"):
        return []
    text = (ROOT / path).read_text(encoding="utf-8")
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in LINK.findall(text)]


def on_files(files: Any, config: Any) -> Any:
    """Add the README and all files outside ``docs/`` that pages link to."""
    waiting = [*FIRST, *(f"docs/{name}" for name in os.listdir(ROOT / "docs"))]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/") and (ROOT / path).is_file():
            place = InclusionLevel.INCLUDED if path in FIRST else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path), inclusion=place))
        new = [link for link in links_of(path) if link not in seen]
        seen.update(new)
        waiting += new
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between files of the site."""
    here = repository_path(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[0]))
        return posixpath.relpath(site_path(path), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(turned, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Remove Sphinx roles from docstrings but keep the names they mark."""
    return ROLE.sub("", html)
