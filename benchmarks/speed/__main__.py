"""Command line of `python -m benchmarks.speed`; see vgg16.py, and refit.py for `python -m benchmarks.speed refit`."""

import sys

from benchmarks.speed import refit, vgg16

if __name__ == "__main__":
    if sys.argv[1:2] == ["refit"]:
        refit.main(sys.argv[2:])
    else:
        vgg16.main()
