"""Command line of `python -m benchmarks.language`; see run.py."""

from benchmarks.language.run import main

if __name__ == "__main__":
    main()
