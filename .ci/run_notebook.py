"""Execute notebooks and write their outputs into them: python .ci/run_notebook.py docs/notebooks/*.ipynb"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # of tqdm, whose bars need a package of widgets
for name in sys.argv[1:]:
    notebook = nbformat.read(name, as_version=4)
    with tempfile.TemporaryDirectory() as directory:
        NotebookClient(
            notebook, timeout=1800, record_timing=False, resources={"metadata": {"path": directory}}
        ).execute()
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    Path(name).write_text(nbformat.writes(notebook) + "\n")
