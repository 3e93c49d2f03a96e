"""No wait on Ray without a limit: a rule about the source of `actors` and `cluster`, and proof that it sees offenders.

`asyncio.wait_for` is no limit here: it can lose a cancellation, see `actors.waiting.limited`.
What counts: `await` of, or `async for` over, something that a `.remote(...)` call gave, directly, through a name or
through `gather`, unless a function that has a limit stands between; and `ray.get`, `ray.wait` and `asyncio.wait`
without `timeout`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Functions that wait for what they are given within a limit.
LIMITED = {"within", "limited", "answer_of", "_answer", "step", "_up"}
# Those that only have one when they are given it.
BARE = {"ray.get", "ray.wait", "asyncio.wait"}
# (file, function) -> what limits the wait instead.
ALLOWED = {
    ("actors/dispatcher.py", "_send"): "Dispatcher.read ends a call for which no engine finishes anything",
    ("actors/dispatcher.py", "_listen"): "Dispatcher.read ends a call for which no engine finishes anything",
    ("actors/engine_repair.py", "until_up"): "the start of an engine has a limit",
    ("actors/weight_transfer/client.py", "find_dead"): "ray.wait, which has a limit, said that the answer is there",
    ("actors/weight_transfer/client.py", "_ask"): "ray.wait, which has a limit, said that the answer is there",
    ("actors/learner_group.py", "publish"): "RayLearner._next_of has a limit for each chunk",
    ("actors/learner_group.py", "_unless_failed"): "both that it waits for have limits of their own",
    ("cluster/start.py", "_learner"): "the start of each engine has a limit of its own",
    ("cluster/doctor/probe.py", "ask_nodes"): "ray.wait, which has a limit, said that the answer is there",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(call: ast.Call) -> str:
    """`rank.score.remote(x)` -> "remote"; `asyncio.wait(x)` -> "asyncio.wait"; `within(x)` -> "within"."""
    function = call.func
    if isinstance(function, ast.Attribute):
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        return (
            f"{owner}.{function.attr}" if owner in ("ray", "asyncio") and function.attr != "remote" else function.attr
        )
    return function.id if isinstance(function, ast.Name) else ""


def has_limit(call: ast.Call) -> bool:
    name = name_of(call)
    return name.removeprefix("asyncio.") in LIMITED or any(keyword.arg == "timeout" for keyword in call.keywords)


def unlimited(node: ast.AST, names: set[str]) -> bool:
    """Whether what a `.remote(...)` call gave, or one of `names`, is in this expression without a limit around it."""
    if isinstance(node, ast.Lambda) or (isinstance(node, ast.Call) and has_limit(node)):
        return False
    if isinstance(node, ast.Call) and name_of(node) == "remote":
        return True
    if isinstance(node, ast.Name) and node.id in names:
        return True
    return any(unlimited(child, names) for child in ast.iter_child_nodes(node))


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions in it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def offences(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, function) of every wait that has no limit."""
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        nodes = list(own_nodes(function))
        names = {
            target.id
            for node in nodes
            if isinstance(node, ast.Assign) and unlimited(node.value, set())
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in nodes:
            waits = node.value if isinstance(node, ast.Await) else node.iter if isinstance(node, ast.AsyncFor) else None
            if waits is not None and unlimited(waits, names):
                yield node.lineno, function.name
            if isinstance(node, ast.Call) and name_of(node) in BARE and not has_limit(node):
                yield node.lineno, function.name


def offences_below(root: Path) -> list[str]:
    found = []
    for path in sorted(path for package in ("actors", "cluster") for path in (root / package).rglob("*.py")):
        place = path.relative_to(root).as_posix()
        for line, function in offences(ast.parse(path.read_text(encoding="utf-8"))):
            if (place, function) not in ALLOWED:
                found.append(f"{place}:{line}: {function} waits without a limit; see actors.watched.answer_of")
    return found


def test_every_wait_on_ray_has_a_limit() -> None:
    assert offences_below(ROOT) == []


def test_what_is_allowed_is_there() -> None:
    for place, function in ALLOWED:
        names = {n.name for n in ast.walk(ast.parse((ROOT / place).read_text())) if isinstance(n, Function)}
        assert function in names, f"{place} has no {function} any more: remove it from ALLOWED"


@pytest.mark.parametrize(
    "body",
    [
        "await actor.f.remote()",
        "x = (await actor.f.remote(1))[0]",
        "await asyncio.gather(*[a.f.remote() for a in actors])",
        "call = actor.f.remote()\n    await call",
        "call = asyncio.ensure_future(actor.f.remote())\n    return await call",
        "async for x in actor.f.remote(): pass",
        "await asyncio.wait([waiting])",
        "await asyncio.wait_for(actor.f.remote(), 5)",
        "ray.get(x)",
        "return ray.wait([x], num_returns=1)",
    ],
)
def test_an_offender_is_seen(body: str, tmp_path: Path) -> None:
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "bad.py").write_text(f"async def f():\n    {body}\n")
    assert [line.split(": ", 1)[1] for line in offences_below(tmp_path)] == [
        "f waits without a limit; see actors.watched.answer_of"
    ]


@pytest.mark.parametrize(
    "body",
    [
        "await within(actor.f.remote(), 5, 's', 'w')",
        "await limited(actor.f.remote(), 5)",
        "await asyncio.gather(*[answer_of(a, a.f.remote()) for a in actors])",
        "call = actor.f.remote()\n    await within(call, 5, 's', 'w')",
        "call = asyncio.ensure_future(actor.f.remote())\n    await asyncio.wait([call], timeout=5)",
        "await self.each(lambda a: a.f.remote())",
        "actor.f.remote()",
        "ray.get(x, timeout=5)",
    ],
)
def test_a_wait_with_a_limit_is_none(body: str) -> None:
    assert list(offences(ast.parse(f"async def f():\n    {body}\n"))) == []


def test_every_actor_of_a_run_tells_where_it_hangs() -> None:
    """Each class below a `ray.remote` in `actors` is `Watched`, with a thread for it."""
    for path in sorted((ROOT / "actors").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            marks = [ast.unparse(mark) for mark in node.decorator_list] if isinstance(node, ast.ClassDef) else []
            for mark in marks:
                if mark.startswith("ray.remote"):
                    assert "concurrency_groups=WATCH" in mark, f"{path}: {mark}"
                    assert "Watched" in [ast.unparse(base) for base in node.bases], f"{path}: {node.name}"
