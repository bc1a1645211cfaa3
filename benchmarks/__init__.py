"""Benchmarks of fxmerge. README.md in this folder says which command writes which page."""
