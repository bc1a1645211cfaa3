"""A folder of networks: one module NAME.py for each, with three functions.

    load() -> (model, example inputs)      the inputs are a tensor, a tuple of them, or a dict of keyword arguments
    evaluate(model, n=...) -> float        the metric, on data that nothing else uses
    calibration(n) -> batches              unlabelled inputs of the model; n samples, or fewer if there are no more

The folder goes on sys.path, so that networks may share other modules in it.
"""

import ast
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

FUNCTIONS = ("load", "evaluate", "calibration")


def names(folder: Path) -> list[str]:
    """The networks of a folder: its modules that define all three functions. They are not imported.

    Raises ValueError with a message for the user if there are none, or if a file cannot be parsed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = [file.stem for file in sorted(folder.glob("*.py")) if {*FUNCTIONS} <= _defined(file)]
    if not found:
        wanted = ", ".join(f"{name}()" for name in FUNCTIONS)
        raise ValueError(f"{folder} contains no networks; a network is a file NAME.py that defines {wanted}")
    return found


def _defined(file: Path) -> set[str]:
    """The names that a module defines or imports at its top level."""
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    defined: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
    return defined


def load(folder: Path, name: str) -> ModuleType:
    """Import a network. Raises ImportError if another module of this name is imported instead."""
    folder = folder.resolve()
    sys.path.insert(0, str(folder))
    module = importlib.import_module(name)
    if Path(module.__file__ or "").resolve() != folder / f"{name}.py":
        raise ImportError(f"import {name} gives {module.__file__ or 'a built-in module'}; rename {folder / name}.py")
    return module


def about(module: ModuleType) -> str:
    """The docstring of a network, as one paragraph."""
    return " ".join((module.__doc__ or "").split())


def evaluated_on(module: ModuleType) -> str:
    """The defaults of a network's evaluate(), such as `n=500`, which say on how many samples it evaluates."""
    parameters = inspect.signature(module.evaluate).parameters.values()
    return ", ".join(f"{p.name}={p.default}" for p in parameters if p.default not in (p.empty, None))
