"""What of the working directory goes to the cluster: code and small files. Not secrets, not data and models unasked.

Ray packs the folder itself: it obeys every .gitignore in it and the patterns that it is given, and refuses a package
above the size of one of its messages. The files are counted here by Ray's own walk, so that what is counted is what
goes.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dphrl.config.loading import InputError

# Results, environments, history, caches: whole folders, whatever they hold.
RESULTS = (
    *(".git", ".venv", "venv", "runs", "**/__pycache__", "*.sqlite-journal", ".pytest_cache", ".mypy_cache"),
    *(".ruff_cache", ".hypothesis", ".ipynb_checkpoints", "node_modules", "/wandb", "/mlruns"),
)
# What logs in somewhere. An example of a file of variables is none.
SECRETS = (
    *(".env", ".env.*", "*.env", ".envrc", "!.env.example", "!.env.sample", "!.env.template", "!example.env"),
    *(".netrc", "_netrc", ".git-credentials", ".pypirc", ".npmrc", ".pgpass", ".htpasswd"),
    *(".ssh", ".aws", ".kube", ".gnupg", ".docker", ".azure", ".gcloud", ".ray"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "!*.pub", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks"),
)
# A private key's first line, whatever its file is called, and where it is looked for.
PRIVATE_KEY = re.compile(rb"^-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----\s*$", re.MULTILINE)
KEY_HEAD_BYTES = 16384
# Models, tables and archives, whatever their size.
DATA = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.ggml", "*.ckpt", "*.onnx", "*.h5", "*.hdf5", "*.msgpack"),
    *("*.parquet", "*.arrow", "*.feather", "*.orc", "*.sqlite", "*.sqlite3", "*.db", "*.duckdb", "*.npy", "*.npz"),
    *("*.jsonl.gz", "*.jsonl.zst", "*.json.gz", "*.csv.gz", "*.tar", "*.tar.gz", "*.tgz", "*.zip", "*.7z", "*.zst"),
)
# Texts that are data when they are large.
TEXTS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
LARGE_BYTES = 10 * 10**6
# So many large texts of a folder are left out by their ending: Ray compares every file with every pattern.
MANY_TEXTS = 20
# Worth a line that says what makes it so large: every node fetches it.
HEAVY_BYTES = 100 * 10**6
# What the zip file adds for each file, besides its name twice.
ZIP_ENTRY_BYTES = 130
NUM_NAMED = 5
# An entry that holds nearly all of its folder is named instead of it.
NEARLY_ALL = 0.9
# Ray's walk writes a line for each .gitignore that it reads.
_SILENT = logging.Logger("walk", logging.ERROR)


@dataclass(frozen=True)
class Upload:
    """excludes: patterns for Ray. files: what goes, by its path in the folder, with its bytes. data, secrets: what was
    left out as such. All in the words of .gitignore."""

    folder: Path
    excludes: tuple[str, ...]
    files: Mapping[str, int]
    data: Mapping[str, int]
    secrets: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Of the package, which Ray does not compress."""
        return sum(size + ZIP_ENTRY_BYTES + 2 * len(path.encode()) for path, size in self.files.items())

    def holds(self, path: str) -> bool:
        """Whether this file, or something in this folder, goes. path: as in `files`."""
        return path in self.files or any(file.startswith(f"{path}/") for file in self.files)

    def notes(self) -> list[str]:
        """Lines for who submits: what was left out, and what makes the package heavy."""
        lines = []
        if self.num_bytes > HEAVY_BYTES:
            lines.append(f"large, and every node fetches it: {largest(self.files)}; .gitignore leaves files out")
        if self.data:
            lines.append(
                f"not uploaded, as data or models: {largest(self.data)}; name them in the configuration by a relative "
                "path, or give --include PATTERN, to have them over there"
            )
        if self.secrets:
            lines.append(f"not uploaded, as secrets: {_some(self.secrets)}")
        return lines


def plan_upload(folder: Path, named: Sequence[str] = (), include: Sequence[str] = ()) -> Upload:
    """What goes of a folder.

    named: paths in it that the configuration names; data goes if it is one of them or in one of them. include: patterns
    of other data that is to go; secrets never do. Raises InputError for a folder that cannot be read, and for one that
    is larger than Ray takes.
    """
    wanted = [f"!/{_literal(path)}{end}" for path in named for end in ("", "/**")]
    wanted += [f"!{pattern.removeprefix('./')}" for pattern in include]
    found = _sizes(folder, [*RESULTS])
    large = _large_texts(found)
    is_data, is_secret = _matcher([*DATA, *large, *wanted]), _matcher(SECRETS)
    shown = {path: size for path, size in found.items() if not is_secret(path)}
    data = {path: size for path, size in shown.items() if is_data(path)}
    keys = [path for path in shown if path not in data and _is_private_key(folder / path)]
    files = {path: size for path, size in shown.items() if path not in data and path not in keys}
    # The last pattern that matches decides: what is wanted brings data back, not results or secrets.
    excludes = (*DATA, *large, *wanted, *RESULTS, *SECRETS, *(f"/{_literal(path)}" for path in keys))
    secrets = sorted([*keys, *(path for path in found if path not in shown)])
    upload = Upload(folder, excludes, files, data, tuple(secrets))
    limit = _limit_bytes()
    if upload.num_bytes >= limit:
        raise InputError(
            f"--working-dir {folder}: {len(files)} files of {size_text(upload.num_bytes)}, and Ray takes "
            f"{size_text(limit)}; the largest: {largest(files)}; leave them out by .gitignore, choose another "
            "--working-dir, or give --no-upload with paths that every node sees"
        )
    return upload


def size_text(num_bytes: float) -> str:
    """`700 MB`, in powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= 0.9995 * size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def largest(files: Mapping[str, int]) -> str:
    """The largest folders and files of these, largest first: `data/raw 1.2 GB, video.mp4 80 MB`.

    Of a folder whose bytes are nearly all in one entry, that entry is named.
    """
    sizes, children = Counter[PurePosixPath](), dict[PurePosixPath, set[PurePosixPath]]()
    for path, size in files.items():
        entry = PurePosixPath(path)
        sizes[entry] += size
        for parent in entry.parents:
            sizes[parent] += size
            children.setdefault(parent, set()).add(entry)
            entry = parent

    def told(entry: PurePosixPath) -> PurePosixPath:
        while inner := children.get(entry):
            first = max(inner, key=lambda child: sizes[child])
            if sizes[first] < NEARLY_ALL * sizes[entry]:
                break
            entry = first
        return entry

    top = sorted(children.get(PurePosixPath(), ()), key=lambda entry: (-sizes[entry], entry))
    named = [(f"{entry}/" if entry in children else f"{entry}", sizes[entry]) for entry in map(told, top[:NUM_NAMED])]
    rest = len(top) - len(named)
    return ", ".join(f"{name} {size_text(size)}" for name, size in named) + (f" and {rest} more" if rest > 0 else "")


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _sizes(folder: Path, excludes: list[str]) -> dict[str, int]:
    """The files that Ray would pack, by their path in the folder, with their bytes."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    found: dict[str, int] = {}
    root = folder.absolute()

    def take(path: Path) -> None:
        if path.is_file():
            if not os.access(path, os.R_OK):
                raise PermissionError(f"{path} cannot be read")
            found[path.relative_to(root).as_posix()] = path.stat().st_size

    try:
        excluding = [_get_excludes(root, excludes)]
        _dir_travel(root, excluding, take, include_gitignore=obeys_gitignore(), logger=_SILENT)
    except OSError as error:
        raise InputError(
            f"--working-dir {folder}: cannot be uploaded: {error}; leave it out by .gitignore, or make it readable"
        ) from None
    return found


def obeys_gitignore() -> bool:
    """Whether Ray's client leaves out what .gitignore names."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE

    return os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"


def _limit_bytes() -> int:
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    return int(GCS_STORAGE_MAX_SIZE)


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether a path is excluded by these patterns, by itself or with a folder above it, as Ray's walk has it."""
    from ray._private.thirdparty.pathspec import PathSpec

    spec = PathSpec.from_lines("gitwildmatch", patterns)

    def match(path: str) -> bool:
        entry = PurePosixPath(path)
        return any(spec.match_file(str(part)) for part in (entry, *entry.parents[:-1]))

    return match


def _large_texts(files: Mapping[str, int]) -> list[str]:
    """Patterns for the large texts: each by its path, many in one folder by their ending."""
    found: dict[tuple[PurePosixPath, str], list[str]] = {}
    for path, size in files.items():
        entry = PurePosixPath(path)
        if size >= LARGE_BYTES and entry.suffix in TEXTS:
            found.setdefault((entry.parent, entry.suffix), []).append(path)
    patterns = []
    for (parent, suffix), paths in found.items():
        if len(paths) > MANY_TEXTS:
            folder = "" if parent == PurePosixPath() else f"{_literal(str(parent))}/"
            patterns.append(f"/{folder}*{suffix}")
        else:
            patterns += [f"/{_literal(path)}" for path in paths]
    return patterns


def _is_private_key(path: Path) -> bool:
    with path.open("rb") as file:
        return PRIVATE_KEY.search(file.read(KEY_HEAD_BYTES)) is not None


def _literal(path: str) -> str:
    """A pattern that matches this path alone."""
    return "".join(f"\\{letter}" if letter in "\\*?[]!# " else letter for letter in path)
