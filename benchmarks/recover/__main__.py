"""Command line of `python -m benchmarks.recover`; see run.py."""

from benchmarks.recover.run import main

if __name__ == "__main__":
    main()
