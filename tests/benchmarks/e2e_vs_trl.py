"""A whole training step of dphrl, as `dphrl train` takes it, beside one of TRL's GRPOTrainer on the same work.

The work: the first prompts of GSM8K, SmolLM2-135M-Instruct, completions that all run to the limit, the same reward, one
optimizer update of all weights. dphrl has Ray, a real vLLM engine and a DeepSpeed learner, and proves every weight
sync; TRL samples with Hugging Face's generate, because its vLLM mode refuses this version of vLLM. Both have the same
number of threads, are up at the same time and take steps in turn. `rehearsing` is a step of DPH-JS, with rows of the
reference buffer more; TRL's step is the same one, without a reference model.

TRL is installed once into a folder of the cache, from the package index, and not into this environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks._peer import TRL, ensure_trl, make_unending
from tests.benchmarks._sides import ROOT, Side, side

DPHRL_CHILD, TRL_CHILD = (Path(__file__).with_name(f"_e2e_{name}_child.py") for name in ("dphrl", "trl"))
NUM_THREADS, NUM_REHEARSED, LR = 2, 8, 1e-6
# Steps in the time of TRL's; on tiny models Ray's hand-overs weigh more.
BARS = {"plain_vs_trl": 0.45, "rehearsing_vs_trl": 0.5}
SMALL_BARS = {"plain_vs_trl": 1.0}
LAPS = ("rollout", "reward", "learn", "sync")
Answers = dict[str, list[dict[str, float]]]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks e2e_vs_trl", description=__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    parser.add_argument("--rounds", type=int, default=0, help="steps of each, after those to warm up (default: 2; 10)")
    parser.add_argument("--small", action="store_true", help="the embedded tiny model, 64 completions of 64 tokens")
    parser.add_argument("--peer-rows", type=int, default=0, help="rows of TRL's micro-batch (default: 8; --small: all)")
    parser.add_argument(
        "--peer-weights",
        choices=["float32", "bfloat16"],
        default="float32",
        help="TRL's weights; with --dtype bfloat16 it computes in bfloat16 from float32 ones by default, as it does by "
        "itself and as dphrl's optimizer does; bfloat16 ones lose small updates",
    )
    parser.add_argument("--peer-keeps-memory", action="store_true", help="TRL too keeps freed memory, as engines do")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every ratio is the median over rounds of two times of the same round. The first steps are left out.

    Exits with status 2 where the data folder or a package index is missing.
    """
    folder_of_trl = ensure_trl()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dphrl-e2e-")))
        model = make_unending(_model(arguments.small), folder)
        settings = dphrl_settings(str(model), arguments.dtype, small=arguments.small)
        peers = trl_settings(settings, arguments)
        memory = keep_memory() if arguments.peer_keeps_memory else {}
        ours = stack.enter_context(side(DPHRL_CHILD, [str(ROOT), json.dumps(settings)], [ROOT]))
        threads = {"OMP_NUM_THREADS": str(NUM_THREADS)}
        theirs = stack.enter_context(side(TRL_CHILD, [json.dumps(peers)], [folder_of_trl, ROOT], {**threads, **memory}))
        for started in (ours, theirs):
            started.answer()
        num_rounds = arguments.rounds or (10 if arguments.small else 2)
        seen = measure(ours, theirs, num_rounds, num_warm_up=3 if arguments.small else 1)
    facts = {"dtype": arguments.dtype, "small": arguments.small, "peer": TRL, "rounds": num_rounds}
    return {"benchmark": "e2e_vs_trl", "num_cpus": os.cpu_count(), "num_threads": NUM_THREADS, **facts} | summary(
        seen, SMALL_BARS if arguments.small else BARS
    )


def _model(small: bool) -> Path:
    from dphrl.models import ensure_smollm2
    from dphrl.tiny import ensure_tiny_model

    return ensure_tiny_model() if small else ensure_smollm2()


def keep_memory() -> dict[str, str]:
    """What dphrl gives its engines, see there: glibc keeps what is freed."""
    from actors.vllm_settings import KEEP_MEMORY

    return dict(KEEP_MEMORY)


def data_folder() -> Path:
    """Exits with status 2 where it is not."""
    # Absolute, because each side has a folder of its own.
    root = Path(os.environ.get("DPHRL_DATA") or ROOT.parent / "shared/data").absolute()
    if not (root / "math/gsm8k_train.jsonl").is_file():
        print(f"{root}/math/gsm8k_train.jsonl is not here: set DPHRL_DATA to the folder of data", file=sys.stderr)
        raise SystemExit(2)
    return root


def dphrl_settings(model: str, dtype: str, *, small: bool) -> dict[str, Any]:
    """A configuration, as a user would write it. Explored are the first rollout.num_prompts prompts, rehearsed the
    rest."""
    num_prompts = 8
    if small:
        data: dict[str, Any] = {"name": "factor", "kind": "tiny", "limit": num_prompts + NUM_REHEARSED}
        rollout, max_prompt_tokens = {"num_samples": 8, "max_tokens": 64}, 16
    else:
        path = str(data_folder() / "math/gsm8k_train.jsonl")
        data = {"name": "gsm8k", "path": path, "layout": "gsm8k", "limit": num_prompts + NUM_REHEARSED}
        rollout, max_prompt_tokens = {"num_samples": 4, "max_tokens": 48}, 256
    return {
        "run_name": "e2e",
        "model": {"path": model, "dtype": dtype},
        "data": {"train": data, "max_prompt_tokens": max_prompt_tokens},
        "reward": {"name": "tests.benchmarks._text_reward:reward"},
        "algorithm": {"divergence": "js", "eta": 0.2},
        "rollout": {"num_prompts": num_prompts, "threads_per_engine": NUM_THREADS, **rollout},
        "reference": {"rows_per_step": NUM_REHEARSED},
        "learner": {"num_steps": 1000, "lr": LR, "threads_per_rank": NUM_THREADS},
        "cluster": {"object_store_gib": 2},
    }


def trl_settings(settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The same work for TRL: the same tokens of the prompts, as text and as ids to compare."""
    from dphrl.config.schema import Config
    from dphrl.prepare import prepare
    from dphrl.tracking.console import Console

    config = Config.model_validate(settings)
    prepared = prepare(config, Console(sys.stderr))
    explored = prepared.prompts[: config.rollout.num_prompts]
    num_rows = config.rollout.num_prompts * config.rollout.num_samples
    rows_at_once = arguments.peer_rows or (num_rows if arguments.small else 8)
    return {
        "model": config.model.path,
        "prompts": [prepared.tokenizer.decode(prompt.token_ids) for prompt in explored],
        "token_ids": [list(prompt.token_ids) for prompt in explored],
        "num_samples": config.rollout.num_samples,
        "max_tokens": config.rollout.max_tokens,
        "num_threads": NUM_THREADS,
        "lr": LR,
        "num_parts": num_rows // rows_at_once,
        "weights": arguments.peer_weights,
        "autocast": arguments.dtype == "bfloat16" and arguments.peer_weights == "float32",
    }


def measure(ours: Side, theirs: Side, num_rounds: int, *, num_warm_up: int) -> Answers:
    plans: dict[str, tuple[Side, dict[str, str]]] = {
        "plain": (ours, {"loop": "plain"}),
        "rehearsing": (ours, {"loop": "rehearsing"}),
        "trl": (theirs, {}),
    }
    seen: Answers = {name: [] for name in plans}
    for number in range(-num_warm_up, num_rounds):
        # Whoever comes second finds warmer caches, so the order changes.
        for name in sorted(plans, reverse=bool(number % 2)):
            where, order = plans[name]
            answer = where.measure(order)
            print(
                f"-- round {number + 1}, {name}: {answer['seconds']:.2f} s, CPU {answer['cpu_s']:.2f} s",
                file=sys.stderr,
                flush=True,
            )
            if number >= 0:
                seen[name].append(answer)
    return seen


def summary(seen: Answers, bars: dict[str, float]) -> dict[str, Any]:
    def median(name: str, key: str) -> float:
        return statistics.median(answer[key] for answer in seen[name])

    def ratio(name: str, key: str = "seconds", *, per_token: bool = False) -> float:
        pairs = zip(seen[name], seen["trl"], strict=True)
        ratios = [(a[key] / b[key], b["num_tokens"] / a["num_tokens"]) for a, b in pairs]
        return statistics.median(times * tokens if per_token else times for times, tokens in ratios)

    result: dict[str, Any] = {}
    for name in seen:
        result[f"{name}_s"] = median(name, "seconds")
        result[f"{name}_cpu_s"] = median(name, "cpu_s")
        result[f"{name}_tokens_per_step"] = median(name, "num_tokens")
        result[f"{name}_ms_per_token"] = 1e3 * statistics.median(a["seconds"] / a["num_tokens"] for a in seen[name])
    for name in ("plain", "rehearsing"):
        result[f"{name}_vs_trl"] = ratio(name)
        result[f"{name}_vs_trl_per_token"] = ratio(name, per_token=True)
        result[f"{name}_vs_trl_cpu"] = ratio(name, "cpu_s")
        result |= {f"{name}_{lap}_s": median(name, f"{lap}_s") for lap in LAPS}
        result[f"{name}_flat_groups"] = median(name, "flat")
    result["rehearsing_rows"] = median("rehearsing", "rows")
    result["trl_rollout_s"] = median("trl", "rollout_s")
    result |= {f"{name}_bar": bar for name, bar in bars.items()}
    # Both by the step and by the token: neither side may win by sampling less.
    result["within_bars"] = all(max(result[name], result[f"{name}_per_token"]) <= bar for name, bar in bars.items())
    return result
