"""Keeps a process to this program's own packages, whatever else is called `actors` or `cluster`.

Others use these words too: a user's repository may hold a folder `cluster`, and PyPI has packages of both names. Python
takes the first of a name on its path, and on a cluster the user's uploaded folder comes first. So every process loads
the three packages from where this file lies before anybody asks for them; what is loaded is not looked for again.

Imports nothing but the standard library, since it comes before everything else.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.metadata import distributions
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

PACKAGES = ("dphrl", "actors", "cluster")
# A line of each package's __init__.py besides this one's: another distribution that is installed over ours replaces
# that file.
MARK = '__part_of__ = "dphrl"'
HOME = Path(__file__).absolute().parents[1]
# The program for `python -P -c` where the path begins with a folder that holds another `dphrl`: it is looked for where
# this file is beside it. The rest of the path stays as it was, for the user's modules.
OWN_AMONG_OTHERS = (
    "import os, sys; sys.argv[0] = 'dphrl'; path = sys.path[:]; "
    "sys.path[:] = [p for p in path if os.path.isfile(os.path.join(p, 'dphrl', 'own_code.py'))]; "
    "import dphrl; sys.path[:] = path; from dphrl.__main__ import main; main()"
)


class ForeignCodeError(ImportError):
    """A package of one of our names that is not ours. One line: which, where it lies, what to do."""


def pin() -> None:
    """Load `actors` and `cluster` from beside this package. Raises ForeignCodeError; twice is once."""
    for name in PACKAGES[1:]:
        loaded = sys.modules.get(name)
        if loaded is not None:
            _check_place(name, loaded)
            continue
        _check_mark(name)
        spec = PathFinder.find_spec(name, [str(HOME)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


def foreign_code_told_by(error: BaseException) -> ForeignCodeError | None:
    """The one that ended an actor's constructor: Ray tells it as the last line of a longer text."""
    head = f"{ForeignCodeError.__module__}.{ForeignCodeError.__qualname__}: "
    last = str(error).strip().rpartition("\n")[2]
    return ForeignCodeError(last.removeprefix(head)) if last.startswith(head) else None


def _check_place(name: str, module: ModuleType) -> None:
    ours = HOME / name
    place = Path(next(iter(getattr(module, "__path__", [])), getattr(module, "__file__", None) or "?"))
    if not (place.exists() and ours.exists() and place.samefile(ours)):
        raise ForeignCodeError(
            f"{name}: a process on {_host()} has loaded {place} under that name, which hides the program's own "
            f"package in {ours}; rename that folder, or take {place.parent} off PYTHONPATH"
        )
    _check_mark(name)


def _check_mark(name: str) -> None:
    initial = HOME / name / "__init__.py"
    repair = "`pip install --force-reinstall --no-deps` of dphrl repairs it"
    if not initial.is_file():
        raise ForeignCodeError(
            f"{name}: {initial} on {_host()} is gone, as after another package of that name was uninstalled; {repair}"
        )
    if MARK not in initial.read_text(encoding="utf-8", errors="replace").splitlines():
        raise ForeignCodeError(
            f"{name}: {initial} on {_host()} is not the program's own: {_owner(name)} was installed over it; "
            f"uninstall that, then {repair}"
        )


def _host() -> str:
    return os.uname().nodename


def _owner(name: str) -> str:
    """Which other distribution brought the package, as pip knows it."""
    for distribution in distributions():
        files = distribution.files or []
        if distribution.name != "dphrl" and any(file.as_posix() == f"{name}/__init__.py" for file in files):
            return f"{distribution.name} {distribution.version}"
    return f"another package `{name}`"


def name_taken(error: Exception) -> str:
    """What to do when a user's module failed to import something of one of our names; "" when it was not that."""
    name = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else ""
    return f"{name!r} is the program's own package here: give yours another name" if name in PACKAGES else ""


def own_first(program: str) -> str:
    """`program` for `python -c`, in which `dphrl` is this one."""
    home = str(HOME)
    # `dphrl` imports nothing itself: with this one place to look in, it is found there or not at all.
    return f"import sys; path = sys.path[:]; sys.path[:] = [{home!r}]; import dphrl; sys.path[:] = path; {program}"


def hides_program(folder: Path) -> Path | None:
    """What a Python that looks in `folder` first would take for this program; not a whole copy of it, which it is."""
    candidates = (folder / "dphrl", folder / "dphrl.py")
    return next((path for path in candidates if path.exists() and not (path / "own_code.py").is_file()), None)


def is_hidden_from_workers() -> bool:
    """Whether Ray's workers would find others: they look in this process's folder, and where its PYTHONPATH says."""
    return any(map(_hides, (os.getcwd(), *_before_home())))


def worker_hook() -> Callable[[], None]:
    """What a Ray worker is to run before it takes any work."""
    home, package, module = str(HOME), PACKAGES[0], __name__

    # Nested, so that it is sent whole and not by its name: finding it by name is what it is for.
    def keep_to_own_code() -> None:
        import importlib
        import sys
        from contextlib import suppress
        from pathlib import Path

        # The driver's place where the node has it; else what would be found there, but a whole dphrl.
        for place in [home, *sys.path]:
            if Path(place, package, "own_code.py").is_file():
                path = sys.path[:]
                sys.path[:] = [place]
                importlib.import_module(package)
                sys.path[:] = path
                break
        # Ray would take an error here for a worker that died by accident. Every actor checks too, and its error comes
        # to the driver as what it is.
        with suppress(ImportError):
            importlib.import_module(module).pin()

    return keep_to_own_code


def lead() -> None:
    """Have the processes that this one will start find our packages too: what would hide them comes after them.

    For a process that runs no user's code, whose modules might be found elsewhere after this.
    """
    before = _before_home()
    hiding = [entry for entry in before if _hides(entry)]
    found = [entry for entry in sys.path if entry not in hiding and entry != str(HOME)]
    place = sum(entry not in hiding for entry in before)
    sys.path[:] = [*found[:place], str(HOME), *found[place:], *hiding]
    named = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and not _hides(entry)]
    # An interpreter looks in its site-packages anyway, and in the standard library before them.
    if str(HOME) not in [*named, *site.getsitepackages(), site.getusersitepackages()]:
        named.append(str(HOME))
    os.environ["PYTHONPATH"] = os.pathsep.join(named)
    # `python -m` looks in the working directory first otherwise.
    os.environ["PYTHONSAFEPATH"] = "1"


def _before_home() -> list[str]:
    return sys.path[: sys.path.index(str(HOME))] if str(HOME) in sys.path else sys.path


def _hides(entry: str) -> bool:
    folder = Path(entry)
    return folder.absolute() != HOME and any(
        (folder / name).is_dir() or (folder / f"{name}.py").is_file() for name in PACKAGES
    )
