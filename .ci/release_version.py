"""Exit with one sentence unless version, CHANGELOG and tag agree: ``release_version.py [v0.2.0]``."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def disagreement(version: str, changelog: str, tag: str | None) -> str | None:
    """What keeps this version from a release; None where nothing does."""
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    if newest is None or newest[1] != version:
        return f"CHANGELOG.md: expected a section [{version}] first, got {newest and newest[1]}"
    if tag is not None and tag != f"v{version}":
        return f"tag: expected v{version}, got {tag}"
    return None


if __name__ == "__main__":
    source = (ROOT / "ppo_fast" / "_version.py").read_text()
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
    sys.exit(disagreement(version, (ROOT / "CHANGELOG.md").read_text(), next(iter(sys.argv[1:]), None)))
