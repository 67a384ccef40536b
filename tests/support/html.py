"""Reading an HTML page that a report wrote, and a text that tries to break out of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

EVIL = "</pre><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>{{ 7*7 }}"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements with their attributes, and whether every one that is opened is closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every such element."""
        return [attributes for name, attributes in self.elements if name == tag]


def assert_self_contained(text: str) -> None:
    """The page is well formed and loads nothing; its references stay on it, each to one id."""
    page = Page(text)
    assert page.open == []
    assert not page.of("script") + page.of("link") + page.of("img") + page.of("iframe")
    links = [attributes.get("xlink:href") or attributes.get("href") for _, attributes in page.elements]
    assert all(link.startswith("#") for link in links if link)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
