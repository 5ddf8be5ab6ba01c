"""python -m fewedges: the same as the `fewedges` command."""

import sys

from fewedges.cli import main

if __name__ == "__main__":
    sys.exit(main())
