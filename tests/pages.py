"""Run the blocks of README.md and of the pages under docs/, small and with a local model.

Every block of Python, shell, YAML or JSON follows a marker, a comment of one line:

    <!-- run -->             it is executed, in the order of the page; Python blocks of a page share their names,
                             YAML is read as a config
    <!-- file: NAME -->      it is the file NAME, which other blocks use
    <!-- example: PATH -->   it is that file of the repository, which has a test of its own
    <!-- command: NAME -->   .ci/readme_command.py prints it; CI or a test of that name runs it
    <!-- not run: REASON --> it is not executed
"""

import contextlib
import functools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import AutoModelForSequenceClassification

from ppo_fast import cli
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.models import tiny

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {"README.md": ROOT / "README.md"} | {
    str(path.relative_to(DOCS)): path
    for path in sorted(DOCS.rglob("*.md"))
    if not path.with_suffix(".ipynb").exists()  # a notebook as a page of the site
}
_FENCE = re.compile(r"^(?:<!-- ([a-z ]+?)(?:: ([^\n]*?))? -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HUB = re.compile(r"^Qwen/[\w.-]+$")


class Block(NamedTuple):
    """A fenced block with its marker."""

    kind: str  # "" without one
    name: str
    language: str
    text: str


@functools.cache
def blocks(page: str) -> list[Block]:
    return [Block(*(part or "" for part in match)) for match in _FENCE.findall(PAGES[page].read_text())]


def files() -> dict[str, str]:
    """The files of all pages by name."""
    return {block.name: block.text for page in PAGES for block in blocks(page) if block.kind == "file"}


# Flags that make a command of a page small; it shows its own where they are a part of what it shows.
_LOCAL = {"400": "3", "update-000020": "update-000001"}  # in a run of two updates
_SMALL = {
    "train": "--updates 2 --rollout.batch-size 8 --rollout.max-new-tokens 4 --optim.minibatch-size 8 "
    "--optim.micro-batch-size null --optim.tokens-per-pass null --optim.epochs 1 --model.dtype float32",
    "value": "--samples 16",
}


def shortened(command: list[str]) -> list[str]:
    """Arguments of `ppo-fast` with a local model and a short run."""
    local = [_LOCAL.get(word, "model" if HUB.match(word) else word) for word in command]
    if local[0] not in ("train", "sft", "reward", "value", "dpo"):
        return local
    if "--resume" in local:
        return [*local, "--log.no-console"]
    small = _SMALL.get(local[0], "").split()
    return [*local, *small, "--overwrite", "--threads", "1", "--log.no-tensorboard", "--log.no-console"]


class Site:
    """A directory with the files of all pages and tiny models; pages run in it, each once."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._ran = directory, set[str]()
        texts = files()
        for name, text in texts.items():
            (directory / name).write_text(text)
        run = yaml.safe_load(texts["run.yaml"])
        run |= {"updates": 2, "threads": 1, "model": {"path": "model"}, "log": {"tensorboard": False}}
        run["rollout"] |= {"batch_size": 8, "max_new_tokens": 4}
        run["optim"] |= {"minibatch_size": 8, "epochs": 1}
        run["checkpoint"] = {"every": 1, "keep": 0}
        (directory / "run.yaml").write_text(yaml.safe_dump(run))
        self._make_models(texts)

    def _make_models(self, texts: dict[str, str]) -> None:
        words = {word for name, text in texts.items() if name.endswith("l") for word in re.findall(r"\w+[.,?]?", text)}
        tokenizer = tiny.make_tokenizer(sorted(words | {"The", "capital", "of", "France", "is", "Paris"}))
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        size: dict[str, Any] = {"hidden": 16, "layers": 1, "heads": 2, "max_positions": 2048}
        model = tiny.make_model(len(tokenizer), **size)
        for name in ("model", "judge-model", "reward-a", "reward-b"):
            tokenizer.save_pretrained(self.directory / name)
            model.save_pretrained(self.directory / name)
        model.config.num_labels = 1
        for name in ("reward-a", "reward-b"):
            AutoModelForSequenceClassification.from_config(model.config).save_pretrained(self.directory / name)

    def run(self, *pages: str) -> None:
        for page in pages:
            if page not in self._ran:
                with _in_directory(self.directory):
                    self._run(page)
                self._ran.add(page)

    def _run(self, page: str) -> None:
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks(page):
            if block.kind != "run":
                continue
            if block.language == "python":
                exec(compile(block.text, f"{page}: python block", "exec"), names)
            elif block.language == "yaml":
                config_from_dict(yaml.safe_load(block.text))
            else:
                for line in block.text.splitlines():
                    _shell(line)


def _shell(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words and words[0] == "ppo-fast":
        assert cli.main(shortened(words[1:])) == 0, line
    elif words:
        subprocess.run(line, shell=True, check=True)


@contextlib.contextmanager
def _in_directory(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
