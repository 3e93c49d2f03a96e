"""The rules of the house, checked on the source itself.

Imports point one way, `dphrl` <- `actors` <- `cluster`, wherever in a file they stand: inside a function and
under TYPE_CHECKING too. Within the packages every room imports only the rooms that ROOMS names, which stand above it
in that table, so that there is no circle. The algorithm loads no Ray, vLLM or DeepSpeed; the command line loads
nothing heavy before it knows what is asked of it. Files and functions stay short enough to read. `dphrl` unpickles
nothing.

Each rule is a function from a file to its offences, written `path:line: what`, so that the tests at the end
can show every rule an offender and see it caught. `python -m tests.test_architecture` prints the table of rooms.
"""

from __future__ import annotations

import ast
import json
import os
import re
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
# Where the program starts: it must begin in `dphrl`, and hands over to the command line.
ENTRY_POINT = Path("dphrl/__main__.py")
PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "pickle5", "cloudpickle", "dill", "shelve", "joblib"}

# Room -> the rooms it may import, all of them further up. A room is a folder or a module right below `dphrl` or
# `cluster`; `actors` is one room, and so is each package's own __init__.
ROOMS = {
    "algo": "",
    "cluster": "",
    "dphrl": "",
    "tiny": "",
    "types": "",
    "own_code": "",
    "processors": "",
    "priority": "",
    "durable": "",
    "stopping": "",
    "background": "",
    "direct_file": "",
    "model_files": "durable",
    "config": "algo own_code durable",
    "outputs": "durable config",
    "owner": "durable config",
    "scratch": "owner",
    "hub": "model_files",
    "cluster.address": "",
    "cluster.doctor": "cluster.address hub processors",
    "cluster.refusals": "durable config owner",
    "tokenizer": "model_files",
    "models": "tiny tokenizer",
    "sandbox": "types own_code",
    "batch": "algo types config",
    "learner": "algo durable types config model_files scratch direct_file",
    "tracking": "types durable config",
    "health": "config",
    "protocols": "types config tracking",
    "rewards": "tiny types stopping config outputs own_code sandbox tracking",
    "fingerprint": "types config model_files rewards",
    "chunks": "types durable config fingerprint",
    "data": "tiny types config rewards",
    "collect": "background types config tracking protocols rewards data",
    "prepare": "types durable model_files hub config tokenizer models learner tracking rewards data",
    "evaluation": "types durable config fingerprint tracking chunks protocols rewards data collect prepare",
    "loop": "types stopping config batch tracking protocols collect",
    "reference": "types durable config fingerprint tracking chunks protocols rewards data collect prepare",
    "actors": (
        "types background durable config owner scratch tokenizer own_code processors learner tracking protocols "
        "rewards data reference"
    ),
    "experiments": "config outputs tracking evaluation",
    "inline": "types background config processors priority learner tracking protocols rewards data reference",
    "resume": "config fingerprint learner prepare",
    "replay": "types durable config learner tracking protocols",
    "saving": "background durable config learner protocols",
    "exporting": "durable config models learner tracking",
    "recovery": "stopping config learner tracking protocols",
    "run": (
        "types stopping config learner tracking health protocols prepare evaluation loop reference resume replay "
        "saving recovery"
    ),
    "cluster.dashboards": "actors",
    "cluster.planning": "cluster.address cluster.doctor config processors tracking experiments",
    "cluster.jobs": "config own_code tracking cluster.planning",
    "report": "dphrl types durable config outputs tracking evaluation experiments",
    "cluster.start": "config own_code actors",
    "cluster.connection": "cluster.address cluster.doctor config own_code processors tracking cluster.planning",
    "cluster.engines": "config actors cluster.planning",
    "cluster.orders": "durable config",
    "cluster.scaling": "config actors cluster.planning cluster.engines cluster.orders",
    "cluster.ray_system": (
        "types stopping config processors tracking protocols actors cluster.planning cluster.start "
        "cluster.connection cluster.engines cluster.scaling"
    ),
    "cluster.render": "config cluster.planning",
    "cluster.launch": (
        "stopping durable config outputs owner fingerprint learner tracking protocols prepare evaluation reference "
        "inline resume run cluster.planning cluster.refusals cluster.ray_system"
    ),
    "cluster.apart": "cluster.address stopping config own_code tracking",
    "cluster.experiments": (
        "durable stopping config outputs owner sandbox tracking protocols prepare experiments resume cluster.apart "
        "cluster.launch"
    ),
    "cluster.tuning": "durable config outputs tracking experiments cluster.launch cluster.experiments",
    "cluster.replay": (
        "config models tracking protocols inline replay actors cluster.planning cluster.start cluster.connection "
        "cluster.ray_system"
    ),
    "cluster.cli": (
        "cluster.doctor dphrl config own_code cluster.jobs cluster.orders tracking rewards experiments "
        "cluster.planning report cluster.refusals cluster.render cluster.launch cluster.replay cluster.experiments "
        "cluster.tuning exporting outputs stopping"
    ),
    "__main__": "own_code processors cluster.cli",
}

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

    Relative imports are forbidden: see `relative_imports`.
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


def relative_imports(path: Path) -> list[str]:
    """Imports that do not say in full what they import, so that the rules about rooms could not see them."""
    tree = parse(path)
    dots = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    dots += [line for line, module in imports(tree) if module.startswith(".")]
    return [f"{path}:{line}: a relative import; name the module in full" for line in dots]


def import_direction(path: Path, root: Path) -> list[str]:
    place = path.relative_to(root)
    return imports_of(path, FORBIDDEN_IMPORTS[place.parts[0]] - ({"cluster"} if place == ENTRY_POINT else set()))


def room_of(module: str) -> str:
    """`dphrl.learner.update` -> "learner"; `cluster.cli.remote` -> "cluster.cli"; `actors.buffer` -> "actors"."""
    package, *rest = module.split(".")
    if package == "actors" or not rest:
        return package
    return rest[0] if package == "dphrl" else f"{package}.{rest[0]}"


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of our own code; `from dphrl import loop` imports the module `dphrl.loop`."""
    tree = parse(path)
    told = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            told.add((node.lineno, node.module))
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if is_module(inner, root) else node.module
    # `import a.b` and the dynamic imports, which name modules in full; from-imports were told better above.
    yield from ((line, module) for line, module in imports(tree) if (line, module) not in told)


def named_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every text that is the name of one of our modules: something will import it by that name."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_module(node.value, root):
            yield node.lineno, node.value


def is_module(name: str, root: Path) -> bool:
    """Whether `name` is a dotted name of a module or package below `root`."""
    if not re.fullmatch(r"\w+(\.\w+)+", name):
        return False
    place = root.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def room_arrows(root: Path) -> dict[tuple[str, str], list[str]]:
    """(room, room it imports) -> where, for every arrow between two rooms of the packages below `root`."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for path in source_files(root):
        room = room_of(module_of(path, root))
        for line, module in dict.fromkeys([*imported_modules(path, root), *named_modules(path, root)]):
            if module.partition(".")[0] in PACKAGES and (other := room_of(module)) != room:
                arrows.setdefault((room, other), []).append(f"{path}:{line}: {room} imports {other}")
    return arrows


def room_offences(root: Path, rooms: dict[str, str]) -> list[str]:
    """Arrows that are not in the table, entries of the table that no import needs, and entries that point upwards."""
    arrows = room_arrows(root)
    allowed = {(room, other) for room, others in rooms.items() for other in others.split()}
    order = list(rooms)
    offences = [where for arrow, places in arrows.items() if arrow not in allowed for where in places]
    offences += [
        f"ROOMS: nothing in {room} imports {other}: remove it" for room, other in sorted(allowed - set(arrows))
    ]
    offences += [
        f"ROOMS: {room} imports {other}, which does not stand above it"
        for room, other in sorted(allowed)
        if other not in order[: order.index(room)]
    ]
    known = {room_of(module_of(path, root)) for path in source_files(root)}
    return offences + [f"ROOMS: {room} is missing" for room in sorted(known - set(rooms))]


def import_circles(root: Path) -> list[str]:
    """Modules that import each other in a circle when they load, within a room as well."""
    graph: dict[str, set[str]] = {}
    for path in source_files(root):
        inside = {
            child.lineno
            for node in ast.walk(parse(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.walk(node)
            if isinstance(child, ast.Import | ast.ImportFrom)
        }
        graph[module_of(path, root)] = {name for line, name in imported_modules(path, root) if line not in inside}
    circles: list[str] = []
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            circles.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module in graph and module not in done:
            for other in sorted(graph[module]):
                walk(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        walk(module, ())
    return circles


def room_table(root: Path, rooms: dict[str, str]) -> str:
    """For people: each room, what it is for, and the rooms it imports, from the ground up."""
    lines = []
    for room, others in rooms.items():
        package = room.partition(".")[0]
        folder = root / room.replace(".", "/") if package in PACKAGES else root / "dphrl" / room
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        about = (ast.get_docstring(parse(file)) or "").partition("\n")[0]
        lines += [f"{room:<20} {about}", f"{'':<20} imports {', '.join(others.split()) or 'nothing of ours'}"]
    num_arrows = sum(len(others.split()) for others in rooms.values())
    return "\n".join([*lines, f"{len(rooms)} rooms, {num_arrows} arrows, all upwards in this table"])


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


def test_rooms_import_only_what_the_table_says() -> None:
    assert room_offences(ROOT, ROOMS) == []


def test_no_import_is_relative() -> None:
    assert not every_offence(relative_imports)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert import_circles(ROOT) == []


def test_the_table_of_rooms_names_each_and_says_what_it_is_for() -> None:
    lines = room_table(ROOT, ROOMS).splitlines()
    for room in ROOMS:
        (line,) = (line for line in lines if line.split(" ")[0] == room and "imports" not in line[:28])
        assert len(line) > 30, f"{room}: its docstring should say what it is for"


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
    assert loaded_by_importing(["cluster.cli", "dphrl.__main__"], {"torch", "ray", "vllm", "deepspeed"}, ROOT) == []


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


def test_the_entry_point_alone_may_name_the_command_line(tmp_path: Path) -> None:
    text = "import cluster.cli"
    assert import_direction(write(tmp_path, "dphrl/__main__.py", text), tmp_path) == []
    assert import_direction(write(tmp_path, "dphrl/__main__.py", "import actors"), tmp_path)
    assert import_direction(write(tmp_path, "dphrl/algo/__main__.py", text), tmp_path)


@pytest.mark.parametrize(
    "text", ["from . import y", "from ..learner import update", "import importlib as i\ni.import_module('..loop', 'x')"]
)
def test_a_relative_import_is_caught(tmp_path: Path, text: str) -> None:
    assert len(relative_imports(write(tmp_path, "dphrl/algo/x.py", text))) == 1


def test_actors_importing_cluster_is_caught(tmp_path: Path) -> None:
    assert import_direction(write(tmp_path, "actors/x.py", "from cluster.planning import placement"), tmp_path)


SMALL_HOUSE = {"types": "", "algo": "types", "loop": "algo", "actors": "loop", "cluster.cli": "actors types"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"dphrl/algo/x.py": "from dphrl.loop import train"}, ["dphrl/algo/x.py:1: algo imports loop"]),
        ({"dphrl/algo/x.py": "def f():\n    from dphrl import loop"}, ["dphrl/algo/x.py:2: algo imports loop"]),
        ({"dphrl/algo/x.py": "import importlib\nimportlib.import_module('dphrl.loop')"}, ["algo imports loop"]),
        ({"dphrl/algo/x.py": "HOME = 'dphrl.loop'"}, ["dphrl/algo/x.py:1: algo imports loop"]),
        ({"dphrl/algo/x.py": "import dphrl.loop; from dphrl.types import Row"}, ["algo imports loop"]),
        ({"dphrl/algo/x.py": "ABOUT = 'see dphrl.loop'; KEY = 'dphrl.lr'"}, []),
        ({"dphrl/algo/x.py": "from dphrl.algo.y import z"}, []),
        ({"dphrl/loop.py": ""}, ["nothing in loop imports algo"]),
        ({"dphrl/new/x.py": ""}, ["new is missing"]),
    ],
)
def test_an_arrow_outside_the_table_is_caught(tmp_path: Path, change: dict[str, str], words: list[str]) -> None:
    house = {
        "dphrl/types.py": "",
        "dphrl/algo/x.py": "from dphrl.types import Row",
        "dphrl/algo/y.py": "from dphrl import types",
        "dphrl/loop.py": "import dphrl.algo.x",
        "actors/pool.py": "from dphrl.loop import train",
        "cluster/cli/__init__.py": "from actors import pool\nif TYPE_CHECKING:\n    from dphrl.types import Row",
    }
    for name, text in (house | change).items():
        write(tmp_path, name, text)
    offences = room_offences(tmp_path, SMALL_HOUSE)
    assert len(offences) == len(words)
    for offence, expected in zip(offences, words, strict=True):
        assert expected in offence


def test_a_table_that_points_upwards_is_caught(tmp_path: Path) -> None:
    write(tmp_path, "dphrl/a.py", "import dphrl.b")
    write(tmp_path, "dphrl/b.py", "")
    assert room_offences(tmp_path, {"b": "", "a": "b"}) == []
    assert room_offences(tmp_path, {"a": "b", "b": ""}) == ["ROOMS: a imports b, which does not stand above it"]


def test_a_circle_within_a_room_is_caught(tmp_path: Path) -> None:
    write(tmp_path, "dphrl/room/a.py", "from dphrl.room import b")
    write(tmp_path, "dphrl/room/b.py", "from dphrl.room.c import x")
    write(tmp_path, "dphrl/room/c.py", "def f():\n    from dphrl.room.a import y")
    assert import_circles(tmp_path) == [], "inside a function it is no circle of loading"
    write(tmp_path, "dphrl/room/c.py", "from dphrl.room.a import y")
    assert import_circles(tmp_path) == ["dphrl.room.a -> dphrl.room.b -> dphrl.room.c -> dphrl.room.a"]


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


if __name__ == "__main__":
    print(room_table(ROOT, ROOMS))
