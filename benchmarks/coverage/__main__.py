"""Command line of `python -m benchmarks.coverage`; see run.py."""

from benchmarks.coverage.run import main

if __name__ == "__main__":
    main()
