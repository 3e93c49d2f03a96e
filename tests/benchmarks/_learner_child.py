"""The inline learner of one checkout, which makes the steps that its parent asks for.

python _learner_child.py CHECKOUT MODEL CONFIG: CONFIG is JSON, sections to change. An order is one line of JSON:
groups, a list of [prompt tokens, completion tokens, scores]; rehearsal, a list of [prompt tokens, completion tokens,
rows]; memory, whether the pass measures memory, which makes it slower. The answer says how long the update took.
"""

import ctypes
import json
import random
import sys
import time


def main() -> None:
    checkout, model, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    import torch

    import dphrl.inline as module
    from dphrl.batch import make_batch
    from dphrl.config.schema import Config

    assert module.__file__.startswith(checkout), module.__file__
    torch.set_num_threads(2)
    base = {
        "model": {"path": model, "dtype": "float32"},
        "data": {"train": {"name": "factor", "kind": "tiny"}, "evaluation": [], "max_prompt_tokens": 1024},
        "reward": {"name": "factorization"},
        "rollout": {"max_tokens": 1024},
        "algorithm": {"divergence": "none"},
        "learner": {"lr": 1e-7},
    }
    config = Config.model_validate(
        {name: {**base.get(name, {}), **changes.get(name, {})} for name in {**base, **changes}}
    )
    learner = module.InlineLearner(config, model)
    # Gradients and the optimizer's state are there from the first step on, and stay: they are not what is compared.
    update(learner, make_batch(config, 0, 0, [group(0, 2, 2, [1, 0])], []))
    held = sum(p.numel() * p.element_size() for p in learner.engine.policy.parameters() if p.requires_grad)
    print("answer " + json.dumps({"ready": 1}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        groups = [group(i, *spec) for i, spec in enumerate(order["groups"])]
        rehearsal = [one for i, spec in enumerate(order["rehearsal"]) for one in samples(1000 + i, *spec)]
        batch = make_batch(config, 1, 0, groups, rehearsal)
        if order["memory"]:
            ctypes.CDLL(None).malloc_trim(0)
            before = status("VmRSS")
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak begins anew
        seconds, cpu_s = update(learner, batch)
        answer = {"seconds": seconds, "cpu_s": cpu_s, "num_tokens": batch.metrics["learner/num_tokens"]}
        if order["memory"]:
            peak = status("VmHWM")
            answer |= {"step_bytes": peak - before - held, "peak_bytes": peak}
        print("answer " + json.dumps(answer), flush=True)


def update(learner, batch) -> tuple[float, float]:
    """(seconds, seconds of all its threads on a processor): the second knows nothing of a busy machine."""
    import asyncio

    started, used = time.perf_counter(), time.process_time()
    asyncio.run(learner.update(batch))
    return time.perf_counter() - started, time.process_time() - used


def status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def group(number: int, num_prompt: int, num_completion: int, scores: list[int]):
    """Completions of one prompt with these scores, of tokens that the number and the place decide."""
    from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, RolloutGroup

    rng = random.Random(number)
    prompt = Prompt(f"p{number}", "", tuple(rng.randrange(100, 40_000) for _ in range(num_prompt)), "", "data")
    completions = tuple(
        Completion(
            prompt.prompt_id,
            i,
            tuple(rng.randrange(100, 40_000) for _ in range(num_completion)),
            "",
            (-10.0,) * num_completion,
            "stop",
            0,
        )
        for i in range(len(scores))
    )
    verdicts = {1: RewardResult(RewardStatus.CORRECT), 0: RewardResult(RewardStatus.WRONG)}
    return RolloutGroup(prompt, completions, tuple(verdicts[score] for score in scores))


def samples(number: int, num_prompt: int, num_completion: int, num_rows: int):
    from dphrl.types import ReferenceSample

    made = group(number, num_prompt, num_completion, [1] * num_rows)
    return [
        ReferenceSample(made.prompt.prompt_id, made.prompt.token_ids, one.token_ids, one.logprobs)
        for one in made.completions
    ]


if __name__ == "__main__":
    main()
