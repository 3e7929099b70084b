"""Read a page of HTML as a browser would, strictly."""

import re
from html.parser import HTMLParser

VOID = ("meta", "br")


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value or "" for _, name, value in self.attributes if name == attribute]


def assert_self_contained(text: str) -> Page:
    """Refuse whatever a browser would fetch, and ids that are there twice."""
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert page.values("src") == []
    assert all(link.startswith("#") for link in [*page.values("href"), *page.values("xlink:href")])
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) | {link[1:] for link in page.values("href")} <= set(ids)
    return page
