"""`python -m qtdog`."""

import sys

from qtdog.cli import main

if __name__ == "__main__":
    sys.exit(main())
