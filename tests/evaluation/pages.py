"""Reading a page as strictly as it takes to find what it would load."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

_VOID = frozenset(("meta", "link", "img", "input", "br", "hr", "path", "circle", "polygon"))
_LOADING = ("src", "href", "srcset", "poster", "action", "data")


class Page(HTMLParser):
    """Elements and texts of a page.

    Attributes:
        tags: (name, attributes) of every element.
        text: All text but scripts and styles.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: dict[str, str] = {}
        self.styles = ""
        self.text = ""
        self._open: list[tuple[str, str]] = []
        self.feed(source)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in _VOID:
            self._open.append((tag, attributes.get("id") or attributes.get("type", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        tag, name = self._open[-1] if self._open else ("", "")
        if tag == "script":
            self.scripts[name] = data
        elif tag == "style":
            self.styles += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def loads(self) -> list[str]:
        """Addresses of things that are not in the page itself."""
        found = [
            value
            for _, attributes in self.tags
            for name, value in attributes.items()
            if name in _LOADING and not value.startswith(("data:", "#"))
        ]
        return found + re.findall(r"url\((?!['\"]?data:)[^)]*\)|@import\b", self.styles)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))
