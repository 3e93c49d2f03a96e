#!/usr/bin/env bash
# DeepSpeed 0.19.8: after load_checkpoint the ZeRO stage decides whether the configuration's gradient clipping counts.
#
# A checkpoint is saved with gradient_clipping 1.0 and AdamW's weight_decay 0, then loaded by an engine that is
# configured with gradient_clipping 0.25 and weight_decay 0.5, as when a run goes on with other settings. One rank,
# float32.
# One would expect: the configuration of the engine that loads counts, as its batch sizes do; or the checkpoint's does,
# at every stage.
# Seen:
#                     clipping that counts      weight_decay that counts
#   stage 0           0.25, the new one         0, the checkpoint's
#   stages 1 and 2    1.0, the checkpoint's     0, the checkpoint's
#   stage 3           0.25, the new one         0, the checkpoint's
# engine.gradient_clipping() says 0.25 at every stage.
#
# Why it matters: a run that is resumed with a tighter clipping, the usual cure for a run whose loss jumps, is not
# clipped tighter at stages 1 and 2, and nothing says so. dphrl sets both anew after it has loaded a checkpoint.
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
import os
import socket
import sys
import tempfile

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


def new_engine(stage, optimizer, clipping, **settings):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clipping,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer(model.parameters(), **settings), config=config)[0]


def weight(engine):
    with deepspeed.zero.GatheredParameters([engine.module.weight], enabled=engine.zero_optimization_stage() == 3):
        return float(engine.module.weight.detach())


def clipping_that_counts(stage):
    """How far plain SGD with rate 1 moves the weight along a gradient of 10."""
    with tempfile.TemporaryDirectory() as folder:
        new_engine(stage, torch.optim.SGD, 1.0, lr=1.0).save_checkpoint(folder, tag="t")
        engine = new_engine(stage, torch.optim.SGD, 0.25, lr=1.0)
        engine.load_checkpoint(folder, tag="t")
    assert engine.gradient_clipping() == 0.25
    before = weight(engine)
    engine.backward(engine(torch.ones(1, 1)).sum() * 10.0)
    engine.step()
    return round(before - weight(engine), 3)


def weight_decay_that_counts(stage):
    with tempfile.TemporaryDirectory() as folder:
        new_engine(stage, torch.optim.AdamW, 1.0, lr=0.1, weight_decay=0.0).save_checkpoint(folder, tag="t")
        engine = new_engine(stage, torch.optim.AdamW, 1.0, lr=0.1, weight_decay=0.5)
        engine.load_checkpoint(folder, tag="t")
    return engine.optimizer.param_groups[0]["weight_decay"]


seen = {}
for stage in (0, 1, 2, 3):
    seen[stage] = clipping_that_counts(stage), weight_decay_that_counts(stage)
    print(f"RESULT stage {stage}: clipping {seen[stage][0]:g}, weight decay {seen[stage][1]:g}")
sys.exit(0 if seen == {0: (0.25, 0), 1: (1, 0), 2: (1, 0), 3: (0.25, 0)} else 1)
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
#   stage 0: clipping 0.25, weight decay 0
#   stage 1: clipping 1, weight decay 0
#   stage 2: clipping 1, weight decay 0
#   stage 3: clipping 0.25, weight decay 0
