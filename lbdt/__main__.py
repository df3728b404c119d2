"""`python -m lbdt`: the same as the console script."""

import sys

from lbdt.cli import main

if __name__ == "__main__":
    sys.exit(main())
