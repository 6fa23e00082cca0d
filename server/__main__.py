"""`python -m xlane.server` is `xlane`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
