"""Command line of `python -m benchmarks.paper`; see tables.py."""

from benchmarks.paper.tables import main

if __name__ == "__main__":
    main()
