#!/usr/bin/env bash
# PyTorch 2.13.0, CPU: the gradient of x[index] is another one each time, where positions repeat and two threads compute.
#
# 6,000 rows are read from 4,000 by x[index], some of them many times, and the same gradient is sent back 50 times.
# One would expect: the same bits each time; it is a CPU, and nothing is random.
# Seen: nearly every time another sum. Backward of indexing is index_put_(accumulate=True), which on a CPU adds float32
# with atomics, in whatever order the threads come. index_select gives the same each time and is about three times as
# fast; so does indexing under torch.use_deterministic_algorithms(True), four times slower.
#
# Why it matters: completions that share a prompt all read its last position, so a learner's step did not repeat to the
# bit. dphrl uses index_select on CPUs. On GPUs it is the other way round: there index_select adds with atomics.
#
# Needs Python 3.11 and a package index; some minutes, more where the index serves torch for CUDA. Two processors.
# Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$work/program.py" <<'PY'
import torch

torch.set_num_threads(2)
torch.manual_seed(0)
rows, given = torch.randn(4000, 128), torch.randn(6000, 128)
index = torch.randint(0, 4000, (6000,))
index[::7] = 5


def num_different(read):
    seen = set()
    for _ in range(50):
        leaf = rows.clone().requires_grad_()
        read(leaf).backward(given)
        seen.add(leaf.grad.numpy().tobytes())
    return len(seen)


by_index = num_different(lambda x: x[index])
by_select = num_different(lambda x: x.index_select(0, index))
torch.use_deterministic_algorithms(True)
asked = num_different(lambda x: x[index])
print(f"of 50 gradients, different: x[index] {by_index}, index_select {by_select}, deterministic x[index] {asked}")
raise SystemExit(not (by_index > 1 and by_select == 1 and asked == 1))
PY
"$work/venv/bin/python" "$work/program.py"
