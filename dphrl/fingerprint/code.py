"""A hash of code: of modules, and of what they import. It tells whether a reward may judge otherwise than before.

Comments and formatting do not count; in this program's own modules docstrings do not either. Of a package that pip has
installed the version stands for its code, and the standard library is taken for granted. What only shows when the code
runs is not seen: data files that it reads, modules that it finds by a computed name, services that it asks.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dphrl.fingerprint.files import hash_value

OWN = "dphrl"
# Rooms of this program that a grader passes through, but that decide no verdict.
WITHOUT_VERDICT = {"config", "own_code", "tracking"}
# How the sandbox is told what to run in its child.
_HANDLER = re.compile(rf"({OWN}(?:\.\w+)+):\w+")
_INSTALLED = {"site-packages", "dist-packages"}


def hash_code(modules: Sequence[str]) -> str:
    """16 hex digits over the code of `modules` and of what they import, however deep.

    The packages that `modules` lie in count by their code even where they are installed. A module that cannot be found
    counts by its name. Nothing is imported.
    """
    asked = {name.partition(".")[0] for name in modules}
    digests: dict[str, str] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        top = name.partition(".")[0]
        if name in digests:
            continue
        if top == OWN:
            digests[name], imported = _own(name)
        elif top in asked or not (release := _release(top)):
            digests[name], imported = _read(name, keep_docstrings=True)
        else:
            digests[top], imported = release, ()
        todo += imported
    # A name that is no module is one that a module defines, and it counts with that module.
    return hash_value(sorted((name, digest) for name, digest in digests.items() if digest or name in modules))


@cache
def _own(name: str) -> tuple[str, tuple[str, ...]]:
    _, _, inner = name.partition(".")
    if not inner or inner.partition(".")[0] in WITHOUT_VERDICT:
        return "", ()
    return _read(name, keep_docstrings=False)


@cache
def _release(top: str) -> str:
    """The version of what pip, or Python itself, has installed under that name; "" for code that lies elsewhere."""
    if top in sys.stdlib_module_names:
        return "Python"
    spec = _find(top)
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
    if not any(_INSTALLED & set(Path(place).parts) for place in places if place):
        return ""
    try:
        return " ".join(f"{name} {version(name)}" for name in sorted(set(packages_distributions().get(top, ()))))
    except PackageNotFoundError:
        return ""


def _find(name: str) -> ModuleSpec | None:
    """Where a module lies. importlib's own search would import the packages around it, which runs their code."""
    top, *inner = name.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):  # ValueError: something put a module without a place into sys.modules
        return None
    for i in range(len(inner)):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join((top, *inner[: i + 1])), spec.submodule_search_locations)
    return spec


def _read(name: str, *, keep_docstrings: bool) -> tuple[str, tuple[str, ...]]:
    """A module's digest, "" where there is no such module, and the names of the modules that it may import."""
    spec = _find(name)
    if spec is None:
        return "", ()
    text = _source(spec)
    if text is None:
        return _digest_without_source(spec), ()
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    digest, imported = _digest_of_source(text, package, keep_docstrings=keep_docstrings)
    # Python runs the packages around a module first. Our own hold no code that decides a verdict.
    around = [] if name.startswith(f"{OWN}.") else [name[: dot.start()] for dot in re.finditer(r"\.", name)]
    return digest, (*around, *imported)


@lru_cache(maxsize=4096)
def _digest_of_source(text: str, package: str, *, keep_docstrings: bool) -> tuple[str, tuple[str, ...]]:
    try:
        tree = ast.parse(text)
    except SyntaxError:  # such as code of another Python that is never imported here
        return hash_value(text), ()
    return hash_value(_shape(tree, keep_docstrings=keep_docstrings)), tuple(dict.fromkeys(_imports(tree, package)))


def _source(spec: ModuleSpec) -> str | None:
    read = getattr(spec.loader, "get_source", None)
    try:
        return read(spec.name) if read else None
    except (ImportError, OSError, SyntaxError, UnicodeError):
        return None


def _digest_without_source(spec: ModuleSpec) -> str:
    """Of compiled code the file's content; of what is built into Python, Python's version."""
    if spec.origin is None and spec.submodule_search_locations is not None:
        return ""  # a folder without an __init__.py holds no code of its own
    try:
        return hashlib.sha256(Path(spec.origin or "").read_bytes()).hexdigest()[:16]
    except OSError:
        return platform.python_version()


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Every name in the tree that may be a module. package: what relative imports are relative to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (run := _HANDLER.fullmatch(node.value)):
            yield run[1]


def _shape(node: Any, *, keep_docstrings: bool) -> Any:
    """A syntax tree as JSON, without places. Empty fields are left out: the next Python may have more of them."""
    if isinstance(node, ast.AST):
        fields = ((name, _shape(value, keep_docstrings=keep_docstrings)) for name, value in ast.iter_fields(node))
        return [type(node).__name__, [[name, value] for name, value in fields if value not in (None, [])]]
    if isinstance(node, list):
        return [_shape(item, keep_docstrings=keep_docstrings) for item in node if keep_docstrings or not _is_text(item)]
    return None if node is None else repr(node)


def _is_text(node: Any) -> bool:
    """Whether a statement is a text that stands alone: a docstring of a module, class, function or field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
