#!/usr/bin/env bash
# DeepSpeed 0.19.8: the ZeRO stage decides what backward, zero_grad and a NaN do to a step, not only where memory lies.
#
# One rank, float32, gradient_accumulation_steps 1, plain SGD with rate 1 on a single weight that starts at 1.
# One would expect: all stages compute the same step.
# Seen:
#                                        stage 0              stages 1 and 2
#   backward(x), backward(10 x), step    gradients add up     only the second backward counts
#   backward, zero_grad, step            nothing moves        the cleared gradient is applied all the same
#   a NaN loss, step                     the weight is NaN    the step is skipped
#
# Why it matters: code that accumulates by hand is right at stage 0 and silently trains on a part of its batch at stages
# 1 and 2. dphrl sets the accumulation boundary by hand and asks for float32 accumulation, which does add up.
#
# Needs Python 3.11 and a package index; some minutes, more where the index serves torch for CUDA.
# Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools ninja
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check deepspeed==0.19.8
cat >"$work/program.py" <<'PY'
import math
import os
import socket
import sys

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
import deepspeed
import torch

# Only speeds up collectives, and takes a minute to compile.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def new_engine(stage):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # left out, it is 1.0
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def after(stage, gradients, clear=False):
    """The weight after a backward for each gradient and one step."""
    engine = new_engine(stage)
    for gradient in gradients:
        engine.backward(engine(torch.ones(1, 1)).sum() * gradient)
    if clear:
        engine.zero_grad()
    engine.step()
    return float(engine.module.weight.detach())


seen = {}
for stage in (0, 1, 2):
    seen[stage] = after(stage, [1.0, 10.0]), after(stage, [1.0], clear=True), after(stage, [math.nan])
    print(f"RESULT stage {stage}: two backwards {seen[stage][0]:g}, cleared {seen[stage][1]:g}, NaN {seen[stage][2]:g}")
expected = {0: "(-10.0, 1.0, nan)", 1: "(-9.0, 0.0, 1.0)", 2: "(-9.0, 0.0, 1.0)"}
sys.exit(0 if {stage: str(values) for stage, values in seen.items()} == expected else 1)
PY
cd "$work"
"$work/venv/bin/python" program.py >"$work/output" 2>&1 || {
    tail -n 20 "$work/output" >&2
    echo "the behaviour has changed" >&2
    exit 1
}
sed -n 's/^RESULT //p' "$work/output"
# Output seen:
#   stage 0: two backwards -10, cleared 1, NaN nan
#   stage 1: two backwards -9, cleared 0, NaN 1
#   stage 2: two backwards -9, cleared 0, NaN 1
