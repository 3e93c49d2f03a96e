"""The program keeps to its own packages, with folders and other distributions of the same names about."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dphrl import own_code
from dphrl.config.algorithm import import_plugins
from dphrl.rewards.custom import load_reward

ROOT = Path(__file__).resolve().parents[2]
HOST = os.uname().nodename
# What a package of somebody else's does when it is loaded.
THEIRS = "raise SystemExit('theirs was loaded')"


def add_packages(folder: Path, *names: str, text: str = THEIRS) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    return folder


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A user's repository with packages of two of our names."""
    return add_packages(tmp_path / "theirs", "actors", "cluster")


def python(*arguments: str, path: list[Path], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def shown(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_program_starts_where_folders_of_its_names_come_first(theirs: Path) -> None:
    assert shown(python("-m", "dphrl", "version", path=[theirs, ROOT], cwd=theirs)) == "0.1.0"


def test_bare_folders_of_its_names_do_not_matter_either(tmp_path: Path) -> None:
    # Without an __init__.py they hide an installation that is found by a finder rather than by its place.
    for name in ("actors", "cluster"):
        (tmp_path / name).mkdir()
    assert shown(python("-m", "dphrl", "version", path=[tmp_path, ROOT], cwd=tmp_path)) == "0.1.0"


@pytest.mark.parametrize("initial", [THEIRS, None])
def test_a_child_finds_this_dphrl_beside_any_other(tmp_path: Path, initial: str | None) -> None:
    add_packages(tmp_path, *own_code.PACKAGES)
    if initial is None:
        (tmp_path / "dphrl" / "__init__.py").unlink()
    program = own_code.own_first("from dphrl.__main__ import main; main()")
    assert shown(python("-c", program, "version", path=[tmp_path], cwd=tmp_path)) == "0.1.0"


def test_the_users_own_modules_are_still_found(theirs: Path) -> None:
    (theirs / "my_rewards.py").write_text("")
    program = own_code.own_first(
        "from dphrl.own_code import pin; pin(); import actors, cluster, my_rewards; "
        "print(actors.__path__[0], cluster.__path__[0], my_rewards.__file__)"
    )
    found = shown(python("-c", program, path=[theirs])).split()
    assert found == [str(ROOT / "actors"), str(ROOT / "cluster"), str(theirs / "my_rewards.py")]


def test_a_users_package_of_a_taken_name_is_told_to_change_it() -> None:
    for load in (lambda: load_reward("cluster.rewards:same", {}), lambda: import_plugins(["actors.mine"])):
        with pytest.raises(ValueError, match="is the program's own package here: give yours another name"):
            load()
    with pytest.raises(ValueError, match="put its folder on PYTHONPATH"):
        load_reward("nowhere.rewards:same", {})


def test_a_foreign_package_that_is_loaded_already_is_named(tmp_path: Path) -> None:
    add_packages(tmp_path, "actors", text="")
    program = own_code.own_first("import actors; from dphrl.own_code import pin; pin()")
    last = python("-P", "-c", program, path=[tmp_path]).stderr.strip().splitlines()[-1]
    assert f"ForeignCodeError: actors: a process on {HOST} has loaded {tmp_path / 'actors'} under that name" in last
    assert f"take {tmp_path} off PYTHONPATH" in last


def test_what_an_actor_found_is_told_from_other_failures() -> None:
    told = "The actor died because of an error raised in its creation task, ray::X\n  File x\n"
    found = own_code.foreign_code_told_by(RuntimeError(told + "dphrl.own_code.ForeignCodeError: actors: there"))
    assert str(found) == "actors: there"
    assert own_code.foreign_code_told_by(RuntimeError(told + "ValueError: dphrl.own_code.ForeignCodeError: x")) is None


# ------------------------------------------------------------ another distribution in the same place


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Where pip might have put the three packages."""
    place = tmp_path / "site-packages"
    for name in own_code.PACKAGES:
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    return place


def test_a_package_installed_over_ours_is_named(installed: Path) -> None:
    (installed / "cluster" / "__init__.py").write_text(THEIRS)
    record = installed / "Cluster-1.4.1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: cluster\nVersion: 1.4.1\n")
    (record / "RECORD").write_text("cluster/__init__.py,,\n")
    refused = python("-P", "-m", "dphrl", "version", path=[installed])
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    place = installed / "cluster" / "__init__.py"
    assert line.startswith(f"dphrl: error: cluster: {place} on {HOST} is not the program's own")
    assert "cluster 1.4.1 was installed over it" in line
    assert "pip install --force-reinstall --no-deps" in line


def test_a_package_uninstalled_from_beside_ours_is_named(installed: Path) -> None:
    (installed / "actors" / "__init__.py").unlink()
    refused = python("-P", "-m", "dphrl", "version", path=[installed])
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert f"actors: {installed / 'actors' / '__init__.py'} on {HOST} is gone" in line


def test_untouched_packages_are_ours(installed: Path) -> None:
    assert shown(python("-P", "-m", "dphrl", "version", path=[installed])) == "0.1.0"


# ------------------------------------------------------------ Ray's workers, and children of an engine


@pytest.mark.parametrize("moved", [False, True])
def test_the_hook_of_a_worker_needs_no_import_by_name(installed: Path, tmp_path: Path, moved: bool) -> None:
    """Sent as Ray sends it, to a process that would find others under all three names."""
    import ray.cloudpickle

    folder = add_packages(tmp_path / "uploaded", *own_code.PACKAGES)
    if moved:
        # A node that has its packages elsewhere than the driver.
        moment, own_code.HOME = own_code.HOME, Path("/no/such/place")
        try:
            hook = own_code.worker_hook()
        finally:
            own_code.HOME = moment
    else:
        hook = own_code.worker_hook()
    sent = base64.b64encode(ray.cloudpickle.dumps(hook)).decode()
    program = (
        f"import base64, ray.cloudpickle; ray.cloudpickle.loads(base64.b64decode('{sent}'))(); "
        "import actors.waiting, cluster; print(actors.__path__[0], cluster.__path__[0])"
    )
    found = shown(python("-P", "-c", program, path=[folder, installed], cwd=folder)).split()
    home = installed if moved else ROOT
    assert found == [str(home / "actors"), str(home / "cluster")]


def test_workers_are_told_only_where_something_hides_our_packages(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = str(own_code.HOME)
    monkeypatch.setattr(sys, "path", [str(tmp_path), home, str(theirs)])
    monkeypatch.chdir(ROOT)
    assert not own_code.is_hidden_from_workers()
    monkeypatch.chdir(theirs)
    assert own_code.is_hidden_from_workers()
    monkeypatch.chdir(tmp_path)
    assert not own_code.is_hidden_from_workers()
    monkeypatch.setattr(sys, "path", [str(theirs), home])
    assert own_code.is_hidden_from_workers()
    bare = tmp_path / "bare"
    (bare / "cluster").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [home])
    monkeypatch.chdir(bare)
    assert own_code.is_hidden_from_workers()


SPAWNS = """
import multiprocessing, subprocess, sys
from dphrl.own_code import lead, pin

def look():
    import actors
    print(actors.__path__[0], flush=True)

if __name__ == "__main__":
    pin()
    lead()
    child = multiprocessing.get_context("spawn").Process(target=look)
    child.start()
    child.join()
    subprocess.run([sys.executable, "-m", "actors.waiting"], check=True)
"""


def test_children_of_an_engine_find_our_packages_first(theirs: Path) -> None:
    (theirs / "program.py").write_text(SPAWNS)
    assert shown(python(str(theirs / "program.py"), path=[theirs, ROOT], cwd=theirs)) == str(ROOT / "actors")


def test_what_hides_our_packages_goes_behind_and_nothing_else_moves(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    home = str(own_code.HOME)
    for given, wanted in (
        ([str(theirs), "a", home, str(other)], ["a", home, str(other), str(theirs)]),
        (["a", home, str(theirs)], ["a", home, str(theirs)]),
        (["a", str(theirs), "b"], ["a", "b", home, str(theirs)]),
    ):
        monkeypatch.setattr(sys, "path", [*given])
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(theirs), str(other)]))
        monkeypatch.setenv("PYTHONSAFEPATH", "")
        own_code.lead()
        assert sys.path == wanted
        assert os.environ["PYTHONPATH"] == os.pathsep.join([str(other), home])


def test_a_users_reward_runs_in_its_child_beside_any_other_dphrl(tmp_path: Path) -> None:
    add_packages(tmp_path, "dphrl")
    add_packages(tmp_path, "cluster", text="TOLERANCE = 0")
    (tmp_path / "my_rewards.py").write_text("def same(completion, answer):\n    return completion == answer\n")
    program = own_code.own_first(
        "from dphrl.rewards.custom import CustomGrader; grader = CustomGrader('my_rewards:same', {}, 30.0); "
        "print([str(r.status) for r in grader.grade([('4', '4'), ('5', '4')])]); grader.close()"
    )
    assert shown(python("-c", program, path=[tmp_path], cwd=tmp_path)) == "['correct', 'wrong']"


# ------------------------------------------------------------ what a submission would upload


def test_a_folder_that_would_hide_the_program_is_told_from_a_copy_of_it(tmp_path: Path) -> None:
    assert own_code.hides_program(tmp_path) is None
    assert own_code.hides_program(ROOT) is None
    (tmp_path / "dphrl").mkdir()
    assert own_code.hides_program(tmp_path) == tmp_path / "dphrl"
    (tmp_path / "dphrl" / "own_code.py").touch()
    assert own_code.hides_program(tmp_path) is None
