"""The inline learner, which makes steps with a checkpoint being written beside them or without.

python _checkpoint_child.py MODEL FOLDER GROUPS: an order is one line of JSON: saves, whether a checkpoint is begun
before the step. The answer says how long that and the step took, and how long the checkpoint went on afterwards.
"""

import asyncio
import json
import sys
import time
from pathlib import Path


async def main() -> None:
    model, folder, num_groups = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    import torch

    from dphrl.batch import make_batch
    from dphrl.config.schema import Config
    from dphrl.inline import InlineLearner
    from dphrl.saving import CheckpointSaver
    from tests.benchmarks._learner_child import group

    torch.set_num_threads(2)
    config = Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": {"name": "factor", "kind": "tiny"}, "evaluation": [], "max_prompt_tokens": 1024},
            "reward": {"name": "factorization"},
            "rollout": {"max_tokens": 1024},
            "algorithm": {"divergence": "none"},
            "learner": {"lr": 1e-7, "num_steps": 10**6},
            "checkpoint": {"keep": 1},
        }
    )
    learner = InlineLearner(config, model)
    saver = CheckpointSaver(config, learner, folder, {})
    batch = make_batch(config, 0, 0, [group(i, 115, 48, [1, 0, 1, 0]) for i in range(num_groups)], [])
    await learner.update(batch)
    print("answer " + json.dumps({"ready": 1}), flush=True)
    for step, line in enumerate(sys.stdin, start=1):
        began = time.perf_counter()
        if json.loads(line)["saves"]:
            await saver.save(step)
            await asyncio.sleep(0)  # the writing begins, as it does in a run while the next step is sampled
        copied = time.perf_counter()
        await learner.update(batch)
        done = time.perf_counter()
        await saver.finish()
        answer = {"seconds": done - began, "copy_s": copied - began, "left_s": time.perf_counter() - done}
        print("answer " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
