"""`python -m ppo_fast` is the command `ppo-fast`: `torchrun --nproc-per-node 2 -m ppo_fast train ...`."""

import sys

from ppo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
