#!/usr/bin/env bash
# DeepSpeed 0.19.8: one NaN gradient ends the training for good, with ZeRO 1 or 2, bfloat16, gradients summed in
# float32 and the optimizer offloaded to host memory.
#
# DeepSpeed checks bfloat16 gradients: a step whose gradient is not finite is skipped, and the norm is inf. Four steps are
# taken, the first of them with a NaN loss. One rank.
# One would expect: the first step is skipped, the next three train, wherever the optimizer lies; so it is without
# offload, without the float32 sums, and at stage 3.
# Seen: with offload at stages 1 and 2 every later step is skipped too, with norm inf and without an exception. The
# buffer that sums the gradients (averaged_gradients) is emptied after a skipped step only where nothing is offloaded;
# otherwise the next gradients are added to the NaN.
#
# Why it matters: a run goes on for hours, writes checkpoints, and has the same weights as after the bad step. dphrl
# empties the buffer itself after a step whose norm is not finite.
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


def norms(stage, offload, sums):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": sums},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    seen = []
    for factor in (math.nan, 1.0, 1.0, 1.0):
        engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum() * factor)
        engine.step()
        seen.append(float(engine.get_global_grad_norm()))
    return seen


as_described = True
for stage in (1, 2, 3):
    for offload in (False, True):
        for sums in ("fp32", "bf16"):
            skipped = [not math.isfinite(norm) for norm in norms(stage, offload, sums)]
            stuck = offload and sums == "fp32" and stage < 3
            as_described &= skipped == [True, *[stuck] * 3]
            place = "offloaded" if offload else "on the device"
            print(f"RESULT stage {stage}, {place}, sums in {sums}: {sum(skipped)} of 4 steps skipped")
sys.exit(0 if as_described else 1)
PY
cd "$work"
"$work/venv/bin/python" program.py >"$work/output" 2>&1 || {
    grep RESULT "$work/output" >&2 || true
    tail -n 20 "$work/output" >&2
    echo "the behaviour has changed" >&2
    exit 1
}
sed -n 's/^RESULT //p' "$work/output"
# Output seen:
#   stage 1, on the device, sums in fp32: 1 of 4 steps skipped
#   stage 1, on the device, sums in bf16: 1 of 4 steps skipped
#   stage 1, offloaded, sums in fp32: 4 of 4 steps skipped
#   stage 1, offloaded, sums in bf16: 1 of 4 steps skipped
#   stage 2, on the device, sums in fp32: 1 of 4 steps skipped
#   stage 2, on the device, sums in bf16: 1 of 4 steps skipped
#   stage 2, offloaded, sums in fp32: 4 of 4 steps skipped
#   stage 2, offloaded, sums in bf16: 1 of 4 steps skipped
#   stage 3, on the device, sums in fp32: 1 of 4 steps skipped
#   stage 3, on the device, sums in bf16: 1 of 4 steps skipped
#   stage 3, offloaded, sums in fp32: 1 of 4 steps skipped
#   stage 3, offloaded, sums in bf16: 1 of 4 steps skipped
