"""The plain side of `rollout_overhead`: `vllm.LLM.generate` alone, with the engine actor's arguments and threads.

Run by path in a process of its own, whose environment has the variables of an engine's process.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from actors.vllm_settings import set_variables, start_vllm
from dphrl.config.schema import Config
from dphrl.data.schedule import completion_seed
from dphrl.prepare import Prepared, prepare
from dphrl.tracking.console import Console


def generate(llm: Any, config: Config, prepared: Prepared, order: dict[str, Any]) -> dict[str, Any]:
    """The same requests that the pool makes of these prompts, each with the same seed."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rollout, first = config.rollout, order["first"]
    prompts, params = [], []
    for prompt in prepared.prompts[first : first + order["count"]]:
        for sample_index in range(rollout.num_samples):
            prompts.append({"prompt_token_ids": list(prompt.token_ids)})
            params.append(
                SamplingParams(
                    temperature=rollout.temperature,
                    max_tokens=rollout.max_tokens,
                    seed=completion_seed(order["seed"], prompt.prompt_id, sample_index),
                    logprobs=0,
                    stop_token_ids=[prepared.tokenizer.eos_token_id],
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
            )
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "num_tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}


def main() -> None:
    config = Config.model_validate(json.loads(sys.argv[1]))
    prepared = prepare(config, Console(sys.stderr))
    set_variables(config, None)
    llm = start_vllm(config, prepared.model_dir)
    print("answer {}", flush=True)
    for line in sys.stdin:
        print("answer " + json.dumps(generate(llm, config, prepared, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
