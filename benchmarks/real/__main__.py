"""Command line of `python -m benchmarks.real`; see run.py."""

from benchmarks.real.run import main

if __name__ == "__main__":
    main()
