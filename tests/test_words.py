"""Prose and identifiers in the field's words: none of the private ones, American spelling."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BANNED = r"\b(beside|anew|aside|told|but for|alone)\b"
STEMS = (
    "normal|token|quant|material|optim|initial|general|synchron|serial|vector|minim|maxim|penal|regular|random|recogn"
)
BRITISH = (
    rf"(?i)({STEMS})is(e|ed|es|ing|er|ation)|behaviour|colour|favour|neighbour|honour|centre\b|labelled|modell(ed|ing)"
)
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".md", ".yaml", ".html", ".sh"}


def texts(*names: str) -> list[Path]:
    """Source and documentation below these folders, or these files."""
    paths = [
        path for name in names for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
    ]
    return [path for path in paths if path.suffix in SUFFIXES and "results" not in path.parts]


def found(pattern: str, path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for number, line in enumerate(lines, 1)
        if re.search(pattern, line)
    ]


PROSE = texts("README.md", "CONTRIBUTING.md", "docs", "ppo_fast", "csrc", "examples", "benchmarks")


def test_the_words_are_looked_for(tmp_path):
    assert len(PROSE) > 100
    path = ROOT / "tests" / "test_words.py"
    assert found(BANNED, path)
    assert all(re.search(BRITISH, word) for word in ("normalise", "tokenisation", "Behaviour", "run_materialised"))
    assert not any(
        re.search(BRITISH, word) for word in ("raise", "precise", "noise", "exercise", "supervised", "normalize")
    )


@pytest.mark.parametrize("pattern", [BANNED, BRITISH], ids=["banned", "british"])
def test_no_such_word_is_left(pattern):
    lines = [line for path in PROSE for line in found(pattern, path)]
    assert [line for line in lines if "config/renamed.py" not in line] == []  # it maps the old keys
