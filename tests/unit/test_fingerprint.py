"""Hashes of files, of code and of models: what they see, what they leave out, and what is remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

from dphrl.config.data import RewardConfig
from dphrl.fingerprint import blind_spots, changed_parts, code, files, hash_model, input_hashes, reward_modules
from dphrl.fingerprint.code import hash_code
from dphrl.fingerprint.files import hash_contents, memory_path
from dphrl.fingerprint.model import hub_revision
from dphrl.rewards.base import _GRADERS
from dphrl.types import Prompt

LARGE = files.MIN_REMEMBERED_BYTES


# ------------------------------------------------------------ files, and the memory of them


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty memory, in which files count that have just been written."""
    monkeypatch.setenv("DPHRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "CLOCK_GRAIN_NS", -1)
    monkeypatch.setattr(files, "_read_here", {})
    return tmp_path / "cache" / "hashes.json"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files whose content is read."""
    names: list[str] = []
    digest = files.hashlib.file_digest

    def noting(file: Any, kind: str) -> Any:
        names.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(files.hashlib, "file_digest", noting)
    return names


def write(path: Path, content: bytes = b"a" * LARGE) -> Path:
    path.write_bytes(content)
    return path


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_read_here", {})


def test_a_large_file_is_read_once(
    memory: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / "large"), write(tmp_path / "small", b"a")]
    first = hash_contents(paths)
    another_process(monkeypatch)
    assert hash_contents(paths) == first
    assert sorted(read) == ["large", "small", "small"]
    assert first[0] == files.hashlib.sha256(b"a" * LARGE).hexdigest()


def same_size(path: Path) -> None:
    write(path, b"b" * LARGE)


def same_size_and_time(path: Path) -> None:
    before = path.stat()
    write(path, b"b" * LARGE)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_in_its_place(path: Path) -> None:
    before = path.stat()
    other = write(path.with_name("other"), b"b" * LARGE)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("change", [same_size, same_size_and_time, put_in_its_place])
def test_a_changed_file_is_read_again(memory: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = write(tmp_path / "weights")
    before = hash_contents([path])
    change(path)
    assert hash_contents([path]) != before


def test_a_file_that_was_just_written_is_not_remembered(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CLOCK_GRAIN_NS", 2 * 10**9)
    hash_contents([write(tmp_path / "weights")])
    assert not memory.exists()


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"x": 1}', '{"x": [1, 2]}', "\0"])
def test_a_damaged_memory_is_replaced(
    memory: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    memory.parent.mkdir()
    memory.write_text(content)
    path = write(tmp_path / "weights")
    first = hash_contents([path])
    another_process(monkeypatch)
    assert hash_contents([path]) == first
    assert read == ["weights"]
    assert [*json.loads(memory.read_text())] == [str(path)]


def test_a_memory_that_cannot_be_written_costs_other_processes_a_reading(
    memory: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.parent.write_text("a file where the folder should be")
    path = write(tmp_path / "weights")
    assert hash_contents([path]) == hash_contents([path])
    assert read == ["weights"]
    another_process(monkeypatch)
    hash_contents([path])
    assert read == ["weights"] * 2


def test_the_memory_is_whole_whoever_writes_it(memory: Path, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"weights{i}", bytes([i]) * LARGE) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda path: hash_contents([path]), paths))
    found = json.loads(memory.read_text())
    assert 1 <= len(found) <= 12
    assert [path.name for path in memory.parent.iterdir()] == ["hashes.json"]


def test_the_memory_keeps_what_was_added_last(memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_REMEMBERED", 2)
    for i in range(4):
        hash_contents([write(tmp_path / f"weights{i}")])
    assert [Path(key).name for key in json.loads(memory.read_text())] == ["weights2", "weights3"]


def test_where_the_memory_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DPHRL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert memory_path() == Path("/home/somebody/.cache/dphrl/hashes.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert memory_path() == Path("/cache/dphrl/hashes.json")
    monkeypatch.setenv("DPHRL_CACHE", "/ours")
    assert memory_path() == Path("/ours/hashes.json")
    monkeypatch.setenv("DPHRL_CACHE", "~nobody-of-that-name/ours")
    assert memory_path() is None
    assert hash_contents([write(tmp_path / "weights")]) == [files.hashlib.sha256(b"a" * LARGE).hexdigest()]


# ------------------------------------------------------------ code

REWARD = '''
"""A reward."""
import json, reward_helpers
from reward_package.deep import rule
def judge(completion, answer):
    """Says whether it is right."""
    return rule(completion) == answer
'''


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a reward, a module beside it, a package with a module that the package's __init__ brings."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in {
        "users_reward.py": REWARD,
        "reward_helpers.py": "LIMIT = 3",
        "reward_package/__init__.py": "from .inner import rule",
        "reward_package/inner.py": "def rule(text):\n    return text.strip()",
        "reward_package/deep.py": "from . import rule",
        "reward_package/unused.py": "A = 1",
        "unrelated.py": "A = 1",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "old", "new", "counts"),
    [
        ("users_reward.py", "== answer", "!= answer", True),
        ("users_reward.py", "Says whether", "Tells whether", True),  # a judge's prompt may lie in a docstring
        ("users_reward.py", "import json, reward_helpers", "import json, reward_helpers  # ours", False),
        ("users_reward.py", "    return", "    # a comment\n\n    return", False),
        ("reward_helpers.py", "3", "4", True),
        ("reward_helpers.py", "3", "3.0", True),
        ("reward_helpers.py", "3", "(3)", False),
        ("reward_package/__init__.py", "inner import rule", "inner import rule as rule, rule as other", True),
        ("reward_package/inner.py", "strip", "lstrip", True),
        ("reward_package/unused.py", "1", "2", False),
        ("unrelated.py", "1", "2", False),
    ],
)
def test_a_rewards_code_is_its_module_and_what_it_imports(
    users: Path, file: str, old: str, new: str, counts: bool
) -> None:
    before = hash_code(["users_reward"])
    path = users / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    after = hash_code(["users_reward"])
    assert (after != before) == counts
    assert not {"users_reward", "reward_package", "reward_helpers"} & set(sys.modules), "nothing is run"


def test_imports_that_only_run_later_count_and_circles_end(users: Path) -> None:
    (users / "users_reward.py").write_text("def judge(c, a):\n    import reward_helpers\n")
    (users / "reward_helpers.py").write_text("import users_reward, no_such_module\nX = 1\n")
    before = hash_code(["users_reward"])
    (users / "reward_helpers.py").write_text("import users_reward, no_such_module\nX = 2\n")
    assert hash_code(["users_reward"]) != before


def test_an_installed_package_counts_by_its_version(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = users / "site-packages"
    (site / "judging").mkdir(parents=True)
    (site / "judging" / "__init__.py").write_text("def judge(c, a): return True")
    (site / "judging-1.0.dist-info").mkdir()
    metadata = site / "judging-1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: judging\nVersion: 1.0\n")
    (site / "judging-1.0.dist-info" / "top_level.txt").write_text("judging\n")
    monkeypatch.syspath_prepend(str(site))
    (users / "users_reward.py").write_text("from judging import judge")

    def hashes() -> tuple[str, str]:
        code._release.cache_clear()  # each call is a process of its own
        return hash_code(["users_reward"]), hash_code(["judging"])

    before = hashes()
    (site / "judging" / "__init__.py").write_text("def judge(c, a): return False")
    edited = hashes()
    # Code that somebody edits in place is seen where the reward itself lies there.
    assert (edited[0] == before[0], edited[1] == before[1]) == (True, False)
    metadata.write_text("Metadata-Version: 2.1\nName: judging\nVersion: 1.1\n")
    assert hashes()[0] != before[0]


@pytest.mark.parametrize("name", ["math", "sys", "json", "xml.dom", "no_such_module"])
def test_every_module_that_is_asked_for_has_a_hash_of_its_own(name: str) -> None:
    assert len({hash_code([name]), hash_code([name]), hash_code(["decimal"]), hash_code([])}) == 3


def test_compiled_code_counts_by_its_file(users: Path) -> None:
    path = users / f"compiled_reward{EXTENSION_SUFFIXES[0]}"
    path.write_bytes(b"one")
    before = hash_code(["compiled_reward"])
    path.write_bytes(b"two")
    assert hash_code(["compiled_reward"]) != before


def test_a_users_reward_is_in_the_fingerprint(users: Path, make_config: Any, tiny_dir: str) -> None:
    config = make_config(reward={"name": "users_reward:judge"})
    before = input_hashes(config, tiny_dir, [])
    (users / "users_reward.py").write_text(REWARD.replace("==", "!="))
    assert changed_parts(before, input_hashes(config, tiny_dir, [])) == ["reward code"]


def own_modules(reward: str) -> set[str]:
    """Modules of dphrl whose code counts for a reward."""
    read: list[str] = []
    todo = list(reward_modules(RewardConfig(name=reward)))
    while todo:
        name = todo.pop()
        digest, imported = code._own(name)
        if digest and name not in read:
            read.append(name)
            todo += imported
    return {name.removeprefix("dphrl.") for name in read}


@pytest.mark.parametrize("reward", _GRADERS)
def test_our_own_rewards_count_with_what_decides_their_verdicts(reward: str) -> None:
    modules = own_modules(reward)
    assert f"rewards.{reward}" in modules
    assert (
        modules
        >= {
            "math_answer": {"rewards.math_child", "rewards.extraction", "rewards.math_compare", "sandbox.process"},
            "sql_execution": {"rewards.sql_child", "rewards.sql_compare", "rewards.sql_parse", "sandbox.sqlite_policy"},
            "factorization": {"tiny.task", "types"},
        }[reward]
    )
    others = {f"rewards.{other}" for other in _GRADERS if other != reward}
    assert not modules & (others | {"rewards.score_file", "rewards.base"})
    assert not [module for module in modules if module.partition(".")[0] in ("config", "tracking", "own_code")]


def test_our_own_docstrings_do_not_count() -> None:
    plain = code.ast.parse("class A:\n    x = 1\n\ndef f():\n    return 'text'\n")
    told = code.ast.parse(
        '"""M."""\nclass A:\n    "A."\n    x = 1\n    "x."\n\ndef f():\n    "F."\n    return "text"\n'
    )
    other = code.ast.parse("class A:\n    x = 1\n\ndef f():\n    return 'other'\n")
    shapes = [code._shape(tree, keep_docstrings=False) for tree in (plain, told, other)]
    assert shapes[0] == shapes[1] != shapes[2]
    assert code._shape(told, keep_docstrings=True) != shapes[0]


def test_the_hash_is_that_of_another_process_too() -> None:
    program = "from dphrl.fingerprint.code import hash_code; print(hash_code(['dphrl.rewards.math_answer']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hash_code(["dphrl.rewards.math_answer"])


# ------------------------------------------------------------ data


def sql_prompts(folder: Path, gold: str = "SELECT 1") -> list[Prompt]:
    answers = [json.dumps({"db": str(folder / f"{name}.sqlite"), "gold_sql": gold}) for name in "aab"]
    return [Prompt(f"p{i}", "question", (1, i), answer, "data") for i, answer in enumerate(answers)]


def test_databases_count_by_content_and_not_by_place(make_config: Any, tiny_dir: str, tmp_path: Path) -> None:
    config = make_config()
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        for name in "ab":
            (folder / f"{name}.sqlite").write_text(name)
    before = input_hashes(config, tiny_dir, sql_prompts(tmp_path / "one"))
    assert input_hashes(config, tiny_dir, sql_prompts(tmp_path / "two")) == before
    assert changed_parts(before, input_hashes(config, tiny_dir, sql_prompts(tmp_path / "two", "SELECT 2"))) == [
        "prompts"
    ]
    (tmp_path / "two" / "b.sqlite").write_text("other rows")
    assert changed_parts(before, input_hashes(config, tiny_dir, sql_prompts(tmp_path / "two"))) == ["databases"]
    (tmp_path / "two" / "b.sqlite").unlink()
    assert changed_parts(before, input_hashes(config, tiny_dir, sql_prompts(tmp_path / "two"))) == ["databases"]


@pytest.mark.parametrize("answer", ["{1, 2}", "{}", '{"db": 1, "gold_sql": 2}', '{"db": "x"}', "[1]", ""])
def test_answers_of_other_tasks_are_hashed_as_they_are(make_config: Any, tiny_dir: str, answer: str) -> None:
    one, other = ([Prompt("p", "question", (1,), text, "data")] for text in (answer, f"{answer} "))
    assert changed_parts(input_hashes(make_config(), tiny_dir, one), input_hashes(make_config(), tiny_dir, other)) == [
        "prompts"
    ]


# ------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("model-00001-of-00002.safetensors", "model weights"),
        ("model.safetensors.index.json", "model weights"),
        ("config.json", "model weights"),
        ("modeling_mine.py", "model weights"),
        ("tokenizer.json", "tokenizer"),
        ("spiece.model", "tokenizer"),
        ("special_tokens_map.json", "tokenizer"),
        ("added_tokens.json", "tokenizer"),
        ("tekken.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
        ("chat_template.json", "tokenizer"),
        ("additional_chat_templates/tool_use.jinja", "tokenizer"),
        ("generation_config.json", "generation settings"),
        ("README.md", None),
        ("optimizer/state.safetensors", None),
    ],
)
def test_each_file_of_a_model_belongs_to_a_part(tmp_path: Path, file: str, part: str | None) -> None:
    (tmp_path / "config.json").write_text("{}")
    seen = [hash_model(str(tmp_path))]
    for content in ("one", "two"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
        seen.append(hash_model(str(tmp_path)))
    assert changed_parts(seen[0], seen[1]) == changed_parts(seen[1], seen[2]) == ([part] if part else [])


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A cache in the hub's layout; call it with the commit that `main` is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"

    def set_main(commit: str) -> None:
        for path in (repository / "refs", repository / "snapshots" / commit):
            path.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit / "config.json").write_text("{}")

    return set_main


def test_a_hub_model_is_its_commit(
    hub_cache: Callable[[str], None], make_config: Any, prompts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = "1" * 40, "2" * 40
    hub_cache(one)
    assert hub_revision("org/name") == one
    before = input_hashes(make_config(), "org/name", prompts)
    assert blind_spots("org/name") == []
    hub_cache(two)
    changed = changed_parts(before, input_hashes(make_config(), "org/name", prompts))
    assert changed == ["model weights", "tokenizer", "generation settings"]


def test_a_hub_model_of_unknown_revision_is_told(hub_cache: Callable[[str], None], tiny_dir: str) -> None:
    assert hub_revision("org/other") is None
    assert hub_revision("org/no--name") is None  # not a name that the hub has
    assert hash_model("org/other") != hash_model("org/third")
    (note,) = blind_spots("org/other")
    assert note.startswith("NOTE: org/other is not in this machine's Hugging Face cache")
    assert blind_spots(tiny_dir) == []
