"""The notebooks of docs/ run from top to bottom, and show what they printed and drew."""

import base64
import io
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs/notebooks").glob("*.ipynb"))
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of jupyter_client
    pytest.mark.filterwarnings("ignore:.*event loop.*"),
]


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def _colored(picture: bytes) -> float:
    """The share of the pixels of a picture that are not gray."""
    rgb = matplotlib.image.imread(io.BytesIO(picture))[..., :3]
    return float((rgb.max(-1) - rgb.min(-1) > 0.2).mean())


# The quickstart takes 25 s.
EACH = [pytest.param(x, marks=[pytest.mark.slow] if x.stem == "quickstart" else [], id=x.stem) for x in NOTEBOOKS]


@pytest.mark.parametrize("path", EACH)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPO_FAST_SMALL", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed = nbformat.read(path, as_version=4)
    notebook = nbformat.from_dict(committed)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert len(pictures(notebook)) == len(pictures(committed))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))  # in one go, from the top
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    drawn = pictures(notebook)
    assert len(drawn) >= 2
    assert all(_colored(picture) > 0.002 for picture in drawn)  # curves: axes are gray
    assert path.stat().st_size < 200_000
