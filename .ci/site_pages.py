"""Write the pages that are made from something else.

python .ci/site_pages.py            # docs/knobs.md and docs/llms.txt, which are committed
python .ci/site_pages.py --check    # exit 1 if one of them is not current
python .ci/site_pages.py --site     # the notebooks as pages, for the site
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

from ppo_fast.rlhf.arguments import STAGES  # noqa: E402


class _Nav(yaml.SafeLoader):
    """mkdocs.yml names Python functions by a tag."""


_Nav.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def nav() -> list[tuple[str, list[str]]]:
    """The sections of mkdocs.yml with their pages; pages outside of a section first, under ''."""
    entries = yaml.load((ROOT / "mkdocs.yml").read_text(), _Nav)["nav"]
    sections: dict[str, list[str]] = {"": []}
    for entry in entries:
        if isinstance(entry, str):
            sections[""].append(entry)
        else:
            ((title, pages),) = entry.items()
            sections[title] = pages
    return [*sections.items()]


def source(page: str) -> Path:
    """The file that a page of the site is made from."""
    path = DOCS / page
    notebook = path.with_suffix(".ipynb")
    return notebook if notebook.is_file() else path


def text(page: str) -> str:
    """A page as Markdown."""
    path = source(page)
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join(block for cell in cells for block in _cell(cell)) + "\n"


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    content = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield content
        return
    yield f"```python\n{content}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![picture](data:image/png;base64,{''.join(data['image/png']).strip()})"
        else:
            shown = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
            yield f"```text\n{shown}\n```"


def summary(page: str) -> tuple[str, str]:
    """Title and first sentence of a page."""
    title, _, rest = text(page).partition("\n")
    sentence = re.match(r"\s*(.+?[.;:])(\s|$)", rest, re.DOTALL)
    assert title.startswith("# "), f"{page} has no title"
    assert sentence is not None, f"{page} has no first sentence"
    words = " ".join(sentence[1].split())
    return title[2:], re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words).rstrip(";:.") + "."


def llms() -> str:
    """https://llmstxt.org: the pages, one line each."""
    lines = ["# ppo_fast", "", f"> {summary('index.md')[1]}"]
    for section, pages in nav():
        lines += ["", f"## {section or 'Start'}", ""]
        for page in pages:
            title, sentence = summary(page)
            lines.append(f"- [{title}]({source(page).relative_to(DOCS)}): {sentence}")
    return "\n".join(lines) + "\n"


class Knob(typing.NamedTuple):
    """An option as a row of the page."""

    name: str
    values: str
    default: str
    about: str

    def row(self) -> str:
        return f"| `{self.name}` | {self.values} | `{self.default}` | {self.about} |".replace("||", "\\|\\|")


def knobs(config: Any, prefix: str = "") -> Iterator[tuple[type, list[Knob]]]:
    """The groups of a config, each with its fields: those of the config itself first."""
    hints, own = typing.get_type_hints(type(config)), []
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    groups = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    for name in (name for name in values if name not in groups):
        shown = _shown(values[name])
        own.append(Knob(f"{prefix}{name}", _values(hints[name]), shown, _comment(type(config), name)))
    yield type(config), own
    for name, group in groups.items():
        yield from knobs(group, f"{prefix}{name}.")


def _comment(config: type, name: str) -> str:
    """The help of a field: the comment at the end of its line, else the lines above, in the class that has it."""
    owner = next(base for base in config.__mro__ if name in inspect.get_annotations(base))
    found = re.search(rf"((?:^    # .+\n)*)^    {name}: .*?(?:  # (.+))?$", inspect.getsource(owner), re.MULTILINE)
    assert found is not None, f"{owner.__name__}.{name} has no line"
    text = found[2] or " ".join(line.strip("# ") for line in found[1].splitlines())
    assert text, f"{owner.__name__}.{name} has no comment"
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _values(kind: Any) -> str:
    """A type as a user writes its values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        several = arguments[-1] is Ellipsis
        return "list" if several else f"{len(arguments)} numbers"
    if arguments:
        return ", ".join(_values(argument) for argument in arguments)
    names = {str: "text", bool: "true, false", int: "integer", float: "number", type(None): "null"}
    return names[kind]


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


_ABOUT_KNOBS = """\
# Knobs

Every option of every command, with its values, its default and what it does.

`optim.lr` is the flag `--optim.lr`, the key `lr` under `optim:` in a YAML or TOML file, and the field of the config in
Python. A flag may have `-` for `_`, and `--GROUP.no-FIELD` switches off. `null` is None in Python. `make pages` makes
this page from the help.
"""


def knobs_page() -> str:
    """docs/knobs.md: every option of `ppo-fast train`, then those that the other stages have of their own."""
    lines, seen = [_ABOUT_KNOBS], set[Knob]()
    for command, stage in sorted(STAGES.items(), key=lambda item: item[0] != "train"):
        about = stage.about if command == "train" else f"{stage.about} Options as above are left out."
        lines += [f"## ppo-fast {command}", "", about, ""]
        for group, fields in knobs(stage.config()):
            new = [knob for knob in fields if knob not in seen]
            seen |= {*new}
            if new:
                path = new[0].name.rpartition(".")[0] or "the run"
                doc = " ".join((group.__doc__ or "").partition("\n\n")[0].split())
                lines += [f"### {path}{'' if command == 'train' else f' of {command}'}", "", doc, ""]
                lines += ["| option | values | default | meaning |", "|---|---|---|---|", *map(Knob.row, new), ""]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Write or check them."""
    if "--site" in arguments:
        for page in (page for _, pages in nav() for page in pages if source(page).suffix == ".ipynb"):
            (DOCS / page).write_text(text(page))
        return 0
    current = True
    for name, make in (("knobs.md", knobs_page), ("llms.txt", llms)):
        path, made = DOCS / name, make()
        if "--check" in arguments:
            current &= path.is_file() and path.read_text() == made
        else:
            path.write_text(made)
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
