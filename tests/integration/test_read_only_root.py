"""A whole run in the file system of the rendered containers: read-only, but for /tmp, the home folder and a volume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dphrl.tracking.tracker import read_metrics

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(600)]

# In a mount namespace, so that nothing outside it changes. The volume lies below the old /tmp, so it is moved with the
# new one.
MOUNTS = """
set -e
mount --make-rprivate /
mkdir "$VOLUME/tmp"
mount -t tmpfs -o mode=1777 tmpfs "$VOLUME/tmp"
mkdir "$VOLUME/tmp/home" "$VOLUME/tmp/volume"
mount --bind "$VOLUME" "$VOLUME/tmp/volume"
mount --rbind "$VOLUME/tmp" /tmp
awk '{print $2}' /proc/self/mounts | while read -r folder; do
    case $folder in
        /tmp | /tmp/* | /dev | /dev/* | /proc | /proc/* | /sys | /sys/*) ;;
        *) mount -o remount,bind,ro "$folder" ;;
    esac
done
"""
REFUSED = 'if touch "$CODE/written" 2>/dev/null; then echo "not read-only"; exit 3; fi\n'
SETTINGS = "run_dir=/tmp/volume/runs run_name=ro learner.num_steps=2 evaluation.num_samples=8"
TRAIN = f'"$PYTHON" -m dphrl train demo-math {SETTINGS}\n'


def in_namespace(script: str, volume: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "DPHRL_CACHE")} | {
        "VOLUME": str(volume),
        "CODE": str(ROOT),
        "PYTHON": sys.executable,
        # As `dphrl render kubernetes` sets them.
        "HOME": "/tmp/home",
        "HF_HOME": "/tmp/volume/huggingface",
        "DPHRL_CACHE": "/tmp/volume/cache",
        "XDG_CACHE_HOME": "/tmp/volume/cache/node",
        "TRITON_CACHE_DIR": "/tmp/volume/cache/node/triton",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/volume/cache/node/inductor",
    }
    # A namespace of processes, too: with its first one, everything that it left ends.
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def new_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


def test_a_run_writes_nothing_outside_its_volume_the_home_folder_and_tmp(tmp_path: Path) -> None:
    probe = in_namespace(MOUNTS, new_folder(tmp_path, "probe"))
    if probe.returncode:
        pytest.skip(f"no mount namespaces here: {probe.stderr.strip()}")
    volume = new_folder(tmp_path, "volume")
    done = in_namespace(MOUNTS + REFUSED + TRAIN, volume)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert [step["step"] for step in read_metrics(volume / "runs" / "ro")] == [1, 2]
