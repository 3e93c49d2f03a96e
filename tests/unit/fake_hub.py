"""Stands in for the hub: a folder of repositories, each reached by its name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


class FakeHub:
    """root/org/name is a repository. offline: the hub cannot be reached. downloaded: per call, the files asked for.

    A copy downloaded before is there when a repository has a README.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        self.root = root
        self.offline = False
        self.loaded: list[tuple[str, str | None]] = []
        self.downloaded: list[Sequence[str]] = []
        self._build = datasets.load_dataset_builder
        monkeypatch.setattr(datasets, "load_dataset_builder", self._load_dataset_builder)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._snapshot_download)

    def add(self, name: str, files: dict[str, Sequence[object]], subsets: Sequence[str] = ()) -> None:
        """files: from a .jsonl file to its rows. subsets: each has the files in the folder of its name."""
        for file, rows in files.items():
            path = self.root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if subsets:
            configs = [{"config_name": subset, "data_dir": subset} for subset in subsets]
            (self.root / name / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")

    def _load_dataset_builder(self, name: str, subset: str | None) -> Any:
        if Path(name).is_absolute():
            return self._build(name, subset)
        if self.offline:
            raise ConnectionError("Couldn't reach the Hub\n(offline mode)")
        self.loaded.append((name, subset))
        folder = self.root / name
        builder = self._build(str(folder), subset)
        for files in builder.config.data_files.values():
            files[:] = [f"hf://datasets/{name}@0123abc/{Path(file).relative_to(folder)}" for file in files]
        return builder

    def _snapshot_download(
        self, name: str, *, repo_type: str, allow_patterns: Sequence[str] = (), local_files_only: bool = False
    ) -> str:
        assert repo_type == "dataset"
        if local_files_only and not (self.root / name / "README.md").exists():
            raise FileNotFoundError("not downloaded yet")
        self.downloaded.append(allow_patterns)
        return str(self.root / name)
