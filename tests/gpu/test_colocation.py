"""Engine and learner on one real GPU: what sleeping frees, what the learner puts away, and that a run trains so.

Never run so far: no GPU was at hand. tests/unit/test_colocation.py and tests/integration/test_colocation.py have the
order of the turns, on CPUs.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.timeout(480),
]

GIB = 2**30
# Of an 80 GiB GPU this is 24 GiB, of which a small model leaves nearly all to the cache.
SHARE = 0.3


def used_gib() -> float:
    """Memory in use on the GPU by all processes."""
    free, total = torch.cuda.mem_get_info()
    return float(total - free) / GIB


@pytest.fixture(scope="module")
def shared_run(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three steps; `used` has (what was just done, GiB in use after it) in order."""
    for library in ("ray", "vllm", "deepspeed"):
        pytest.importorskip(library)
    from actors.device_turns import DeviceTurns
    from cluster.launch import open_system
    from dphrl.prepare import prepare
    from dphrl.run import training_run
    from dphrl.tracking.console import Console
    from dphrl.tracking.tracker import Tracker, read_metrics

    folder: Path = tmp_path_factory.mktemp("shared") / "run"
    config = make_config(
        model={"path": "smollm2-135m-instruct", "dtype": "bfloat16"},
        data={"train": {"name": "factor", "kind": "tiny", "limit": 24}, "max_prompt_tokens": 128},
        cluster={"colocate": True},
        rollout={"gpu_memory_utilization": SHARE, "max_tokens": 64},
        learner={"num_steps": 3, "lr": 1e-5, "micro_batch_tokens": 4096, "zero_stage": 3},
        checkpoint={"every_steps": 2},
        algorithm={"divergence": "none"},
    )
    used: list[tuple[str, float]] = []
    ask = DeviceTurns._all

    async def asked(turns: Any, role: str, actors: Any, what: str, call: Any) -> None:
        await ask(turns, role, actors, what, call)
        used.append((f"{role} {what}", used_gib()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceTurns, "_all", asked)
        console = Console()
        prepared = prepare(config, console)
        with Tracker(folder, tensorboard=False) as tracker, open_system(config, prepared, inline=False) as system:
            asyncio.run(training_run(config, prepared, system, tracker, console, resume=False))
    print("\n".join(f"{gib:8.2f} GiB in use after: {what}" for what, gib in used))
    return {"metrics": read_metrics(folder), "used": used}


def test_it_trains_to_the_end(shared_run: dict[str, Any]) -> None:
    assert [record["step"] for record in shared_run["metrics"]] == [1, 2, 3]
    # In bfloat16; engines that had kept nothing of their weights would be off by nats.
    assert all(record["sync/logprob_gap_max"] < 0.5 for record in shared_run["metrics"])


def test_sleeping_frees_the_engines_share_and_waking_takes_it_again(shared_run: dict[str, Any]) -> None:
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    pairs = list(zip(shared_run["used"], shared_run["used"][1:], strict=False))
    slept = [before[1] - after[1] for before, after in pairs if after[0] == "rollout engine sleep (level 2)"]
    woke = [after[1] - before[1] for before, after in pairs if after[0].startswith("rollout engine wake up (kv_cache")]
    assert slept
    assert woke
    assert min(slept) > 0.7 * SHARE * total
    assert min(woke) > 0.7 * SHARE * total


def test_the_learner_puts_its_state_away(shared_run: dict[str, Any]) -> None:
    pairs = list(zip(shared_run["used"], shared_run["used"][1:], strict=False))
    freed = [before[1] - after[1] for before, after in pairs if after[0] == "learner rank put its state away"]
    # Masters and moments of 134.5 M parameters are 1.5 GiB.
    assert max(freed) > 1.2


@pytest.mark.parametrize("stage", [2, 3])
def test_masters_and_moments_leave_the_gpu_and_updates_go_on_as_before(stage: int) -> None:
    """Under DeepSpeed in a process of its own: see tests/unit/training_state_program.py, here on the GPU."""
    pytest.importorskip("deepspeed")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "unit" / "training_state_program.py"), "cuda"],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])[f"zero-{stage} bfloat16"]
    assert result["losses"] == result["undisturbed"]
    assert result["scores_while_away"]
    assert result["on_gpu_while_away"] == 0
