"""Finds the files of a data set: one file, a pattern of files, a folder, or a data set on the hub."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dphrl.config.data import DatasetConfig
from dphrl.data.readers import can_read, file_kind, known_suffixes

logger = logging.getLogger(__name__)

# "name", "org/name" or "org/name:subset": what else is not there cannot be on the hub either.
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^/]+)?")
# How people, and Spider and BIRD, call the part that the hub calls validation.
_VALIDATION = ("dev", "val", "valid")
# What `datasets` keeps beside the data.
_DESCRIPTIONS = frozenset({"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """path: where the file lies. shown: its name in messages, which for a hub data set begins with the set's name."""

    path: str
    shown: str


def find_files(path: str, dataset: DatasetConfig) -> list[SourceFile]:
    """The files that `path` means, in order of their names; those of a folder or hub data set for `dataset.split`.

    path: dataset.path, expanded. Raises ValueError, one line with the remedy, when there is none or one cannot be read.
    """
    where = f"data set {dataset.name}"
    if os.path.isfile(path):
        if not can_read(path):
            raise ValueError(f"{where}: file {path} is of no known kind; convert it to one of {known_suffixes()}")
        return [SourceFile(path, path)]
    folder, _, subset = path.partition(":")
    if os.path.isdir(path) or os.path.isdir(folder):
        folder, subset = (path, "") if os.path.isdir(path) else (folder, subset)
        return _files_of_folder(folder, subset, dataset)
    if glob.has_magic(path):
        matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
        if not matches:
            raise ValueError(f"{where}: no file matches {path}; correct its path")
        return [found for match in matches for found in find_files(match, dataset)]
    if "://" in path:
        raise ValueError(f"{where}: {path} is a URL; download the file, or name a hub data set as org/name")
    if can_read(path):
        raise ValueError(f"{where}: file {path} does not exist; correct its path")
    if not _HUB_NAME.fullmatch(path):
        raise ValueError(
            f"{where}: path {path!r} is neither a file ({known_suffixes()}) nor a folder nor a hub data set's name; "
            "correct its path"
        )
    return _files_of_hub(path, dataset)


def _files_of_folder(folder: str, subset: str, dataset: DatasetConfig) -> list[SourceFile]:
    """Split and subset are told from the files' names or from a README, as the hub does it."""
    # The library takes some names for its own: a folder called "json" has to be given with its whole path.
    root = os.path.abspath(folder)
    saved = None
    try:
        saved = None if subset else _saved_splits(Path(root))
        splits = saved or _splits(root, subset)
    # The library's errors have no common base class.
    except Exception as error:
        raise ValueError(
            f"data set {dataset.name}: folder {folder} cannot be read as a data set: {_reason(error)}; give its files "
            f"({known_suffixes()})"
        ) from error
    files = _of_split(splits, folder, dataset)
    found = [SourceFile(file, os.path.join(folder, os.path.relpath(file, root))) for file in files]
    for file in found:
        if not can_read(file.path):
            raise ValueError(
                f"data set {dataset.name}: folder {folder} has {file.shown} for its data, which is of no known kind; "
                f"convert it to one of {known_suffixes()}"
            )
    if not saved:
        _warn_of_other_kinds(splits, folder, dataset)
    return found


def _saved_splits(root: Path) -> dict[str, list[str]] | None:
    """From each split's name to its files, of a folder that `save_to_disk` wrote; None for any other folder.

    Such a folder names its splits and files itself. To go by the files' names would take a split "train_hard" for a
    part of "train", and add the copies that `map` and `filter` of `datasets` leave beside the data.
    """
    splits, state = root / "dataset_dict.json", root / "state.json"
    if splits.is_file():
        return {name: _saved_files(root / name / "state.json")[0] for name in json.loads(splits.read_text())["splits"]}
    if not state.is_file():
        return None
    files, split = _saved_files(state)
    # A data set on its own has no splits, so that the setting's default means all of it.
    return {"train": files} if split is None else {"train": files, split: files}


def _saved_files(state: Path) -> tuple[list[str], str | None]:
    """The files of one saved data set, and the name of the split that it was, if it was one."""
    saved = json.loads(state.read_text())
    return [str(state.with_name(file["filename"])) for file in saved["_data_files"]], saved.get("_split")


def _warn_of_other_kinds(splits: Mapping[str, Sequence[str]], folder: str, dataset: DatasetConfig) -> None:
    """The library takes the files of one kind only, and says nothing of the others beside them."""
    taken = {Path(file) for files in splits.values() for file in files}
    kinds = {file_kind(path.name) for path in taken}
    beside = {path for parent in {path.parent for path in taken} for path in parent.iterdir()}
    others = sorted(path.name for path in beside - taken if file_kind(path.name) not in (None, *kinds))
    others = [name for name in others if name not in _DESCRIPTIONS]
    if others:
        logger.warning(
            "Data set %s: %s in %s is of another kind than its data and is not read; name the files in path to read it",
            *(dataset.name, ", ".join(others[:3]), folder),
        )


def _files_of_hub(path: str, dataset: DatasetConfig) -> list[SourceFile]:
    """Downloads the files of the split, and no others.

    They are read here and not by `datasets`, which guesses types: "007" among numbers becomes 7, and a text that looks
    like a date becomes one.
    """
    name, _, subset = path.partition(":")
    try:
        root, splits = _hub_splits(name, subset)
    # The hub client's errors have no common base class: connection, offline mode, unknown name.
    except Exception as error:
        raise ValueError(
            f"data set {dataset.name}: {path!r} could not be loaded from the hub: {type(error).__name__}: "
            f"{_reason(error)}; check the name and the connection, or give a file"
        ) from error
    files = _of_split(splits, path, dataset)
    if root is None:
        root = _download(name, files, dataset)
    found = [SourceFile(os.path.join(root, file), f"{name}/{file}") for file in files]
    if unknown := [file.shown for file in found if not can_read(file.path)]:
        raise ValueError(
            f"data set {dataset.name}: {unknown[0]} is of no known kind ({known_suffixes()}); download and convert it"
        )
    return found


def _hub_splits(name: str, subset: str) -> tuple[str | None, dict[str, list[str]]]:
    """The files of each split, relative to the repository, and the folder they are in if the hub cannot be reached
    and they were downloaded before."""
    from huggingface_hub import snapshot_download

    try:
        # "hf://datasets/org/name@revision/data/train.parquet"
        splits = _splits(name, subset)
        return None, {split: [url.split("@")[1].partition("/")[2] for url in urls] for split, urls in splits.items()}
    # The errors of a lost connection have no common base class.
    except Exception:
        try:
            root = snapshot_download(name, repo_type="dataset", local_files_only=True)
        except Exception:
            root = None
        # The first error is the one that says what is wrong.
        if root is None:
            raise
    splits = _splits(root, subset)
    return root, {split: [os.path.relpath(file, root) for file in files] for split, files in splits.items()}


def _download(name: str, files: Sequence[str], dataset: DatasetConfig) -> str:
    from huggingface_hub import snapshot_download

    try:
        # With its README, which names the splits when the hub cannot be reached.
        patterns = [*map(glob.escape, files), "README.md"]
        return str(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:
        raise ValueError(
            f"data set {dataset.name}: {name} could not be downloaded from the hub: {type(error).__name__}: "
            f"{_reason(error)}; check the connection and the room on the disk"
        ) from error


def _splits(place: str, subset: str) -> dict[str, list[str]]:
    """From each split's name to its files. place: a folder or a name on the hub."""
    import datasets

    files = datasets.load_dataset_builder(place, subset or None).config.data_files
    if not files:
        # What `datasets` falls back to, without a connection, is a copy that it has already converted.
        raise FileNotFoundError(f"{place} has no data files")
    return {str(split): list(found) for split, found in files.items()}


def _of_split(splits: Mapping[str, list[str]], place: str, dataset: DatasetConfig) -> list[str]:
    split = dataset.split
    if split not in splits and split in _VALIDATION:
        split = "validation"
    if split not in splits:
        raise ValueError(
            f"data set {dataset.name}: {place} has no split {dataset.split!r}; it has {', '.join(splits)}; set split"
        )
    return splits[split]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
