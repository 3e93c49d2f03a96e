"""Asks every node of a Ray cluster what `dphrl doctor` wants to know. It is a separate program, run by cluster.py.

    python -P probe.py < request.json

The request: `address`; `path`, a file that every node should see, or null; `packages`, whose versions to tell;
`timeout_s`. The answer: lines of JSON, each printed as soon as it is known, so that they remain if the program is
stopped: `{"nodes": [...]}`, `{"id", "versions", "clock"}`, `{"id", "file"}`, `{"id", "error"}`, `{"failed"}`.

It runs as a program and is not imported, because Ray then sends NodeProbe to the nodes by value. So a node that has no
dphrl, or another version of it, answers too.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

# A network disk may show a new file to other machines only after seconds.
PATIENCE_S = 5.0
NUM_CLOCK_READINGS = 5
CLOCK_TIMEOUT_S = 5.0


def package_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Python's version and those of the packages, None for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


class NodeProbe:
    """Runs on one node. It reserves no processor, so that a busy cluster answers too."""

    def versions(self, packages: Sequence[str]) -> dict[str, str | None]:
        """Versions of the packages on this node, as `package_versions` gives them."""
        return package_versions(packages)

    def now(self) -> float:
        """This node's clock, in seconds since 1970 (UTC)."""
        return time.time()

    def read(self, path: str, patience_s: float) -> dict[str, Any]:
        """The file's content or why there is none, and whether this node may write beside it."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                with open(path, encoding="utf-8") as file:
                    return {"content": file.read(), "writable": os.access(os.path.dirname(path), os.W_OK)}
            except OSError as error:
                if time.monotonic() > deadline:
                    return {"content": None, "problem": error.strerror or str(error)}
            time.sleep(0.2)


def clock_offset(readings: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """From (before, there, after) readings: by how much the clock there is ahead, and the uncertainty, in seconds.

    The reading that took the least time bounds the offset best, because the clock was read at some moment in between.
    """
    before, there, after = min(readings, key=lambda reading: reading[2] - reading[0])
    return there - (before + after) / 2, (after - before) / 2


def tell(**answer: Any) -> None:
    """Print one line of the answer."""
    print(json.dumps(answer), flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _clock(ray: Any, probe: Any) -> tuple[float, float] | None:
    """The clock's offset; None when the node is too slow, because the other nodes wait meanwhile."""
    readings: list[tuple[float, float, float]] = []
    with suppress(ray.exceptions.GetTimeoutError):
        for _ in range(NUM_CLOCK_READINGS):
            before = time.time()
            there = ray.get(probe.now.remote(), timeout=CLOCK_TIMEOUT_S)
            readings.append((before, there, time.time()))
    return clock_offset(readings) if readings else None


def ask_nodes(ray: Any, request: dict[str, Any], deadline: float) -> None:
    """Ask all nodes at once, so that a node that does not answer does not delay the others."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [
        {"id": node["NodeID"], "name": node.get("NodeName") or node["NodeManagerAddress"], "alive": node["Alive"]}
        for node in ray.nodes()
    ]
    tell(nodes=nodes)
    actor = ray.remote(num_cpus=0)(NodeProbe)
    probes, waiting = {}, {}
    for node in nodes:
        if node["alive"]:
            place = NodeAffinitySchedulingStrategy(node["id"], soft=False)
            probes[node["id"]] = probe = actor.options(scheduling_strategy=place).remote()
            waiting[probe.versions.remote(request["packages"])] = (node["id"], "versions")
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for answer in ready:
            node_id, what = waiting.pop(answer)
            try:
                if what == "file":
                    tell(id=node_id, file=ray.get(answer))
                    continue
                tell(id=node_id, versions=ray.get(answer), clock=_clock(ray, probes[node_id]))
            except Exception as error:
                tell(id=node_id, error=_one_line(error))
                continue
            if request["path"]:
                waiting[probes[node_id].read.remote(request["path"], PATIENCE_S)] = (node_id, "file")


def list_by_dashboard(address: str, timeout_s: float) -> None:
    """Tell what a dashboard knows: which nodes there are. Nothing is started on them."""
    from ray.util.state import list_nodes

    listed = list_nodes(address=address, timeout=max(1, round(timeout_s)))
    tell(nodes=[{"id": n.node_id, "name": n.node_name or n.node_ip, "alive": n.state == "ALIVE"} for n in listed])


def main() -> None:
    """Answer the request on standard input; a failure is told as `failed` and not raised."""
    request = json.load(sys.stdin)
    deadline = time.monotonic() + request["timeout_s"]
    try:
        import ray

        if request["address"].startswith(("http://", "https://")):
            list_by_dashboard(request["address"], request["timeout_s"])
            return
        ray.init(address=request["address"], log_to_driver=False, logging_level=logging.ERROR)
        ask_nodes(ray, request, deadline)
        ray.shutdown()
    except Exception as error:
        tell(failed=_one_line(error))


if __name__ == "__main__":
    main()
