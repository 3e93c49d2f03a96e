"""The folder that runs write to, the room in it, and the cache of models."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.check import GIB, Check

MIN_DISK_GIB = 5.0
TEST_BYTES = 2**20
# If a mebibyte takes longer than this to be safe on disk, checkpoints of gigabytes will delay the run.
SLOW_WRITE_S = 3.0
TRUE_WORDS = ("1", "true", "yes", "on")


@dataclass(frozen=True)
class WriteTest:
    """seconds: time to write, sync and read back. error: why that failed, "" if it did not."""

    folder: Path
    seconds: float = 0.0
    error: str = ""


def examine_storage(run_dir: Path, environ: Mapping[str, str] = os.environ) -> list[Check]:
    """run_dir need not exist yet, because a run makes it; then the nearest folder above it is examined."""
    folder, cache = nearest_folder(run_dir), hub_cache(environ)
    written = write_test(folder)
    num_models = sum(1 for _ in cache.glob("models--*")) if cache.is_dir() else 0
    return [
        judge_write(run_dir, written),
        *([] if written.error else [judge_disk(shutil.disk_usage(folder).free)]),
        judge_hub_cache(cache, not write_error(cache), num_models, is_offline(environ)),
        judge_caches({name: write_error(folder) for name, folder in own_caches(environ).items()}),
    ]


def nearest_folder(path: Path) -> Path:
    """The path itself, made absolute, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    return next((one for one in (path, *path.parents) if one.exists()), path)


def described(run_dir: Path, folder: Path) -> str:
    """run_dir in words, with the existing folder that it will be made in."""
    return str(folder) if run_dir.expanduser().absolute() == folder else f"{run_dir} (to be made in {folder})"


@contextmanager
def probe_file(folder: Path, content: bytes) -> Iterator[Path]:
    """A new file with this content, synced to disk; it is deleted afterwards.

    Its name is new to every node, so that no node answers from a cached list of the folder. Raises OSError.
    """
    path = folder / f".dphrl-doctor-{secrets.token_hex(8)}"
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        with suppress(OSError):
            path.unlink()


def write_error(folder: Path) -> str:
    """Why this user cannot make `folder` and files in it; "" when nothing prevents it."""
    try:
        with probe_file(nearest_folder(folder), b""):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def write_test(folder: Path) -> WriteTest:
    """Write a file of TEST_BYTES to `folder`, read it back, and measure the time."""
    content = secrets.token_bytes(TEST_BYTES)
    start = time.perf_counter()
    try:
        with probe_file(folder, content) as path:
            same = path.read_bytes() == content
            seconds = time.perf_counter() - start
    except OSError as error:
        return WriteTest(folder, error=error.strerror or str(error))
    return WriteTest(folder, seconds, "" if same else "what is read back is not what was written")


def judge_write(run_dir: Path, test: WriteTest) -> Check:
    """Whether the folder of runs can be written to, and fast enough."""
    where = described(run_dir, test.folder)
    if test.error:
        remedy = f"make {test.folder} a folder that this user may write to, or set run_dir to one"
        return Check("run folder", "missing", f"{where}: {test.error}", remedy)
    found = f"{where}: {TEST_BYTES // 2**20} MiB written and read back in {test.seconds * 1000:.0f} ms"
    if test.seconds > SLOW_WRITE_S:
        return Check("run folder", "warning", found, "checkpoints will take long: set run_dir to a faster disk")
    return Check("run folder", "ok", found)


def judge_disk(free_bytes: int) -> Check:
    """Whether there is room for runs."""
    gib = free_bytes / GIB
    if gib >= MIN_DISK_GIB:
        return Check("disk", "ok", f"{gib:.0f} GiB free for runs")
    return Check(
        "disk", "warning", f"{gib:.1f} GiB free for runs", "checkpoints need room: set run_dir to a larger disk"
    )


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where Hugging Face's libraries keep what they download, by the same rules that they follow."""
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether the variables of Hugging Face's libraries forbid them to download."""
    return any(environ.get(name, "").lower() in TRUE_WORDS for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def judge_hub_cache(cache: Path, writable: bool, num_models: int, offline: bool) -> Check:
    """Whether models can be downloaded to the cache, and how many are in it."""
    found = f"{cache}, models in it: {num_models}"
    if offline:
        return Check("model cache", "ok", f"{found}; offline, so only these and folders can be used")
    if not writable:
        remedy = "models cannot be downloaded: set HF_HOME to a folder that this user may write to"
        return Check("model cache", "warning", f"{found}; not writable", remedy)
    return Check("model cache", "ok", found)


def own_caches(environ: Mapping[str, str]) -> dict[str, Path]:
    """Folders below the user's home that a run writes to, by the variable that moves each elsewhere: dphrl's embedded
    models, vLLM's compiled graphs, Triton's kernels."""
    home = Path.home()
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    places = {
        "DPHRL_CACHE": home / ".cache" / "dphrl",
        "VLLM_CACHE_ROOT": cache / "vllm",
        "TRITON_CACHE_DIR": home / ".triton",
    }
    return {name: Path(environ.get(name) or place).expanduser() for name, place in places.items()}


def judge_caches(errors: Mapping[str, str]) -> Check:
    """errors: for each variable why its folder cannot be written, "" when it can."""
    barred = {name: error for name, error in errors.items() if error}
    if not barred:
        return Check("other caches", "ok", "can be written")
    found = ", ".join(f"the folder of {name}: {error}" for name, error in barred.items())
    remedy = f"set HOME, or {' and '.join(barred)}, to a folder that this user may write to"
    return Check("other caches", "warning", found, remedy)
