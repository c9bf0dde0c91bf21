"""`python -m qtdog`."""

import os
import sys

from qtdog.cli import main
from qtdog.distributed import world_size

if __name__ == "__main__":
    code = main()
    if world_size() > 1:
        # Leaves without the interpreter's clean-up, in which PyTorch 2.15's gloo threads abort about once in 50 exits.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
