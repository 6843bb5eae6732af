"""Print the shell block of README.md that follows ``<!-- command: NAME -->``."""

import re
import sys
from pathlib import Path

readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
block = re.search(rf"<!-- command: {sys.argv[1]} -->\n```bash\n(.*?)```", readme, re.DOTALL)
if block is None:
    sys.exit(f"README.md has no block <!-- command: {sys.argv[1]} -->")
print(block[1], end="")
