"""The rules of the house, checked on the source itself.

Imports point one way, `dphrl` <- `actors` <- `cluster`, wherever in a file they stand: inside a function and
under TYPE_CHECKING too. The algorithm loads no Ray, vLLM or DeepSpeed; the command line loads nothing heavy
before it knows what is asked of it. Files and functions stay short enough to read. `dphrl` unpickles nothing.

Each rule is a function from a file to its offences, written `path:line: what`, so that the tests at the end
can show every rule an offender and see it caught.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dphrl", "actors", "cluster")

FORBIDDEN_IMPORTS = {
    "dphrl": {"actors", "cluster", "ray", "vllm", "deepspeed"},
    "actors": {"cluster"},
    "cluster": set[str](),
}
PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "pickle5", "cloudpickle", "dill", "shelve", "joblib"}

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 80


def source_files(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    return sorted(path for package in packages for path in (root / package).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def call_names(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: `import torch as t` -> {"t": "torch"}, `from torch import load` ->
    {"load": "torch.load"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                names[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`t.load` -> "torch.load" where `t` is torch; "" for anything but a chain of names."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        prefix = dotted(node.value, names)
        return f"{prefix}.{node.attr}" if prefix else ""
    return ""


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of every absolute import, the dynamic ones with a literal name included.

    A relative import cannot leave its own package, so it has nothing to tell here.
    """
    names = call_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.module and not node.level:
                yield node.lineno, node.module
        elif isinstance(node, ast.Call) and dotted(node.func, names) in {
            "importlib.import_module",
            "importlib.__import__",
            "builtins.__import__",
            "__import__",
        }:
            given = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "name")]
            for value in given:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield node.lineno, value.value


def imports_of(path: Path, modules: set[str]) -> list[str]:
    return [
        f"{path}:{line}: imports {module}"
        for line, module in imports(parse(path))
        if module.partition(".")[0] in modules
    ]


def import_direction(path: Path, root: Path) -> list[str]:
    return imports_of(path, FORBIDDEN_IMPORTS[path.relative_to(root).parts[0]])


def long_file(path: Path) -> list[str]:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    return [f"{path}:1: {lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []


def long_functions(path: Path) -> list[str]:
    """From `def` to the last line, docstring included."""
    return [
        f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def unpickling(path: Path) -> list[str]:
    """Imports of a pickling module, and loaders that would unpickle: a stored file is data and stays data."""
    offences = imports_of(path, PICKLE_MODULES)
    tree = parse(path)
    names = call_names(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        called = dotted(node.func, names)
        where = f"{path}:{node.lineno}:"
        if called in {"torch.load", "torch.serialization.load"} and not is_true(keywords.get("weights_only")):
            offences.append(f"{where} {called} without weights_only=True")
        if "allow_pickle" in keywords and called in {"numpy.load", "numpy.lib.format.read_array"}:
            value = keywords["allow_pickle"]
            if not (isinstance(value, ast.Constant) and value.value is False):
                offences.append(f"{where} {called} with allow_pickle")
        if called.rpartition(".")[2] == "read_pickle":
            offences.append(f"{where} {called}")
    return offences


def module_names(root: Path, package: str) -> list[str]:
    """Every module of a package by its dotted name; `__main__` is left out, importing it would run it."""
    names = []
    for path in source_files(root, (package,)):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def loaded_by_importing(modules: list[str], unwanted: set[str], root: Path) -> list[str]:
    """Imports the modules in a fresh interpreter; which of the unwanted top-level packages it then holds, and
    through which of the modules each came first."""
    program = (
        "import importlib, json, sys\n"
        "modules, unwanted = json.loads(sys.argv[1])\n"
        "seen = {}\n"
        "for module in modules:\n"
        "    importlib.import_module(module)\n"
        "    for name in {loaded.partition('.')[0] for loaded in list(sys.modules)} & set(unwanted):\n"
        "        seen.setdefault(name, module)\n"
        "print('\\n' + json.dumps(sorted(f'{module} loads {name}' for name, module in seen.items())))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps([modules, sorted(unwanted)])],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, f"an import failed:\n{result.stderr}"
    offences: list[str] = json.loads(result.stdout.splitlines()[-1])
    return offences


# ------------------------------------------------------------ the rules, applied


def every_offence(rule: Callable[[Path], list[str]], packages: tuple[str, ...] = PACKAGES) -> str:
    return "\n".join(offence for path in source_files(ROOT, packages) for offence in rule(path))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_source(package: str) -> None:
    assert source_files(ROOT, (package,))


def test_imports_point_one_way() -> None:
    assert not every_offence(lambda path: import_direction(path, ROOT))


def test_no_file_is_too_long() -> None:
    assert not every_offence(long_file)


def test_no_function_is_too_long() -> None:
    assert not every_offence(long_functions)


def test_dphrl_unpickles_nothing() -> None:
    assert not every_offence(unpickling, ("dphrl",))


def test_dphrl_loads_no_ray_vllm_or_deepspeed() -> None:
    modules = module_names(ROOT, "dphrl")
    assert "dphrl" in modules
    assert loaded_by_importing(modules, {"ray", "vllm", "deepspeed"}, ROOT) == []


def test_the_command_line_starts_light() -> None:
    assert loaded_by_importing(["cluster.cli"], {"torch", "ray", "vllm", "deepspeed"}, ROOT) == []


# ------------------------------------------------------------ each rule catches an offender


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "import ray",
        "import os, vllm.distributed as d",
        "from deepspeed import comm",
        "from actors.rollout_pool import Pool",
        "def f():\n    import cluster.cli",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ray import ObjectRef",
        "class A:\n    try:\n        import vllm\n    except ImportError:\n        vllm = None",
        "import importlib\nimportlib.import_module('ray.util')",
        "import importlib as il\nil.import_module(name='ray')",
        "from importlib import import_module as load\ndef f():\n    return load('actors.learner_rank')",
        "ray = __import__('ray')",
        "import builtins\nray = builtins.__import__('ray')",
    ],
)
def test_an_import_against_the_direction_is_caught(tmp_path: Path, text: str) -> None:
    offences = import_direction(write(tmp_path, "dphrl/algo/x.py", text), tmp_path)
    assert len(offences) == 1
    assert "dphrl/algo/x.py:" in offences[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "dphrl/x.py",
            "import torch\nfrom . import ray\nfrom .vllm import y\nimport raycast\n'import ray'  # ray",
        ),
        ("dphrl/x.py", "import importlib.util\nimportlib.util.find_spec('ray')"),
        ("actors/x.py", "import dphrl.loop, ray, vllm, deepspeed"),
        ("cluster/x.py", "from actors import rollout_pool\nimport dphrl, ray"),
    ],
)
def test_an_import_along_the_direction_is_not(tmp_path: Path, name: str, text: str) -> None:
    assert import_direction(write(tmp_path, name, text), tmp_path) == []


def test_actors_importing_cluster_is_caught(tmp_path: Path) -> None:
    assert import_direction(write(tmp_path, "actors/x.py", "from cluster.planning import placement"), tmp_path)


@pytest.mark.parametrize(("lines", "caught"), [(MAX_FILE_LINES, False), (MAX_FILE_LINES + 1, True)])
def test_a_long_file_is_caught(tmp_path: Path, lines: int, caught: bool) -> None:
    assert bool(long_file(write(tmp_path, "x.py", "x = 1\n" * lines))) is caught


@pytest.mark.parametrize("head", ["def f():", "async def f():", "class A:\n  def f(self):"])
@pytest.mark.parametrize(("lines", "caught"), [(MAX_FUNCTION_LINES, False), (MAX_FUNCTION_LINES + 1, True)])
def test_a_long_function_is_caught(tmp_path: Path, head: str, lines: int, caught: bool) -> None:
    text = head + "\n" + "    x = 1\n" * (lines - 1)
    assert bool(long_functions(write(tmp_path, "x.py", text))) is caught


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import cloudpickle as cp",
        "import torch\ntorch.load('a.pt')",
        "import torch\ntorch.load('a.pt', weights_only=False)",
        "import torch as t\nsafe = True\nt.load('a.pt', weights_only=safe)",
        "from torch import load as read\nread('a.pt')",
        "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
        "import pandas as pd\npd.read_pickle('a')",
    ],
)
def test_unpickling_is_caught(tmp_path: Path, text: str) -> None:
    assert len(unpickling(write(tmp_path, "x.py", text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('a.pt', map_location='cpu', weights_only=True)",
        "import json\njson.load(open('a.json'))",
        "import numpy as np\nnp.load('a.npy')\nnp.load('a.npy', allow_pickle=False)",
    ],
)
def test_a_safe_loader_is_not(tmp_path: Path, text: str) -> None:
    assert unpickling(write(tmp_path, "x.py", text)) == []


def test_a_package_loaded_at_a_distance_is_caught(tmp_path: Path) -> None:
    write(tmp_path, "heavy/__init__.py", "")
    write(tmp_path, "helper.py", "name = 'heavy'\nimport importlib\nimportlib.import_module(name)")
    write(tmp_path, "dphrl/__init__.py", "")
    write(tmp_path, "dphrl/algo/__init__.py", "")
    write(tmp_path, "dphrl/algo/late.py", "print('a module may print')\nimport helper")
    write(tmp_path, "dphrl/__main__.py", "raise SystemExit(3)")
    modules = module_names(tmp_path, "dphrl")
    assert modules == ["dphrl", "dphrl.algo", "dphrl.algo.late"]
    assert loaded_by_importing(modules, {"heavy", "vllm"}, tmp_path) == ["dphrl.algo.late loads heavy"]
    assert loaded_by_importing(modules[:2], {"heavy", "vllm"}, tmp_path) == []


def test_a_module_that_does_not_import_is_caught(tmp_path: Path) -> None:
    write(tmp_path, "dphrl/__init__.py", "import no_such_module_anywhere")
    with pytest.raises(AssertionError, match="no_such_module_anywhere"):
        loaded_by_importing(["dphrl"], {"ray"}, tmp_path)
