"""The documentation names what exists: files, modules, functions, options and attributes; links and listings.

Checked are the docstrings and comments of the package, README.md and docs/*.md (CHANGELOG.md may name what is gone).
`Names` holds what a name may refer to; `faults` takes a back-ticked token apart:

    `a/b.py`, `report.schema.json`      a file of the repository, or one that the package writes
    `--on-disk`                         an option of the command line or of a benchmark
    `heads="both"`                      an option or a parameter, and one of its choices
    `python -m benchmarks.paper ...`    each dotted name in it
    `rules.lookup.rule_of`              a module and what it defines; a class and its attribute; a name of a library
    `weight`                            a definition of the package, or a name or string in the same file

Single letters are mathematics. A page may also name what its own code blocks contain. In comments, which have few
back-ticks, dotted names and file names are checked as well.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import io
import keyword
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

import fxmerge
from fxmerge.rules.lookup import spellings

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted(Path(fxmerge.__file__).parent.rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CODE = [*PACKAGE, *(p for top in ("benchmarks", "examples", "docs") for p in sorted((ROOT / top).rglob("*.py")))]

LIBRARIES = {
    "torch": torch, "nn": nn, "F": F, "fx": fx, "aten": torch.ops.aten, "Tensor": torch.Tensor, "fxmerge": fxmerge,
}  # fmt: skip
IMPORTED = {"torch", "numpy", "scipy", "networkx", "safetensors", "torchvision", "timm", "transformers"}
WORDS = [
    *(builtins, torch, nn, F, fx, torch.Tensor, fx.Node, fx.Graph, fx.GraphModule, nn.Module, PassResult),
    *(importlib.import_module(f"torch.{name}") for name in (
        "export", "fx.passes.infra.pass_base", "nn.utils", "nn.utils.parametrize", "utils.flop_counter"
    )),
]  # fmt: skip
# what is neither in the code nor in a library that is imported here: programs, variables of the environment, and
# attributes of users' models
OTHERS = {"pip", "python", "torchrun", "TMPDIR", "OMP_NUM_THREADS", "head_dim", "hidden_dim", "backbone.out_channels"}
PLACEHOLDERS = re.compile(r"NAME|mine|SPEC|DIR\b|FILE|path/to|^net\b|^small\b|MyNet|package\.module|\.\.\.|#|<|>|\\")
FILE = re.compile(r"(?<![\w./*])[\w./-]*\w\.(?:py|md|json|cfg|toml|js|css|html|safetensors|npz)\b(?!\()")
WORD = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
DOTTED = re.compile(r"(?<![\w./`\"'-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?![\w/`\"'-])")


class Scope:
    """The names in some code, and its strings."""

    def __init__(self, *trees: ast.AST) -> None:
        self.names: set[str] = set()  # that are defined, taken, assigned, imported or read
        self.parameters: set[str] = set()
        self.words: set[str] = set()  # strings and keyword arguments
        for tree in trees:
            for node in ast.walk(tree):
                self._add(node)
        self.all = self.names | self.words | self.parameters

    def _add(self, node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            self.names.add(node.name)
        elif isinstance(node, ast.arg):
            self.parameters.add(node.arg)
        elif isinstance(node, ast.alias):
            self.names.add((node.asname or node.name).split(".")[-1])
        elif isinstance(node, ast.keyword) and node.arg:
            self.words.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            self.words.add(node.value)
        elif isinstance(node, ast.Name):
            self.names.add(node.id)
        elif isinstance(node, ast.Attribute):
            self.names.add(node.attr)


def members(body: list[ast.stmt]) -> set[str]:
    """What the body of a module or a class defines: functions, classes, variables, imports; and `self.x = ...`."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
            for inner in ast.walk(node):
                is_own = isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
                if is_own and isinstance(inner.value, ast.Name) and inner.value.id == "self":
                    found.add(inner.attr)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            found |= members(node.body)
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            found |= {(a.asname or a.name).split(".")[-1] for a in ast.walk(node) if isinstance(a, ast.alias)}
    return found


class Names:
    """What the repository's code defines."""

    def __init__(self) -> None:
        trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in CODE}
        self.trees = {path: trees[path] for path in PACKAGE}
        self.modules = {self._dotted(path): members(tree.body) for path, tree in trees.items()}
        self.modules |= {self._dotted(path): set() for path in TESTS}
        self.folders_of_modules = {part for module in self.modules for part in module.split(".")}
        tops = [p for p in ROOT.iterdir() if p.name not in (".git", ".venv")]  # an environment has as many files as all
        found = [p for top in tops for p in (top.rglob("*") if top.is_dir() else [top]) if p.is_file()]
        self.files = {p.relative_to(ROOT).as_posix() for p in found}
        self.folders = {part.as_posix() for f in self.files for part in Path(f).parents if part.as_posix() != "."}
        self.package, self.everywhere = Scope(*self.trees.values()), Scope(*trees.values())
        classes = [n for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
        self.attributes: dict[str, set[str]] = defaultdict(set)  # class -> its attributes, those of its bases too
        for node in classes:
            self.attributes[node.name] |= members(node.body)
        for _ in range(3):
            for node in classes:
                for base in (b.id for b in node.bases if isinstance(b, ast.Name)):
                    self.attributes[node.name] |= self.attributes.get(base, set())
        self.instances: dict[str, set[str]] = defaultdict(set)  # parameter or field -> the classes it is annotated with
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
                    held = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
                    self.instances[held] |= set(re.findall(r"\w+", ast.unparse(node.annotation))) & {*self.attributes}
        self.instances["ctx"] |= {"Context", "RuleContext"} & {*self.attributes}  # what rules call it
        for name in ("result", "report", "analysis", "options", "plan"):
            self.instances[name] |= {name.capitalize()} & {*self.attributes}
        self.defined = {name for path in PACKAGE for name in self.modules[self._dotted(path)]}
        self.defined |= {name for held in self.attributes.values() for name in held}
        self.known = self.folders_of_modules | set(fxmerge.RULES)
        for registry in (fxmerge.SELECTORS, fxmerge.DECOMPOSITIONS, fxmerge.ALLOCATORS, fxmerge.PROBES):
            self.known |= set(registry)
        self.known |= {s for s in (getattr(k, "name", k) for k, _, _ in spellings()) if isinstance(s, str)}
        self.known |= set(re.findall(r'"([\w-]+)[^"]*"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))

    def _dotted(self, path: Path) -> str:
        parts = path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def file(self, name: str) -> bool:
        """A file or folder of the repository, from its root or another folder, or a file that the package writes."""
        name = name.removeprefix("./").rstrip("/")
        known = self.files | self.folders
        return name in known or any(f.endswith(f"/{name}") for f in known) or name in self.package.words

    def flag(self, name: str) -> bool:
        return name in self.everywhere.words or name.lstrip("-").replace("-", "_") in self.defined

    def dotted(self, name: str, near: set[str]) -> bool:
        """`a.b.c`: module and definition, class and attribute, variable and attribute, or a name of a library."""
        head, *rest = name.split(".")
        if name in self.known | OTHERS | near or head == "self" or (len(head) == 1 and head != "F"):
            return True
        for at in range(len(rest) + 1, 0, -1):
            prefix, more = ".".join([head, *rest][:at]), [head, *rest][at:]
            for module, defined in self.modules.items():
                if (module == prefix or module.endswith(f".{prefix}")) and (not more or self._in_module(defined, more)):
                    return True
        classes = {head} if head in self.attributes else self.instances.get(head, set())
        if any(rest[0] in self.attributes[c] for c in classes):
            return True
        if head in LIBRARIES or head in IMPORTED or head in sys.stdlib_module_names:
            return _in_library(head, rest)
        if head in near and head not in self.folders_of_modules:
            return all(part in self.everywhere.names or hasattr(torch.Tensor, part) for part in rest)
        return any(hasattr(space, head) and _held(getattr(space, head), rest) for space in WORDS)

    def _in_module(self, defined: set[str], parts: list[str]) -> bool:
        owner = self.attributes.get(parts[0])
        return parts[0] in defined and (len(parts) == 1 or owner is None or parts[1] in owner)

    def single(self, name: str, near: set[str]) -> bool:
        if len(name.strip("_'")) < 2 or keyword.iskeyword(name):
            return True
        found = self.known | OTHERS | self.defined | self.package.words | near
        return name in found or bool(self.instances.get(name)) or any(hasattr(space, name) for space in WORDS)


def _in_library(head: str, rest: list[str]) -> bool:
    if head == "aten":
        return hasattr(torch.ops.aten, rest[0])
    try:
        return _held(LIBRARIES.get(head) or importlib.import_module(head), rest)
    except ImportError:
        return True  # it is not installed here


def _held(owner: Any, parts: list[str]) -> bool:
    for part in parts:
        if not hasattr(owner, part):
            is_package = isinstance(owner, ModuleType) and hasattr(owner, "__path__")
            return is_package and importlib.util.find_spec(f"{owner.__name__}.{part}") is not None
        owner = getattr(owner, part)
    return True


@cache
def names() -> Names:
    return Names()


def faults(token: str, near: set[str] = frozenset()) -> Iterator[str]:  # type: ignore[assignment]
    """The names in a back-ticked token that do not exist. near: the names and strings of the code that it is about."""
    known = names()
    token = " ".join(word for word in token.split() if not PLACEHOLDERS.search(word))
    if not token or token in known.package.words:
        return
    if "(" not in token:  # arguments of a call may be files of the user
        yield from (f for f in FILE.findall(token) if not known.file(f))
        token = FILE.sub(" ", token)
    if re.fullmatch(r"[\w./-]+/[\w./*-]*", token):
        if not known.file(token):
            yield token
        return
    for option, value in re.findall(r"\b([a-z_]\w+)=(\"[\w-]+\"|\w*)", token):
        if not known.single(option, near):
            yield option
        elif value.startswith('"') and not _chooses(option, value.strip('"')):
            yield f"{option}={value}"
    yield from (f for f in re.findall(r"(?<![\w-])--[a-z][\w-]*", token) if not known.flag(f))
    if re.fullmatch(r"\.?[A-Za-z_]\w*(\(.*\))?", token):  # one name, or a call of it
        name = re.match(r"\.?(\w+)", token)[1]  # type: ignore[index]
        if not known.single(name, near):
            yield name
        return
    bare = re.sub(r"\"[^\"]*\"|'[^']*'", " ", token)
    for name in re.findall(r"(?<![\w./-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", bare):
        if not re.search(r"\.\d", token) and not known.dotted(name, near):
            yield name


def _chooses(option: str, value: str) -> bool:
    """Is a string one of the choices of an option? What is no option, or has no choices, takes any."""
    if not isinstance(getattr(fxmerge.Options(), option, None), str):
        return True
    try:
        fxmerge.Options(**{option: value})  # type: ignore[arg-type]
    except fxmerge.FxMergeError:
        return False
    return True


def quoted(text: str) -> list[str]:
    """The tokens in back-ticks of a text, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`+([^`]+)`+", text)


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of the docstrings of a module, its classes, functions and fields."""
    for node in ast.walk(names().trees[path]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield f"{path.relative_to(ROOT).as_posix()}:{node.lineno}", node.value.value


def remarks(path: Path) -> Iterator[tuple[str, str]]:
    """(where, comment) of a file."""
    source = io.StringIO(path.read_text(encoding="utf-8"))
    for token in tokenize.generate_tokens(source.readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(type:|noqa|fmt:)", token.string):
            yield f"{path.relative_to(ROOT).as_posix()}:{token.start[0]}", token.string


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_docstrings_and_comments_name_what_exists(path: Path) -> None:
    near, found = Scope(names().trees[path]).all, set()
    for where, text in (*documented(path), *remarks(path)):
        found |= {(where, fault) for token in quoted(text) for fault in faults(token, near)}
        plain = re.sub(r"`+[^`]+`+", " ", text)
        unquoted = [f for f in FILE.findall(plain) if not names().file(f)]
        if text.startswith("#"):
            unquoted += [d for d in DOTTED.findall(FILE.sub(" ", plain)) if not names().dotted(d, near)]
        found |= {(where, name) for name in unquoted if not PLACEHOLDERS.search(name)}
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_name_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)
    near = {word for block in blocks for word in WORD.findall(block)}
    near |= names().everywhere.parameters | names().everywhere.names
    assert not {(fault, token) for token in quoted(text) for fault in faults(token, near)}


@pytest.mark.parametrize(
    "stale",
    ["paths.push", "rewrite.survivors", "perchannel.py", "Options.share", "torch.no_such_op", "docs/design.md",
     'heads="half"', "--no-such-flag", "no_such_function", "benchmarks.no_such_page", "fxmerge.no_such_name",
     "fxmerge/ir.py", "Group.carriers", "result.no_such_method()"],
)  # fmt: skip
def test_a_stale_name_is_found(stale: str) -> None:
    assert list(faults(stale))
    assert list(faults(stale, Scope(names().trees[Path(fxmerge.__file__).parent / "rules" / "table.py"]).all))


def test_a_stale_name_is_found_in_a_comment() -> None:
    assert DOTTED.findall("# its affine is pushed through exactly, by paths.push") == ["paths.push"]
    assert FILE.findall("The form of a rule is in perchannel.py.") == ["perchannel.py"]


@pytest.mark.parametrize(
    "good",
    ["rules.lookup.rule_of", "Options.heads", "options.heads", 'heads="both"', "torch.fx.symbolic_trace", "F.linear",
     "nn.Conv2d", "aten.convolution", "fxmerge/rules/table.py", "model.py", "--on-disk", "W'", "x ~ up @ (down @ x)",
     "result.save", "fxmerge.merge(model, x, ratio=0.5)", "layer1.0.conv1", "SELECTORS", "running_var", ".pt2"],
)  # fmt: skip
def test_a_good_name_is_let_through(good: str) -> None:
    assert not list(faults(good))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in links if not link.startswith(("http", "#"))]
    assert not [link for link in local if not (page.parent / link).exists()]


@pytest.mark.slow
def test_the_running_example_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change: `python docs/running_example.py`."""
    path = ROOT / "docs" / "running_example.py"
    spec = importlib.util.spec_from_file_location("running_example", path)
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "running_example", example)  # inspect.getsource looks there
    spec.loader.exec_module(example)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- listing: (\w+) -->", page)) == set(example.LISTINGS)
    assert example.written(page) == page


def test_the_table_of_folders_is_whole() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)/` \|", page, flags=re.MULTILINE))
    assert named == {p.name for p in Path(fxmerge.__file__).parent.iterdir() if (p / "__init__.py").exists()}
