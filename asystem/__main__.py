"""`python -m asystem` is `asystem`."""

import sys

from asystem.cli import main

if __name__ == "__main__":
    sys.exit(main())
