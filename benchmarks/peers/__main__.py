"""Command line of `python -m benchmarks.peers`; see compare.py."""

from benchmarks.peers.compare import main

if __name__ == "__main__":
    main()
