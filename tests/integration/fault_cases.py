"""The list of faults, and the broken files that their commands name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from signal import SIGINT, SIGTERM

from dphrl.config.loading import config_to_yaml, load_config
from tests.integration.faults import Case

BASE = (
    # A run folder each: they run side by side, and a folder has one owner.
    "base: demo-math\nrun_name: %s\nreward: {name: math_answer}\nmodel: {path: %s}\n"
    "data: {train: {name: mine, kind: math, path: %s, prompt_field: q, answer_field: a}, evaluation: []}\n"
    "evaluation: {num_samples: 0}\n"
)
GOOD_ROW = json.dumps({"q": "1 + 1?", "a": "2"}) + "\n"
# What makes a run's numbers go bad.
ODD = """
import time
from pathlib import Path

from dphrl.algo.policy_losses import register_policy_loss


@register_policy_loss("odd")
def odd(first: float | str = 1.0, later: float | str = 1.0, after: int = 21):
    calls = 0

    def loss(tokens, settings):
        nonlocal calls
        calls += 1
        scale = float(first if calls <= after else later)
        return scale * (tokens.weights_N * tokens.logprobs_N).sum(), {}

    return loss


def nothing(completion: str, answer: str) -> float:
    return 0.0


def by_prompt(completion: str, answer: str) -> float:
    return float(answer < "factor:30000")


num_graded = 0


def hangs(completion: str, answer: str) -> float:
    global num_graded
    num_graded += 1
    if num_graded > 16:  # after the first step
        Path("hanging").write_text("now")
        time.sleep(3600)
    return 0.0
"""
ODD_RUN = """
base: demo-math-grpo
run_dir: runs
algorithm: {plugins: [odd]}
data: {train: {name: factor, kind: tiny, split: train, limit: 64}, evaluation: []}
rollout: {num_prompts: 4, num_samples: 4}
reference: {num_samples: 4, threshold: 3, stored_per_prompt: 1, rows_per_step: 8}
learner: {num_steps: 200, lr_schedule: constant, warmup_steps: 0}
evaluation: {num_samples: 0}
checkpoint: {every_steps: 0}
tracking: {tensorboard: false}
"""
SUITE = """
name: mine
about: One run.
base: odd.yaml
seeds: [1]
settings:
  evaluation.num_samples: 2
  evaluation.k: [1, 2]
  data.evaluation: [{name: factor, kind: tiny, split: held_out, limit: 4}]
arms: {grpo: {}}
quick: {seeds: [1], arms: [grpo]}
"""
TRAIN = "dphrl train odd.yaml --inline"


CONFIGURATION = [
    Case(
        "aliases of aliases", "dphrl plan bomb.yaml", line=r"bomb.yaml: not valid YAML: aliases make more than 200,000"
    ),
    Case(
        "nesting of a configuration", "dphrl plan deep.yaml", line=r"deep.yaml:2: not valid YAML: nested more than 50 d"
    ),
    Case("a repeated key", "dphrl plan twice.yaml", line=r"twice.yaml:3: not valid YAML: key 'seed' appears twice"),
    Case("a configuration of megabytes", "dphrl plan large.yaml", line=r"large.yaml: not valid YAML: more than 1 MiB"),
    Case(
        "a number of 100,000 digits",
        "dphrl plan digits.yaml",
        line=r"digits.yaml: seed: expected an integer >= 0 \(got",
    ),
    Case(
        "an absurd number",
        "dphrl plan demo-math rollout.num_samples=1000000000000",
        line=r"command line: rollout.num_samples: expected an integer >= 1 and <= 100,000 \(got 1000000000000\)",
    ),
    Case(
        "an absurd product",
        "dphrl plan demo-math rollout.num_prompts=10000000",
        line=r"rollout.num_prompts=10000000 x rollout.num_samples=8 are 80,000,000 completions a step.*; lower one",
    ),
    Case("not a number", "dphrl plan demo-math learner.lr=.nan", line=r"learner.lr: expected a number > 0 \(got NaN\)"),
    Case(
        "a secret among the settings",
        "dphrl plan demo-math reward.name=my:grade 'reward.params={api_key: Sesame-1234}'",
        line=r"reward.params.api_key: looks like a secret",
    ),
    Case(
        "a secret in a job",
        "dphrl submit demo-math --env HF_TOKEN",
        line=r"--env HF_TOKEN: looks like a secret.*; set it in the environment of the cluster's nodes",
        env={"HF_TOKEN": "sesame"},
    ),
]
PLACES = [
    Case(
        "run_dir is a file",
        "dphrl train demo-math run_dir=file",
        line=r"run_dir: file/demo-math cannot be written \(file i",
    ),
    Case(
        "a read-only run folder",
        "dphrl sample demo-math run_dir=/proc/runs",
        line=r"run_dir: /proc/runs/.* cannot be wri",
    ),
    Case(
        "a run_name that is too long",
        f"dphrl train demo-math --inline run_name={'x' * 300}",
        line=r"run_dir: runs/x+ cannot be written \(File name too long\); choose another place",
    ),
    Case(
        "the result's file cannot be written",
        "dphrl eval demo-math --model tiny-factor -o file/result.json",
        line=r"file/result.json: cannot be written \(file is no folder\); name another file",
    ),
    Case(
        "the report cannot be written",
        "dphrl report run -o file/r.html",
        line=r"file/r.html: cannot be written",
    ),
    Case(
        "a rendered file cannot be written",
        "dphrl render slurm demo-math -o file/x",
        line=r"file/x: cannot be wr",
    ),
    Case(
        "the cache cannot be written",
        "dphrl train demo-math --inline",
        line=r"model tiny-factor: the folder for embedded models cannot be written .*; set DPHRL_CACHE",
        env={"DPHRL_CACHE": "file/cache"},
    ),
]
MODELS_AND_DATA = [
    Case(
        "weights that are cut off",
        "dphrl train half.yaml --inline",
        line=r"half/model.safetensors has .* bytes where its",
    ),
    Case("a model without weights", "dphrl train bare.yaml --inline", line=r"model.path: .*/bare holds no weights"),
    Case(
        "nesting of a row",
        "dphrl train nested.yaml --inline",
        line=r"nested.jsonl:2: not a line of JSON: maximum recursion depth exceeded .*; mend it",
    ),
    Case(
        "half of a character in a row",
        "dphrl train half-letter.yaml --inline",
        line=r"half-letter.jsonl:2: 'q' holds a lone",
    ),
    Case(
        "a gold of a million characters",
        "dphrl train gold.yaml --inline",
        line=r"1 of 2 rows have no gold to grade against: gold.jsonl:2: .*: 1,000,001 characters, more than any answer",
    ),
    Case(
        "a broken row to score", "dphrl score math -o /dev/null -", stdin="[" * 100_000, line=r"-:1: not a line of JSON"
    ),
]
STREAMS = [
    Case(
        "a full standard output",
        "dphrl presets > /dev/full",
        status=1,
        line=r"dphrl: failed: standard output cannot be written: No space left on device",
    ),
    Case(
        "a closed standard output", "dphrl version >&-", status=1, line=r"standard output cannot be written: Bad file"
    ),
    Case("a reader that goes", "{ sleep 1; dphrl plan demo-math; } | head -c 0", status=1),
    Case("a closed standard error", "dphrl plan nope 2>&-"),
    Case("a full standard error", "dphrl plan nope 2> /dev/full"),
]
# A run's numbers go bad: a policy loss or a reward of the user's own makes them so.
NUMBERS = [
    Case(
        "a loss that is no number",
        f"{TRAIN} run_name=nan 'algorithm.policy_loss={{name: odd, first: inf}}'",
        status=1,
        line="step 3: the loss was not finite, as in 3 steps in a row .*; look at samples/ of step 3, lower learner.lr",
        cpu_s=60,
    ),
    Case(
        "a gradient that explodes",
        f"{TRAIN} run_name=gradient learner.lr=1e-9 health.exploding_gradient=stop "
        "'algorithm.policy_loss={name: odd, first: 1e-4, later: 1}'",
        status=1,
        line="step 2[2-5]: the gradient's norm is .*; over the steps before it was .*; lower learner.lr",
        cpu_s=60,
    ),
    Case(
        "a divergence that explodes",
        f"{TRAIN} run_name=divergence learner.lr=5e-3 health.exploding_divergence=stop algorithm.divergence=forward_kl "
        "algorithm.eta=1e-9 'algorithm.policy_loss={name: odd, first: 0, later: 1}'",
        status=1,
        line="step 2[2-9]: the divergence from the initial policy is .* nats a token; over the steps before it was",
        cpu_s=60,
    ),
    Case(
        "an entropy that collapses",
        f"{TRAIN} run_name=entropy learner.lr=1e-3 health.entropy_collapse=stop health.entropy_share=0.5 "
        "'algorithm.policy_loss={name: odd, first: -1, later: -1}'",
        status=1,
        line="step [0-9]+: the policy's entropy has fallen to .* nats; in the first steps it was",
        cpu_s=60,
    ),
    Case(
        "rewards of one value",
        f"{TRAIN} run_name=one reward.name=odd:nothing health.one_reward=stop health.flat_steps=2",
        status=1,
        line="step 2: every completion of each of the last 2 steps has the same score, now 0; read samples/",
        cpu_s=60,
    ),
    Case(
        "groups that are all flat",
        f"{TRAIN} run_name=flat reward.name=odd:by_prompt health.no_signal=stop health.flat_steps=2",
        status=1,
        line="step 2: in each of the last 2 steps no prompt has completions of different scores; raise",
        cpu_s=60,
    ),
    Case(
        "a trust region that cuts too much",
        f"{TRAIN} run_name=clip learner.lr=1e-5 health.clipping=stop health.clip_share=0.01 algorithm.clip_low=1e-9 "
        "algorithm.clip_high=1e-9 algorithm.num_minibatches=2",
        status=1,
        line="step [0-9]+: the trust region cuts the gradient of .*% of the tokens; lower learner.lr",
        cpu_s=60,
    ),
]
# Signals, sent as soon as there is a file that matches `once`.
SIGNALS = [
    Case(
        "Ctrl-C",
        f"{TRAIN} run_name=int",
        status=130,
        line="stopped by SIGINT; the same command with --resume goes on after step [0-9]+",
        cpu_s=60,
        signals=(SIGINT,),
        once="runs/int/metrics.jsonl",
    ),
    Case(
        "Ctrl-C twice, because a reward hangs",
        f"{TRAIN} run_name=twice reward.name=odd:hangs reward.timeout_s=3600",
        status=130,
        line="stopped by SIGINT; the same command with --resume goes on with what is done",
        cpu_s=60,
        signals=(SIGINT, SIGINT),
        once="hanging",
    ),
    Case(
        "SIGTERM",
        f"{TRAIN} run_name=term",
        status=143,
        line="stopped by SIGTERM; the same command with --resume goes on after step [0-9]+",
        cpu_s=60,
        signals=(SIGTERM,),
        once="runs/term/metrics.jsonl",
    ),
    Case(
        "Ctrl-C while the reference is sampled",
        "dphrl sample odd.yaml --inline run_name=sample algorithm.divergence=forward_kl reference.prompts_per_chunk=2 "
        "data.train.limit=2000",
        status=130,
        line="stopped by SIGINT; the same command goes on with what is done",
        cpu_s=60,
        signals=(SIGINT,),
        once="runs/sample/reference.graded/chunk_*",
    ),
    Case(
        "Ctrl-C in an evaluation",
        "dphrl eval demo-math --inline --model tiny-factor -o evaluated.json",
        status=130,
        line="stopped by SIGINT; the same command goes on with what is done",
        cpu_s=60,
        signals=(SIGINT,),
        once="evaluated.json.partial/*",
    ),
    Case(
        "Ctrl-C in an experiment",
        "dphrl experiment suite.yaml --inline --run-dir suite",
        status=130,
        line="stopped by SIGINT; the same command goes on with what is done",
        cpu_s=60,
        signals=(SIGINT,),
        once="suite/**/metrics.jsonl",
    ),
    Case(
        "SIGTERM while completions are graded",
        "dphrl score math rows.jsonl -o scores.jsonl --workers 2",
        status=143,
        line="stopped by SIGTERM; the rows graded so far are written",
        cpu_s=60,
        signals=(SIGTERM,),
        once="scores.jsonl",
    ),
]
CASES = [*CONFIGURATION, *PLACES, *MODELS_AND_DATA, *STREAMS, *NUMBERS, *SIGNALS]


def write_files(folder: Path, model: str) -> None:
    """The broken files that the commands name."""
    aliases = "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10}]\n" for i in range(1, 10))
    texts = {
        "bomb.yaml": f"a0: &a0 [x]\n{aliases}",
        "deep.yaml": "a:\n  " + "[" * 100_000,
        "twice.yaml": "base: demo-math\nseed: 1\nseed: 2\n",
        "large.yaml": "x" * 2**21,
        "digits.yaml": f"base: demo-math\nseed: {'9' * 100_000}\n",
        "file": "a file",
        "nested.jsonl": GOOD_ROW + '{"q": "?", "a": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        "half-letter.jsonl": GOOD_ROW + json.dumps({"q": "a \ud800", "a": "1"}) + "\n",
        "odd.py": ODD,
        "odd.yaml": ODD_RUN,
        "suite.yaml": SUITE,
        "rows.jsonl": (json.dumps({"completion": r"\boxed{4}", "answer": "4"}) + "\n") * 200_000,
        "gold.jsonl": GOOD_ROW + json.dumps({"q": "?", "a": "1+" * 500_000 + "1"}) + "\n",
        "half.yaml": BASE % ("half-run", folder / "half", "gold.jsonl"),
        "bare.yaml": BASE % ("bare-run", folder / "bare", "gold.jsonl"),
        **{
            f"{name}.yaml": BASE % (f"{name}-run", model, f"{name}.jsonl") for name in ("nested", "half-letter", "gold")
        },
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("half", "bare"):
        shutil.copytree(model, folder / name)
    (folder / "bare" / "model.safetensors").unlink()
    os.truncate(folder / "half" / "model.safetensors", 100_000)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(config_to_yaml(load_config("demo-math")))
