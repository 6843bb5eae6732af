"""The pages show what runs: their blocks are executed, their tables come from committed results, their links lead on."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppo_fast.rlhf.config.files import field_defaults
from tests.pages import DOCS, PAGES, ROOT, Site, blocks

# Pages whose blocks use runs that another page makes.
AFTER = {"checkpoints.md": ["train.md"], "advantages.md": ["pipeline.md"]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.mark.filterwarnings("ignore:the judge gave no score")  # a model of one layer
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.kind == "run" for block in blocks(page))])
def test_the_blocks_of_a_page_run(page: str, site: Site) -> None:
    site.run(*AFTER.get(page, []), page)


def test_every_block_has_a_marker() -> None:
    for page in PAGES:
        for block in blocks(page):
            known = block.kind in ("run", "file", "example", "command", "not run")
            assert known or block.language in ("text", "math"), f"{page}: no marker before\n{block.text}"
            assert block.kind != "not run" or block.name, f"{page}: no reason why this is not run\n{block.text}"
