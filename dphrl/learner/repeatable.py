"""What makes a process compute the same twice: the setting `deterministic`."""

from __future__ import annotations

import os

import torch

# cuBLAS sums in the same order each time only with a workspace of fixed size; torch refuses to go on without it.
CUBLAS_WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def use_repeatable_kernels(wanted: bool) -> None:
    """Have torch use kernels that give the same result each time, or its usual ones again.

    Call it before this process first uses CUDA, whose libraries read their variable once. A kernel that has no such
    form then raises RuntimeError where it is used.
    """
    if wanted:
        os.environ |= CUBLAS_WORKSPACE
    torch.use_deterministic_algorithms(wanted)
