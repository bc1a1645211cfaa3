"""`python -m fxmerge`: the same as the command `fxmerge`."""

import sys

from fxmerge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
