"""The parent's side of a zygote, the process that workers are forked from: it starts the zygote, tells it to fork or
end a worker, and stops it."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from math import ceil

from dphrl.own_code import own_first
from dphrl.sandbox.zygote import END, FORK, take_frame
from dphrl.types import JsonDict

# On a busy machine imports may take long; a fork or a kill never does.
START_S = 120.0
COMMAND_S = 30.0
_STOP_S = 2.0
_MESSAGE_BYTES = 2**16
_BOOT = own_first(
    "import json; options = json.loads(sys.argv[1]); sys.path[:] = options['path']; "
    "from dphrl.sandbox.zygote import main; main(int(sys.argv[2]), options)"
)

_log = logging.getLogger(__name__)


class ZygoteLostError(Exception):
    """The zygote does not carry out a command: it died, or it cannot fork."""


class ZygoteStartError(RuntimeError):
    """The zygote failed before it could take commands."""


class Zygote:
    """One running zygote with at most one worker. The worker does not outlive the zygote, and the zygote does not
    outlive this process."""

    def __init__(self, factory: str, settings: JsonDict, limits: JsonDict) -> None:
        """Start the zygote and wait for its imports. Raises ZygoteStartError with the reason when it cannot start."""
        restricted = limits["restricted"]
        options = {
            "factory": factory,
            "settings": settings,
            "limits": limits,
            "path": [os.path.abspath(entry) for entry in sys.path],
            "start_s": ceil(START_S),
        }
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as errors:
            boot = ["-c", _BOOT, json.dumps(options), str(theirs.fileno())]
            # The interpreter itself may need this variable to start; workers do not keep it.
            loader = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
            self._process = subprocess.Popen(
                [sys.executable, *(["-I"] if restricted else []), *boot],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if restricted else None,
                stderr=errors if restricted else None,
                env=loader if restricted else None,
                pass_fds=(theirs.fileno(),),
                # Ctrl-C in a terminal is for the parent to handle.
                start_new_session=True,
            )
            theirs.close()
            try:
                ready = self._hear(START_S)[0]
                error = ready.get("error", "")
            except ZygoteLostError as loss:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                error = said[-1] if said else str(loss)
            except BaseException:
                self.stop()
                raise
        if error:
            self.stop()
            raise ZygoteStartError(f"the child process for {factory} cannot start: {error}")
        if ready["missing"]:
            _log.warning("workers of %s run without a system-call filter: %s", factory, ready["missing"])

    def fork(self) -> socket.socket:
        """End the present worker, if there is one, and return the connection to a new one. Raises ZygoteLostError."""
        descriptors = self._tell(FORK)[1]
        if not descriptors:
            raise ZygoteLostError("no worker came")
        worker = socket.socket(fileno=descriptors[0])
        inbox = bytearray()
        try:
            worker.settimeout(COMMAND_S)
            while (frame := take_frame(inbox, _MESSAGE_BYTES)) is None:
                if not (chunk := worker.recv(_MESSAGE_BYTES)):
                    raise ZygoteLostError("a worker died before its first item")
                inbox += chunk
            if error := json.loads(frame)["error"]:
                raise ZygoteLostError(f"a worker could not be limited: {error}")
            worker.setblocking(False)
        except (OSError, ZygoteLostError) as error:
            worker.close()
            raise ZygoteLostError(str(error)) from error
        return worker

    def end_worker(self) -> str:
        """Kill the worker, if there is one. Returns how it died: a signal ("SIGKILL" also for this kill) or an exit
        status, "" without a worker. Raises ZygoteLostError."""
        return str(self._tell(END)[0]["cause"])

    def stop(self) -> None:
        """End the zygote, and its worker with it."""
        self._control.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End the zygote, and its worker with it, now and from any thread. Who waits for them hears that they died."""
        self._process.kill()

    def _tell(self, command: bytes) -> tuple[JsonDict, list[int]]:
        try:
            self._control.send(command, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise ZygoteLostError(f"the child process is gone: {error}") from error
        return self._hear(COMMAND_S)

    def _hear(self, timeout_s: float) -> tuple[JsonDict, list[int]]:
        self._control.settimeout(timeout_s)
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, _MESSAGE_BYTES, 1)
        except OSError as error:
            raise ZygoteLostError(f"the child process does not answer: {error}") from error
        if not message:
            raise ZygoteLostError("the child process died")
        return json.loads(message), descriptors
