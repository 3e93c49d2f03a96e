"""The script for GPUs is not run here, but its code is: with tiny sizes on this CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.gpu.parts import PARTS, missing

SMALL = [name for name, part in PARTS.items() if "torch_parts" in part.place]


@pytest.mark.parametrize("name", SMALL)
def test_a_part_that_needs_torch_alone_holds_on_a_cpu(name: str) -> None:
    assert not missing(PARTS[name], small=True)
    # A process of its own, as the script gives it: some parts change global settings of torch.
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", name, "--small"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].split()[:2] == [name, "ok"]


def test_a_part_is_left_out_where_something_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "nccl", "--small"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "not run" in done.stdout
    assert "needs 2 GPUs" in done.stdout
