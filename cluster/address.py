"""Which Ray cluster a run joins, and whether anything answers where it should be. Imports no Ray."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443, "ray": 10001}


def joined_cluster(address: str, environ: Mapping[str, str]) -> str | None:
    """The cluster that a run with this `cluster.address` joins; None if it starts one on this machine."""
    if address == "auto":
        address = environ.get("RAY_ADDRESS") or "local"
    return None if address == "local" else address


def is_dashboard(address: str) -> bool:
    """Whether an address is the URL of a dashboard."""
    return address.startswith(("http://", "https://"))


def host_and_port(address: str) -> tuple[str, int] | None:
    """What to connect to, to see whether anything is there; None for `auto` and for text that cannot be read."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None


def unreachable(host: str, port: int, timeout_s: float) -> str:
    """Why nothing answers there, "" if something does. Worth asking first: Ray itself would try for over a minute."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return f"nothing answers at {host}:{port} ({error.strerror or error})"
    return ""
