"""Command line of `python -m benchmarks.speed`; see vgg16.py."""

from benchmarks.speed.vgg16 import main

if __name__ == "__main__":
    main()
