"""Machines of their own, as far as the network goes: Ray nodes in network namespaces, joined by a bridge.

Each node has an address and a link that can be cut or made slow. What they share is the machine's clock, its memory and
its files. It needs root and the programs of iproute2; other networks of the machine are neither seen nor changed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.integration.test_cluster import ROOT, node_environment

# A node that does not answer is dead for Ray after about so long here.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
PORT = 6379
# Two equal nodes: which one the learner gets is chance.
CPUS = {"first": 2, "second": 2}


def obstacle() -> str:
    """Why no namespaces can be made here; "" where they can."""
    for program in ("unshare", "nsenter", "ip", "tc"):
        if shutil.which(program) is None:
            return f"no {program} here"
    probe = "ip link add name v1 type veth peer name v2 && ip link add name b1 type bridge && ip link set v1 master b1"
    done = subprocess.run(["unshare", "--net", "sh", "-c", probe], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no network namespaces with a bridge here: {done.stderr.strip()}"


class Network:
    """Hosts on one bridge. A namespace lives as long as a process is in it; its links go with it."""

    def __init__(self, hosts: list[str]) -> None:
        self._holders = {name: subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) for name in ["", *hosts]}
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(hosts, start=1)}
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        outside = os.readlink("/proc/self/ns/net")
        wait_until(lambda: outside not in self._namespaces(), "namespaces", 10)
        self.do("", "ip link add name bridge type bridge", "ip link set dev bridge up")
        self.do("", "ip addr add 10.77.0.254/24 dev bridge")
        for name, address in self.addresses.items():
            self.do("", f"ip link add name {name} type veth peer name eth0 netns {self._holders[name].pid}")
            self.do("", f"ip link set dev {name} master bridge", f"ip link set dev {name} up")
            self.do(name, "ip link set lo up", f"ip addr add {address}/24 dev eth0", "ip link set eth0 up")
            # Leads nowhere, but by it programs see which address is theirs.
            self.do(name, "ip route add default via 10.77.0.254")

    def _namespaces(self) -> set[str]:
        return {os.readlink(f"/proc/{holder.pid}/ns/net") for holder in self._holders.values()}

    def inside(self, host: str) -> list[str]:
        """What a command begins with to run on that host."""
        return ["nsenter", f"--net=/proc/{self._holders[host].pid}/ns/net"]

    def do(self, host: str, *commands: str) -> None:
        for command in commands:
            subprocess.run([*self.inside(host), *command.split()], check=True, capture_output=True, text=True)

    def cut(self, host: str) -> None:
        self.do("", f"ip link set dev {host} down")

    def join(self, host: str) -> None:
        self.do("", f"ip link set dev {host} up")

    def mend(self, host: str) -> None:
        """Make the link whole, and as fast as it was."""
        self.join(host)
        for where, device in (("", host), (host, "eth0")):
            delete = [*self.inside(where), "tc", "qdisc", "del", "dev", device, "root"]
            subprocess.run(delete, capture_output=True, check=False)  # where it is fast, there is none

    def slow(self, host: str, rate: str) -> None:
        """Let no more through than `rate`, such as 8mbit, either way."""
        for where, device in (("", host), (host, "eth0")):
            self.do(where, f"tc qdisc add dev {device} root tbf rate {rate} burst 32kbit latency 400ms")

    def close(self) -> None:
        """End all that runs in these namespaces."""
        ours = self._namespaces() - {os.readlink("/proc/self/ns/net")}
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/net") in ours:
                    process.kill()
        for holder in self._holders.values():
            holder.kill()
            holder.wait()


def wait_until(true: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(OSError):
            if true():
                return
        time.sleep(0.1)
    raise AssertionError(f"waited {timeout_s:g} s for {what}")


class Cluster:
    """A head without CPUs, where the driver runs, and two nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = Network(["head", *CPUS])
        self.environment = node_environment(**HEALTH, RAY_worker_niceness="0", HF_HUB_OFFLINE="1")
        self.address = f"{self.network.addresses['head']}:{PORT}"
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        self._start("head", 0, "--head", f"--port={PORT}", "--include-dashboard=false")
        wait_until(lambda: self._ask("ray", "health-check", "--address", self.address) is not None, "the head", 60)
        self.restore()

    def restore(self, **cpus: int) -> None:
        """Mend what was cut or made slow, and start nodes in place of those that have ended.

        cpus: nodes to start anew, and with how many CPUs.
        """
        for host in CPUS:
            self.network.mend(host)
        for host in cpus:
            self.nodes[host].terminate()
            self.nodes[host].wait(30)

        def all_there() -> bool:
            for host in CPUS:
                # On a busy machine Ray itself gives up a node that takes more than 15 s to start.
                if host not in self.nodes or self.nodes[host].poll() is not None:
                    self._start(host, {**CPUS, **cpus}[host], f"--address={self.address}")
            return self._num_alive() == 1 + len(CPUS)

        wait_until(all_there, "all nodes", 180)

    def _start(self, name: str, num_cpus: int, *options: str) -> None:
        folder = self.folder / f"{name}{len(list(self.folder.glob(f'{name}*.log')))}"
        command = [
            *(*self.network.inside(name), "ray", "start", "--block", f"--temp-dir={folder}"),
            *(f"--node-ip-address={self.network.addresses[name]}", f"--num-cpus={num_cpus}"),
            *("--object-store-memory=200000000", *options),
        ]
        with folder.with_suffix(".log").open("w") as log:
            self.nodes[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _ask(self, *command: str) -> str | None:
        """What a command on the head prints; None when it fails."""
        whole = [*self.network.inside("head"), *command]
        done = subprocess.run(whole, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    def _num_alive(self) -> int:
        """Nodes, as the head has it."""
        program = (
            "from ray._raylet import GcsClient\n"
            f"nodes = GcsClient({self.address!r}).get_all_node_info().values()\n"
            "print(sum(node.state == 0 for node in nodes))"
        )
        said = self._ask(sys.executable, "-c", program)
        return int(said.split()[-1]) if said else 0

    def train(self, run: str, *settings: str) -> subprocess.Popen[bytes]:
        """A run whose driver is on the head."""
        command = [
            *(*self.network.inside("head"), sys.executable, "-m", "dphrl", "train", "demo-math"),
            *(f"run_dir={self.folder}", f"run_name={run}", f"cluster.address={self.address}", *settings),
        ]
        with (self.folder / f"{run}.txt").open("a") as output:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def said(self, run: str) -> str:
        return (self.folder / f"{run}.txt").read_text(errors="replace")

    def actors(self, name: str) -> list[str]:
        """Actors of a run that are on that node."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.nodes[name].pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    title = " ".join(process.cmdline())
                    if match := re.match(r"ray::(?:[\w-]+:)?(RolloutEngine|RewardWorker|LearnerRank)", title):
                        found.append(match[1])
        return found

    def hosts_of(self, run: str) -> tuple[str, str]:
        """The host of a run's learner, and the other one, on which there are engines."""
        on = {host: self.actors(host) for host in CPUS}
        (learner,) = [host for host in CPUS if "LearnerRank" in on[host]]
        (other,) = [host for host in CPUS if host != learner]
        assert "RolloutEngine" in on[other], f"{on}: {self.said(run)[-2000:]}"
        return learner, other

    def close(self) -> None:
        for node in self.nodes.values():
            node.terminate()
        psutil.wait_procs([psutil.Process(node.pid) for node in self.nodes.values() if node.poll() is None], timeout=10)
        self.network.close()
        for node in self.nodes.values():
            node.wait()
