"""Command line of `python -m benchmarks.accuracy`; see ratios.py."""

from benchmarks.accuracy.ratios import main

if __name__ == "__main__":
    main()
