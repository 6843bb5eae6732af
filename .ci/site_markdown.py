r"""Markdown of the pages as the repository shows it, turned into that of the site.

* Math, `$`...`$` and blocks of ```math, becomes MathML: browsers draw it without a script.
* A link to a notebook leads to its page.
* A link to a file outside docs/ leads to the repository that pyproject.toml names; without one its text stays.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./((?!\S*\.md[)#])[^)\s]+)\)")
PROJECT = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
REPOSITORY = re.search(r'^Repository = "(.+)"$', PROJECT, re.MULTILINE)
NOTEBOOK = re.compile(r"\]\(([\w/.-]+)\.ipynb\)")


def math_block(source: str, *_: Any, **__: Any) -> str:
    """A fence of superfences."""
    return f'<div class="math">{convert(source, display="block")}</div>'


class InlineMath(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]  # noqa: N802
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)


class Links(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        target = rf"[\1]({REPOSITORY[1]}/blob/main/\2)" if REPOSITORY else r"\1"
        return [NOTEBOOK.sub(r"](\1.md)", OUTSIDE.sub(target, line)) for line in lines]


class Site(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.inlinePatterns.register(InlineMath(r"\$`(.+?)`\$", md), "math", 195)
        md.preprocessors.register(Links(md), "links", 1)


def makeExtension(**settings: Any) -> Site:  # noqa: N802
    return Site(**settings)
