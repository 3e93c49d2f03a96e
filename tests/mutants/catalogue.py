"""The list of errors: the .yaml files of this folder, one per room.

An entry says in plain words what goes wrong (`error`), in which `file`, which `text` of it, that occurs exactly once,
`becomes` what, and which `tests` have to fail then: files, or single tests as pytest names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Mutant:
    room: str
    error: str
    file: str
    text: str
    becomes: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        """The name under which the file is imported."""
        return self.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def load(folder: Path = FOLDER) -> list[Mutant]:
    """Every entry of every list. Raises TypeError for one with a field too few or too many."""
    mutants = []
    for path in sorted(folder.glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or []:
            mutants.append(Mutant(path.stem, **{**entry, "tests": tuple(entry["tests"])}))
    return mutants


def select(mutants: Iterable[Mutant], pattern: str) -> list[Mutant]:
    """Those whose room, file or error matches: a shell pattern, or a part of it in any case."""

    def matches(text: str) -> bool:
        return fnmatch(text, pattern) or pattern.lower() in text.lower()

    return [m for m in mutants if matches(m.room) or matches(m.file) or matches(m.error)]


def mutated(mutant: Mutant, root: Path) -> str:
    """The file's text with the error in it. Raises ValueError when it cannot be put there."""
    path = root / mutant.file
    if not path.is_file():
        raise ValueError(f"{mutant.file} is not there")
    source = path.read_text(encoding="utf-8")
    if (count := source.count(mutant.text)) != 1:
        raise ValueError(f"{mutant.file}: {mutant.text!r} occurs {count} times, not once")
    changed = source.replace(mutant.text, mutant.becomes)
    if changed == source:
        raise ValueError(f"{mutant.file}: {mutant.text!r} becomes itself")
    compile(changed, mutant.file, "exec")
    return changed


def complaints(mutants: Sequence[Mutant], root: Path) -> list[str]:
    """What is wrong with the list itself; nothing when every error can be made and its tests are there."""
    found = []
    for mutant in mutants:
        try:
            mutated(mutant, root)
        except (ValueError, SyntaxError) as error:
            found.append(f"{mutant.room}: {error} ({mutant.error})")
        found += [
            f"{mutant.room}: {name} is not there ({mutant.error})"
            for name in mutant.tests
            if not (root / name.partition("::")[0]).is_file()
        ]
        if not mutant.tests:
            found.append(f"{mutant.room}: no tests ({mutant.error})")
    seen: set[tuple[str, str, str]] = set()
    for mutant in mutants:
        key = (mutant.file, mutant.text, mutant.becomes)
        if key in seen:
            found.append(f"{mutant.room}: listed twice ({mutant.error})")
        seen.add(key)
    return found
