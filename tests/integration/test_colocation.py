"""A run on a GPU that engine and learner share, with all the real parts, on a machine without one.

Ray is told of a GPU that is not there, so that actors are placed, started and asked to take turns as on a real one.
vLLM and DeepSpeed then find no GPU and work on the CPU, where nothing moves when an engine sleeps or a state is put
away. tests/gpu has what can be seen on a GPU alone.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.device_turns import DeviceTurns
from cluster.launch import open_system
from dphrl.prepare import prepare
from dphrl.run import training_run
from dphrl.tracking.console import Console
from dphrl.tracking.metrics import step_problems
from dphrl.tracking.tracker import Tracker, read_metrics

pytestmark = pytest.mark.integration


def visible_gpus(actor: Any) -> str | None:
    return ray.get(actor.__ray_call__.remote(lambda self: os.environ.get("CUDA_VISIBLE_DEVICES")))


@pytest.fixture(scope="module")
def shared_run(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps with a checkpoint after the first; `events` has the moves of the turns, as the driver asks for them."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    config = make_config(
        cluster={"num_cpus": 2, "colocate": True},
        sync={"backend": "object_store"},  # by itself it would be ipc, between GPUs that are not there
        learner={"num_steps": 2, "zero_stage": 3},
        checkpoint={"every_steps": 1},
        # The base and the last model are evaluated too.
        evaluation={"num_samples": 2, "k": [1]},
    )
    events: list[str] = []
    began: list[str] = []
    ask, start = DeviceTurns._all, ray.init

    async def asked(turns: Any, role: str, actors: Any, what: str, call: Any) -> None:
        events.append(f"{role} {what}")
        await ask(turns, role, actors, what, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceTurns, "_all", asked)
        patch.setattr(ray, "init", lambda **options: start(num_gpus=1, **options))
        console = Console()
        prepared = prepare(config, console)
        with Tracker(folder, tensorboard=False) as tracker, open_system(config, prepared, inline=False) as opened:
            system: Any = opened
            ready = system.start

            async def noted(on_ready: Any) -> Any:
                def tell(line: str) -> None:
                    began.append(line)
                    on_ready(line)

                return await ready(tell)

            system.start = noted
            asyncio.run(training_run(config, prepared, system, tracker, console, resume=False))
            actors = {"worker": system._workers[0], "buffer": system._buffer, "rank": system._ranks[0]}
            gpus = {name: visible_gpus(actor) for name, actor in actors.items()}
            gpus["engine"] = visible_gpus(system._actors.engines[0])
    return {"folder": folder, "metrics": read_metrics(folder), "events": events, "began": began, "gpus": gpus}


def test_a_shared_gpu_trains_to_the_end_in_turns(shared_run: dict[str, Any]) -> None:
    assert [record["step"] for record in shared_run["metrics"]] == [1, 2]
    assert [problem for record in shared_run["metrics"] for problem in step_problems(record)] == []
    assert all(record["sync/logprob_gap_max"] < 1e-4 for record in shared_run["metrics"])
    asleep, full = "rollout engine sleep (level 2)", "learner rank take its state back"
    away, weights = "learner rank put its state away", "rollout engine wake up (weights)"
    cache, kept = "rollout engine wake up (kv_cache)", "rollout engine sleep (level 1)"
    synced = [away, weights, cache]
    saved = [kept, full]
    assert shared_run["events"] == [
        *(asleep, *synced),  # the start and the first sync; the reference stage and the base evaluation change nothing
        *(asleep, full, *synced, *saved),
        # Step 2 decodes with the weights that the engine kept.
        *(away, "rollout engine wake up (weights and kv_cache)", asleep, full, *synced, *saved),
        *(away, "rollout engine wake up (weights and kv_cache)"),  # the last evaluation
    ]


def test_the_engine_was_up_before_the_learner_began(shared_run: dict[str, Any]) -> None:
    up = [line.split(" up: ")[0].split(":")[0] for line in shared_run["began"]]
    assert up.index("rollout engine 0") < up.index("learner")


def test_who_sees_the_gpu(shared_run: dict[str, Any]) -> None:
    gpus = shared_run["gpus"]
    assert (gpus["rank"], gpus["engine"]) == ("0", "0")
    assert (gpus["worker"], gpus["buffer"]) == ("", "")


def test_checkpoints_of_a_shared_gpu_are_whole(shared_run: dict[str, Any]) -> None:
    folder: Path = shared_run["folder"] / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_1", "step_2"]
    assert (folder / "step_2" / "hf" / "model.safetensors").is_file()
