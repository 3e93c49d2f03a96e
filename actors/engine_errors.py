"""The true reason of an engine's failure, which may be known only to one of vLLM's own worker processes.

vLLM's executor says no more than that a worker failed, and the reason is in that worker's log. So each process of an
engine also writes the errors that vLLM logs to one file of the engine, in short.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray

from actors.engine_processes import (
    forget_names_of_shared_memory,
    forget_names_of_sockets,
    names_of_shared_memory,
    remove_orphans,
)

# Names the file, to the worker processes too, which inherit it.
VARIABLE = "DPHRL_ENGINE_ERRORS"
MAX_REASON_CHARACTERS = 600


class EngineStartError(RuntimeError):
    """A rollout engine did not start. One line: which one, on which node, and vLLM's reason."""


class ErrorFileHandler(logging.Handler):
    """Appends a line to the engine's file for each error that vLLM logs in this process."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        line = json.dumps({"process": os.getpid(), "reason": in_a_line(error or record.getMessage())}) + "\n"
        # The file is gone once the engine is up.
        with suppress(FileNotFoundError):
            file = os.open(os.environ.get(VARIABLE, ""), os.O_WRONLY | os.O_APPEND)
            # A line is short, and written at once, so that those of several processes do not mix.
            os.write(file, line.encode())
            os.close(file)


def keep_errors() -> None:
    """From now on, errors that vLLM logs in this process are kept where `engine_start` finds them; twice is once."""
    logger = logging.getLogger("vllm")
    if not any(isinstance(handler, ErrorFileHandler) for handler in logger.handlers):
        logger.addHandler(ErrorFileHandler())


@contextmanager
def engine_start(index: int) -> Iterator[None]:
    """Raises EngineStartError for whatever the start of this engine raises in it."""
    with tempfile.NamedTemporaryFile(prefix="dphrl-engine-", suffix=".errors") as file:
        os.environ[VARIABLE] = file.name
        before = names_of_shared_memory()
        try:
            yield
        except Exception as error:
            remove_orphans(before)
            reason = reason_in_worker(file.read().decode("utf-8", "replace")) or in_a_line(error)
            raise EngineStartError(
                f"rollout engine {index} on node {ray.util.get_node_ip_address()} did not start: {reason} "
                f"(vLLM's output is there in {_output_file()})"
            ) from error
        finally:
            forget_names_of_shared_memory()
            forget_names_of_sockets()
            del os.environ[VARIABLE]


def reason_in_worker(lines: str) -> str | None:
    """The first error of another process among `lines` of the engine's file; later ones are consequences of it."""
    errors = [json.loads(line) for line in lines.splitlines()]
    return next((error["reason"] for error in errors if error["process"] != os.getpid()), None)


def in_a_line(error: BaseException | str) -> str:
    """`Type: message`, or the message, in one line that is not too long."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:MAX_REASON_CHARACTERS].rstrip(": ")


def _output_file() -> str:
    # Ray gives each of its processes a file for what it prints.
    try:
        return os.readlink("/proc/self/fd/1")
    except OSError:
        return "the logs of Ray"
