"""What a Ray cluster that is started on this machine would find: free ports or not, and who may give it commands."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.check import Check, read_text
from cluster.doctor.storage import write_error

# Ray's defaults, each with the option of `ray start` that changes it.
PORTS = {6379: "--port", 8265: "--dashboard-port", 10001: "--ray-client-server-port"}
TOKEN_FILE = Path(".ray") / "auth_token"


def examine_ray(*, has_cluster: bool, environ: Mapping[str, str] = os.environ, home: Path | None = None) -> list[Check]:
    """has_cluster: the user named a cluster, so a token is needed now and not only later."""
    token = find_token(environ, home or Path.home())
    return [judge_ports(port_holders(PORTS)), judge_token(environ.get("RAY_AUTH_MODE", ""), token, has_cluster)]


# ------------------------------------------------------------ ports


def is_free(port: int) -> bool:
    """Whether a server could listen on this port now."""
    with socket.socket() as probe:
        # Servers set this option too: a connection that was closed a minute ago must not count as a busy port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def port_holders(ports: Iterable[int]) -> dict[int, str]:
    """For each port: "" when it is free, else the program that has it, as far as this user may see."""
    busy = {port: not is_free(port) for port in ports}
    lines = _command_lines() if any(busy.values()) else []
    return {port: ray_part_on(port, lines) or "another program" if taken else "" for port, taken in busy.items()}


def _command_lines() -> list[str]:
    return [read_text(path).replace("\0", " ") for path in Path("/proc").glob("[0-9]*/cmdline")]


def ray_part_on(port: int, command_lines: Iterable[str]) -> str:
    """Which part of a running Ray was told to use this port; empty for none."""
    for line in command_lines:
        words = line.split()
        if f"--gcs_server_port={port}" in words and "gcs_server" in line:
            return "a Ray head"
        if f"--port={port}" in words and "ray/dashboard/dashboard.py" in line:
            return "a Ray dashboard"
        if f"--port={port}" in words and "ray.util.client.server" in words:
            return "a Ray Client server"
    return ""


def judge_ports(holders: Mapping[int, str]) -> Check:
    """A run that starts its own Ray takes any free ports; these are what `ray start --head` wants."""
    found = ", ".join(f"{port} {f'used by {holder}' if holder else 'free'}" for port, holder in holders.items())
    foreign = [port for port, holder in holders.items() if holder and "Ray" not in holder]
    if not foreign:
        return Check("ports", "ok", found)
    options = " ".join(f"{PORTS.get(port, '--port')}=N" for port in foreign)
    return Check("ports", "warning", found, f"for a cluster with its head here: `ray start --head {options}`")


# ------------------------------------------------------------ the token


@dataclass(frozen=True)
class Token:
    """Where a token was found, never the token itself.

    problem: why the place that was named cannot be used, or why Ray cannot write a token where there is none. A Ray
    that a run starts on this machine wants one, unless RAY_AUTH_MODE says otherwise.
    """

    source: str = ""
    problem: str = ""
    open_to_others: bool = False


def find_token(environ: Mapping[str, str], home: Path) -> Token:
    """Looks for the token in the same order as Ray."""
    if environ.get("RAY_AUTH_TOKEN"):
        return Token("RAY_AUTH_TOKEN")
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / TOKEN_FILE
    if read_text(path):
        return Token(str(path), open_to_others=_open_to_others(path))
    if named:
        return Token(problem=f"RAY_AUTH_TOKEN_PATH names {path}, which holds no token")
    error = write_error(path.parent)
    return Token(problem=f"Ray cannot write its token to {path} ({error})" if error else "")


def token_obstacle(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> str:
    """Why a Ray that a run starts on this machine would have no token, with the remedy; "" when it would have one."""
    check = judge_token(environ.get("RAY_AUTH_MODE", ""), find_token(environ, home or Path.home()), has_cluster=False)
    return f"{check.name}: {check.found}; {check.remedy}" if check.status == "missing" else ""


def _open_to_others(path: Path) -> bool:
    """Whether users outside the owner's group may read the file. A folder on its path that they may not enter protects
    it."""
    readable = bool(path.stat().st_mode & 0o004)
    return readable and all(folder.stat().st_mode & 0o001 for folder in path.absolute().parents)


def judge_token(mode: str, token: Token, has_cluster: bool) -> Check:
    """Anyone who reaches the ports of a cluster without a token can run any program on its nodes."""
    name, told = "ray token", f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE not set"
    make = "make one with `ray get-auth-token --generate` and give every node the same"
    if mode.lower() not in ("", "token"):
        closed = mode.lower() != "disabled" or not has_cluster
        remedy = "" if closed else "anyone who reaches the cluster can run programs on it: unset RAY_AUTH_MODE"
        return Check(name, "ok" if closed else "warning", told, remedy)
    if token.problem:
        remedy = "set HOME to a folder that this user may write to, or RAY_AUTH_TOKEN to a long random word"
        if "RAY_AUTH_TOKEN_PATH" in token.problem:
            remedy = f"{make}; or unset RAY_AUTH_TOKEN_PATH"
        return Check(name, "missing", f"{told}; {token.problem}", remedy)
    if token.open_to_others:
        return Check(name, "warning", f"{told}; {token.source}, which others may read", f"`chmod 600 {token.source}`")
    if token.source:
        return Check(name, "ok", f"{told}; a token in {token.source}")
    if mode or has_cluster:
        return Check(name, "warning", f"{told}; no token", f"{make}; a cluster without is open to its whole network")
    return Check(name, "ok", f"{told}; no token yet, and none needed before a cluster of several machines")
