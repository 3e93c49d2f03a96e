"""Runs of which a part is killed, again and again, and what is left of them.

    python -m tests.integration.chaos --seeds 20

Each seed trains twelve steps of a demo on a cluster of two nodes on this machine. Meanwhile SIGKILL ends, at moments
that the seed decides: a rollout engine while it starts, generates and takes weights; a reward worker, and a child of
its sandbox (where the demo is SQL); the reference sampler; the owner of the reference buffer; a learner rank; and a
whole node, its raylet with all that runs there, in whose place another joins. Then it is looked at what came of it:

- every step is done, and each (prompt, sample) of the schedule was trained exactly once;
- engines and learner agreed after every sync;
- nothing is left: no process of the run, no shared memory.

Results are kept as JSON lines in --results, so that seeds can be run in pieces; those that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dphrl.tracking.tracker import read_metrics
from tests.integration.test_cluster import BIN, ROOT, free_port, node_environment

NUM_STEPS, NUM_PROMPTS, NUM_SAMPLES = 12, 32, 8


def with_two_engines(num_steps: int, num_prompts: int, num_samples: int) -> list[str]:
    """Settings of a small run whose parts can be lost: limits are short, and every completion is kept."""
    return [
        f"learner.num_steps={num_steps}",
        "learner.threads_per_rank=1",
        "learner.timeout_s=120",
        "rollout.num_engines=2",
        "rollout.threads_per_engine=1",
        "rollout.kv_cache_gib=1",
        "rollout.timeout_s=60",
        "sync.timeout_s=60",
        f"rollout.num_prompts={num_prompts}",
        f"rollout.num_samples={num_samples}",
        "reference.rows_per_step=8",
        "checkpoint.every_steps=2",
        "evaluation.num_samples=0",
        "data.evaluation=[]",
        f"tracking.samples_per_step={num_prompts * num_samples}",
        "tracking.tensorboard=false",
        "tracking.prometheus=false",
    ]


SETTINGS = [*with_two_engines(NUM_STEPS, NUM_PROMPTS, NUM_SAMPLES), "reference.prompts_per_chunk=32"]
DEMOS = {
    "demo-math": ["data.train={name: factor, kind: tiny, split: train, limit: 256}", "reference.threshold=6"],
    "demo-sql": ["data.train={name: league, kind: tiny_sql, split: train, limit: 256}", "reference.threshold=6"],
}
TIME_LIMIT_S = 420.0
POLL_S = 0.05
# A killed actor's successor has the same title; it takes longer than this to come.
AGAIN_AFTER_S = 2.0
GAP_BOUND = 5e-5  # sync.max_mean_logprob_gap in float32


@dataclass
class Kill:
    """One kill of the schedule. step: it is due when so many steps are done; -1 while the reference stage runs, -2
    while the engines start. delay_s: after that. happened: what was killed, and when; "" if nothing was there."""

    victim: str
    step: int
    delay_s: float
    happened: str = ""
    due: float | None = None


@dataclass
class Verdict:
    """What came of a seed. problems: empty for one that is as it should be."""

    seed: int
    demo: str
    seconds: float
    kills: list[str]
    problems: list[str] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)


def schedule(seed: int, demo: str) -> list[Kill]:
    """Every component once, at moments that are a function of the seed; engines three times."""
    choose = random.Random(seed)

    def at_some_step() -> tuple[int, float]:
        return choose.randrange(1, NUM_STEPS - 2), choose.uniform(0, 1.0)

    kills = [
        Kill("rollout", -2, choose.uniform(1, 12)),
        Kill("reference", -1, choose.uniform(0, 2)),
        *(Kill(victim, *at_some_step()) for victim in ("rollout", "rollout", "reward", "buffer", "learner", "node")),
    ]
    if demo == "demo-sql":
        kills.append(Kill("reward child", *at_some_step()))
    return kills


class Nodes:
    """A head and a second node, as `ray start` makes them; the second can be killed and comes again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.environment = node_environment(
            RAY_worker_niceness="0",  # as docs/operations.md says of a cluster that a user starts
            HF_HUB_OFFLINE="1",
            # A machine that is gone is noticed within seconds here.
            RAY_health_check_period_ms="1000",
            RAY_health_check_failure_threshold="3",
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        self._start_both()

    def _start_both(self) -> None:
        # The head has room for the learner, the graders and one engine; the other engine is on the second node.
        self.head = self._start("head", 2, "--head", f"--port={self._port}", "--include-dashboard=false")
        time.sleep(4)
        self.second = self._start("second", 1, f"--address={self.address}")
        time.sleep(3)

    def _start(self, name: str, num_cpus: int, *options: str) -> subprocess.Popen[bytes]:
        number = len(self._processes)
        command = [
            *(str(BIN / "ray"), "start", "--block", f"--temp-dir={self._folder / f'{name}{number}'}"),
            *(f"--num-cpus={num_cpus}", "--object-store-memory=200000000"),
            *(f"--dashboard-agent-listen-port={free_port()}", *options),
        ]
        with (self._folder / f"{name}{number}.log").open("w") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._processes.append(process)
        return process

    def descendants(self) -> list[psutil.Process]:
        """All processes that the nodes have started."""
        found: list[psutil.Process] = []
        for node in self._processes:
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(node.pid).children(recursive=True)
        return found

    def kill_second(self) -> None:
        """End the second node as a machine ends: all its processes at once. Another joins."""
        _kill(self.second)
        self.second = self._start("second", 1, f"--address={self.address}")

    def restart(self, down_s: float) -> None:
        """End both as machines end. After some time there is another cluster at the same address."""
        _kill(self.head)
        _kill(self.second)
        time.sleep(down_s)
        self._start_both()

    def close(self) -> None:
        """End all nodes; what they started ends with them."""
        trees = [
            process
            for node in self._processes
            if node.poll() is None
            for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
        ]
        for node in self._processes:
            if node.poll() is None:
                node.terminate()
        psutil.wait_procs(trees, timeout=20)
        for process in trees:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _kill(node: subprocess.Popen[bytes]) -> None:
    tree = [psutil.Process(node.pid)]
    with suppress(psutil.NoSuchProcess):
        tree += tree[0].children(recursive=True)
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


# The classes of the run's actors, as Ray titles their processes.
ROLES = {
    "RolloutEngine": "rollout",
    "RewardWorker": "reward",
    "LearnerRank": "learner",
    "ReferenceSampler": "reference",
    "BufferActor": "buffer",
}
TITLE = re.compile(rf"^ray::(?:[\w-]+:)?({'|'.join(ROLES)})(?:\.(\w+))?")


class Actors:
    """The processes of the run's actors, which Ray titles with class and method: all that ever were below the nodes."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._seen: dict[psutil.Process, str] = {}
        self._doing: dict[psutil.Process, str] = {}

    def look(self) -> None:
        """Note who is there now, and at what."""
        for process in self._nodes.descendants():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if found := TITLE.search(" ".join(process.cmdline())):
                    self._seen[process], self._doing[process] = ROLES[found[1]], found[2] or "idle"

    def some(self, role: str, choose: random.Random) -> psutil.Process | None:
        """One process of a role; None when there is none now."""
        there = [process for process, its in self._seen.items() if its == role and process.is_running()]
        return choose.choice(sorted(there, key=lambda process: process.pid)) if there else None

    def doing(self, process: psutil.Process) -> str:
        """What an actor was at when it was last looked at."""
        return self._doing.get(process, "idle")

    def left(self) -> list[str]:
        """Those that are still there."""
        return [f"{role} {process.pid}" for process, role in self._seen.items() if process.is_running()]


def strike(kill: Kill, actors: Actors, nodes: Nodes, choose: random.Random) -> bool:
    """Carry out a kill. Returns False when its victim is not there, so that it is tried again."""
    if kill.victim == "node":
        nodes.kill_second()
        kill.happened = "node"
        return True
    victim = actors.some(kill.victim.split()[0], choose)
    if victim is None:
        return False
    with suppress(psutil.NoSuchProcess):
        doing = actors.doing(victim)
        if kill.victim == "reward child":
            children = victim.children(recursive=True)
            if not children:
                return False
            victim = choose.choice(children)
        victim.kill()
        kill.happened = f"{kill.victim} ({doing})"
        return True
    return False


def run_seed(seed: int, keep: Path | None) -> Verdict:
    """One training with its kills, and the verdict on it."""
    demo = list(DEMOS)[seed % 2]
    kills, choose = schedule(seed, demo), random.Random(seed + 10**6)
    name, began = f"chaos{seed}-{secrets.token_hex(3)}", time.monotonic()
    before = left_files()
    with working_folder(keep, name) as folder, cluster(folder) as nodes:
        command = [
            *(sys.executable, "-m", "dphrl", "train", demo, *SETTINGS, *DEMOS[demo]),
            *(f"run_dir={folder}", f"run_name={name}", f"cluster.address={nodes.address}"),
        ]
        with (folder / "output.txt").open("w") as output:
            training = subprocess.Popen(
                command, env=nodes.environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
        actors = Actors(nodes)
        strike_until_done(training, kills, actors, folder / name, nodes, choose)
        problems = [*problems_of_end(training, folder), *problems_of_steps(folder / name)]
        problems += [f"{kill.victim} was never there to be killed" for kill in kills if not kill.happened]
        time.sleep(3)  # Ray ends the actors of a driver that is gone
        problems += [f"left behind: {who}" for who in actors.left()]
        events = Counter(event["event"] for event in read_events(folder / name))
    # Ray's own segments went with the cluster.
    problems += [f"left behind: {path}" for path in sorted(left_files() - before)]
    told = [f"{kill.happened or kill.victim} after step {max(kill.step, 0)}" for kill in kills]
    return Verdict(seed, demo, time.monotonic() - began, told, problems, dict(events))


def left_files() -> set[Path]:
    """Shared memory, and temporary files of dphrl and of vLLM, its sockets among them."""
    ours = re.compile(r"dphrl-.*|vllm.*|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
    temporary = {path for path in Path(tempfile.gettempdir()).iterdir() if ours.fullmatch(path.name)}
    return temporary | set(Path("/dev/shm").iterdir())


def strike_until_done(
    training: subprocess.Popen[bytes], kills: list[Kill], actors: Actors, run: Path, nodes: Nodes, choose: random.Random
) -> None:
    """Carry out the kills as their moments come, until the training ends or its time is over."""
    deadline = time.monotonic() + TIME_LIMIT_S
    last: dict[str, float] = {}
    while training.poll() is None and time.monotonic() < deadline:
        actors.look()
        done = len(read_metrics(run))
        said = (run.parent / "output.txt").read_text(errors="replace")
        for kill in kills:
            if kill.happened:
                continue
            if kill.due is None and reached(kill, done, said):
                kill.due = time.monotonic() + kill.delay_s
            again = last.get(kill.victim, 0) + AGAIN_AFTER_S
            due = kill.due is not None and time.monotonic() >= max(kill.due, again)
            if due and strike(kill, actors, nodes, choose):
                last[kill.victim] = time.monotonic()
        time.sleep(POLL_S)
    if training.poll() is None:
        training.send_signal(signal.SIGKILL)
        training.wait()


def reached(kill: Kill, num_done: int, said: str) -> bool:
    """Whether the moment from which a kill's delay counts has come."""
    if kill.step == -2:
        return True
    if kill.step == -1:
        return "first sync" in said
    return num_done >= kill.step


def problems_of_end(training: subprocess.Popen[bytes], folder: Path) -> Iterator[str]:
    if training.returncode:
        lines = (folder / "output.txt").read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith("dphrl:")] or lines[-3:]
        over = f"not done after {TIME_LIMIT_S:g} s" if training.returncode == -signal.SIGKILL else "exit status"
        yield f"{over} {training.returncode}: {' | '.join(told)[:400]}"


def problems_of_steps(run: Path) -> Iterator[str]:
    """Steps that are not there once, completions that are not there once, gaps beyond the bound."""
    records = read_metrics(run)
    if (steps := [record["step"] for record in records]) != list(range(1, NUM_STEPS + 1)):
        yield f"steps on record: {steps}"
    for record in records:
        if not record["sync/logprob_gap_mean"] <= GAP_BOUND:
            yield f"step {record['step']}: a mean gap of {record['sync/logprob_gap_mean']:.2g}"
    for step in range(1, NUM_STEPS + 1):
        path = run / "samples" / f"step_{step:06d}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        pairs = Counter((row["prompt_id"], row["sample_index"]) for row in rows)
        prompts = Counter(prompt for prompt, _ in pairs)
        if len(rows) != len(pairs) or list(prompts.values()) != [NUM_SAMPLES] * NUM_PROMPTS:
            yield f"step {step}: {len(rows)} completions, {len(pairs)} different ones of {len(prompts)} prompts"
        if any(row["policy_version"] != step - 1 for row in rows):
            yield f"step {step}: completions of other versions than {step - 1}"


def read_events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@contextmanager
def working_folder(keep: Path | None, name: str) -> Iterator[Path]:
    """Short, because sockets lie below it. keep: where it goes instead of being deleted."""
    folder = Path(tempfile.mkdtemp(prefix="dc-", dir="/tmp"))
    try:
        yield folder
    finally:
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for part in (name, "output.txt"):
                if (folder / part).exists():
                    shutil.move(str(folder / part), keep / (part if part == name else f"{name}.txt"))
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def cluster(folder: Path) -> Iterator[Nodes]:
    nodes = Nodes(folder)
    try:
        yield nodes
    finally:
        nodes.close()


def table(verdicts: list[Verdict]) -> str:
    """A Markdown table, one row a seed."""
    lines = ["| Seed | Demo | Seconds | Killed | Came of it |", "|---|---|---|---|---|"]
    for verdict in sorted(verdicts, key=lambda verdict: verdict.seed):
        came = "; ".join(verdict.problems) or "all steps once, nothing left"
        lines.append(
            f"| {verdict.seed} | {verdict.demo} | {verdict.seconds:.0f} | {', '.join(verdict.kills)} | {came} |"
        )
    return "\n".join(lines)


def main(say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.integration.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="seeds 0 .. N - 1 (default: 20)")
    parser.add_argument("--only", type=int, nargs="*", help="these seeds alone")
    parser.add_argument("--results", type=Path, default=Path("chaos.jsonl"), help="what is done already, and the rest")
    parser.add_argument("--keep", type=Path, help="keep the folders of runs that have problems here")
    arguments = parser.parse_args()
    lines = arguments.results.read_text().splitlines() if arguments.results.is_file() else []
    verdicts = {verdict["seed"]: Verdict(**verdict) for verdict in map(json.loads, lines)}
    for seed in range(arguments.seeds) if arguments.only is None else arguments.only:
        if seed not in verdicts:
            verdicts[seed] = run_seed(seed, arguments.keep)
            with arguments.results.open("a") as file:
                file.write(json.dumps(vars(verdicts[seed])) + "\n")
            say(f"seed {seed}: {'; '.join(verdicts[seed].problems) or 'well'} ({verdicts[seed].seconds:.0f} s)")
    say(table(list(verdicts.values())))
    good = sum(not verdict.problems for verdict in verdicts.values())
    say(f"{good} of {len(verdicts)}")
    return 0 if good == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
