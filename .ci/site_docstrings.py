"""Docstrings as this project writes them, for griffe: comments of fields, literal blocks, roles."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

COMMENT = re.compile(r"\s{2}# (.+)$")


class Docstrings(griffe.Extension):
    """A field's trailing comment is its docstring; `::` and `:func:` of reStructuredText become Markdown."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and isinstance(node, ast.AnnAssign) and attr.lines:
            comment = COMMENT.search(attr.lines[-1])
            if comment:
                attr.docstring = griffe.Docstring(comment[1], parent=attr)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"::\n\n", ":\n\n", obj.docstring.value)
            text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
            text = re.sub(r":(?:func|class|mod|meth):`(?:[^`<]*<)?~?([\w.]+)>?`", r"`\1`", text)
            obj.docstring.value = text
