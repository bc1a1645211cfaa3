"""Pieces of pages: cells of Markdown tables, and plots as SVG."""

from pathlib import Path
from typing import Any


def escaped(text: str) -> str:
    """The text, escaped for a cell of a Markdown table."""
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "\\<")


def short(text: str, length: int) -> str:
    """The text, shortened to `length` characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def pyplot() -> Any:
    """`matplotlib.pyplot`, for SVG files. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fixed"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    return plt


def save_plot(figure: Any, path: Path) -> None:
    """Write a figure without the date, so that the same numbers give the same file."""
    figure.savefig(path, metadata={"Date": None})
