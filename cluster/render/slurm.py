"""A run on Slurm: one batch script that starts a Ray cluster on its nodes, trains, and takes the cluster down.

Plain bash, no `module load`: the environment is the submitting shell's, DPHRL_VENV's, and that of a file which the
script reads when it starts. It is written so that Slurm may start it again: it goes on from the last checkpoint.

Who starts it again: the script itself when the time limit is near and something was saved since it began, and Slurm
when a node fails or the job is preempted. Nobody after success, after bad input (exit 2), or after a crash (exit 1).
"""

from __future__ import annotations

import shlex

from cluster.render.nodes import RenderOptions, as_comments, made_by, node_shape, nodes_for, object_name, with_settings
from dphrl.config.loading import config_to_yaml
from dphrl.config.schema import Config

TIME_LIMIT = "24:00:00"
# The part of the time between Slurm's warning and the limit that is kept for putting the job back in the queue.
MARGIN_SHARE = 0.1
# Ports of one job. Jobs of one node differ in them unless their numbers differ by a multiple of 1200, and they lie
# below those that the system gives out by itself.
PORTS_PER_JOB, FIRST_PORT, LAST_PORT = 10, 20000, 32000


def render_slurm(config: Config, options: RenderOptions) -> str:
    """The script for `sbatch`. Raises InputError when the nodes cannot hold the run."""
    nodes = nodes_for(config, options, node_shape(config, options))
    settings = config_to_yaml(with_settings(config, config.run_dir, autoscaling="none"))
    store, memory, warning_s = config.cluster.object_store_gib, options.memory_gib_per_node, options.warn_before_s
    directives = [
        f"--job-name={object_name(config.run_name)}",
        f"--nodes={nodes.count}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={nodes.cpus}",
        *([f"--gpus-per-node={nodes.gpus}"] if nodes.gpus else []),
        # Ray takes a whole node for its own: its memory, its GPUs, its ports.
        "--exclusive",
        # A node of one's own still comes with no more memory than was asked for, else the site's default. 0: all of it.
        f"--mem={f'{memory}G' if memory else 0}",
        f"--time={TIME_LIMIT}",
        "--output=%x-%j.log",
        "--open-mode=append",
        "--requeue",
        # B: to this script alone. To all processes, it would end actors that the driver needs for saving.
        f"--signal=B:USR1@{warning_s}",
    ]
    values = {
        "DIRECTIVES": "\n".join(f"#SBATCH {directive}" for directive in directives),
        "HEADER": as_comments(_header(config, options, str(nodes))),
        "NODES": str(nodes.count),
        "CPUS": str(nodes.cpus),
        "GPUS": str(nodes.gpus),
        "WARNING": str(warning_s),
        "MARGIN": str(max(1, round(warning_s * MARGIN_SHARE))),
        "ENV_FILE": shlex.quote(options.env_file),
        "PORT": f"{FIRST_PORT} + SLURM_JOB_ID % {(LAST_PORT - FIRST_PORT) // PORTS_PER_JOB} * {PORTS_PER_JOB}",
        "STORE": f"--object-store-memory={round(store * 2**30)}" if store else "",
        "RUN_DIR": shlex.quote(config.run_dir),
        "RUN_NAME": shlex.quote(config.run_name),
        "END": _delimiter(settings),
        "CONFIG": settings.rstrip("\n"),
    }
    script = SCRIPT
    for name, value in values.items():
        # The configuration comes last, so that no text in it is taken for a name to replace.
        script = script.replace(f"@{name}@", value)
    return script


def _delimiter(text: str) -> str:
    """A line that ends the here-document and is no line of the text."""
    word = "END_OF_CONFIG"
    while word in text:
        word += "_"
    return word


def _header(config: Config, options: RenderOptions, nodes: str) -> list[str]:
    return [
        f"Run {config.run_name} on Slurm: {nodes}.",
        *made_by(options),
        "Start:    sbatch FILE   (options before FILE replace those above: --partition, --account, --time)",
        "Needs:    `ray` and `dphrl` on PATH, or DPHRL_VENV=/path/of/an/environment; folders that every node sees",
        "Stop:     scancel --batch --signal=TERM JOB   (it saves and ends; scancel alone may lose its last steps)",
        "Results:  run_dir below, relative to where sbatch was called; the log is beside it",
        "Settings: DPHRL_HEAD_ADDRESS (of the first node, where a name has several), DPHRL_JOIN_TIMEOUT_S (600)",
    ]


SCRIPT = r"""#!/bin/bash
@DIRECTIVES@
#
@HEADER@
set -euo pipefail

num_nodes=@NODES@
cpus=@CPUS@
gpus=@GPUS@
# shellcheck disable=SC2088  # a ~ is replaced below
run_dir=@RUN_DIR@
run_name=@RUN_NAME@
env_file=@ENV_FILE@
warning_s=@WARNING@ # between Slurm's signal and the time limit
margin_s=@MARGIN@

say() { printf 'dphrl: %s\n' "$*"; }
die() { printf 'dphrl: failed: %s\n' "$*" >&2; exit 1; }

cd "${SLURM_SUBMIT_DIR:-$PWD}"
absolute() { # absolute PATH
    case $1 in
        /*) printf %s "$1" ;;
        '~'/*) printf %s "$HOME/${1#'~/'}" ;;
        *) printf %s "$PWD/$1" ;;
    esac
}
run_dir=$(absolute "$run_dir")

# Tokens stay in a file of the user's, so that they are neither in this script nor in the queue.
if [ -n "$env_file" ]; then
    env_file=$(absolute "$env_file")
    if [ -f "$env_file" ]; then
        if [ -n "$(find -L "$env_file" -maxdepth 0 -perm /077)" ]; then
            say "warning: $env_file is open to others than its owner; chmod 600 it" >&2
        fi
        trap 'die "$env_file: a line of it failed; write NAME=VALUE, as for a shell"' ERR
        set -a
        # shellcheck source=/dev/null
        . "$env_file"
        set +a
        trap - ERR
    else
        say "warning: no $env_file; going on with the environment of sbatch alone" >&2
    fi
fi
join_timeout_s=${DPHRL_JOIN_TIMEOUT_S:-600}
if [ -n "${DPHRL_VENV:-}" ]; then export PATH=$DPHRL_VENV/bin:$PATH; fi
for program in ray dphrl python3 srun scontrol; do
    command -v "$program" >/dev/null || die "no $program on PATH; set DPHRL_VENV, or activate the environment first"
done
# Ray keeps many files and sockets open.
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true

# What this job writes for itself, for nobody else to read: the configuration, the token, Ray's output.
state=$run_dir/.slurm/$SLURM_JOB_ID
mkdir -p "$state"
chmod 700 "$state"
token_file=$state/ray-token
rm -f "$state/given-up"
: >"$state/started"
cat >"$state/config.yaml" <<'@END@'
@CONFIG@
@END@

declare -A rays=() # node: the srun that holds its Ray
train=
watchdog=
heard=
asked=
out_of_time=
take_down() {
    local pid
    for pid in $train $watchdog ${rays[@]+"${rays[@]}"}; do kill "$pid" 2>/dev/null || true; done
    rm -rf "$token_file" "$state/.ray"
}
# shellcheck disable=SC2329  # the traps call it
cleanup() {
    local status=$?
    trap - EXIT
    trap '' TERM INT USR1
    take_down
    # Slurm ends with the job what is left of it.
    exit "$status"
}
# shellcheck disable=SC2329  # the traps call it
end_run() { # end_run STATUS: at SIGTERM the driver gives up its rollouts, saves its last whole step, and ends with 143
    heard=yes
    [ -n "$train" ] || exit "$1"
    # A second time would end it at once.
    [ -n "$asked" ] || kill "$train" 2>/dev/null || true
    asked=yes
}
# shellcheck disable=SC2329  # the traps call it
time_is_short() {
    local end left
    [ -z "$asked" ] || return 0
    [ -n "$train" ] || die "out of time before the training began; ask for more --time"
    say "the time limit is near; the run saves and ends"
    out_of_time=yes
    end_run 1
    # It may be longer at its step than there is time. Then it is ended, and goes on from the checkpoint before.
    end=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.*EndTime=\([0-9T:-]*\).*/\1/p') || end=
    end=$(date -d "${end:-unknown}" +%s 2>/dev/null) || end=$(($(date +%s) + warning_s))
    left=$((end - $(date +%s) - margin_s))
    (
        sleep "$((left > 0 ? left : 0))"
        : >"$state/given-up"
        kill "$train" # a second time: at once
        sleep 2
        kill -KILL "$train"
    ) >/dev/null 2>&1 &
    watchdog=$!
}
trap cleanup EXIT
# Whoever cancels or preempts the job decides whether it goes back in the queue.
trap 'out_of_time=; end_run 143' TERM
trap 'out_of_time=; end_run 130' INT
trap time_is_short USR1

# ------------------------------------------------------------------------------------------ the cluster
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ "${#hosts[@]}" -ge "$num_nodes" ] || die "the run needs $num_nodes nodes; the job has ${#hosts[@]}"
num_nodes=${#hosts[@]}
head=${hosts[0]}

# As the other nodes resolve it; a machine often knows its own name as 127.0.1.1. This script runs on the first node.
head_ip=${DPHRL_HEAD_ADDRESS:-}
if [ -z "$head_ip" ]; then
    head_ip=$(getent ahostsv4 "$head" | awk '$1 !~ /^127\./ && !found { print $1; found = 1 }') || true
fi
if [ -z "$head_ip" ]; then
    head_ip=$(hostname -I | awk '{ for (i = 1; i <= NF && !found; i++) if ($i ~ /^[0-9.]+$/) { print $i; found = 1 } }')
fi
[ -n "$head_ip" ] || die "$head has no IPv4 address; set DPHRL_HEAD_ADDRESS"
# Where a site lets jobs share a node, each needs ports of its own.
port=$((@PORT@))
address=$head_ip:$port

# A token of this job's own: HOME is where Ray keeps one, and where Python looks for a user's packages.
# What sbatch's shell has of another Ray is not for this one.
unset RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH RAY_ADDRESS
(
    umask 077
    export PYTHONUSERBASE=${PYTHONUSERBASE:-$HOME/.local}
    HOME=$state ray get-auth-token --generate >"$token_file"
)
[ -s "$token_file" ] || die "Ray made no token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token_file

# Each node's Ray has all of the node: every core and GPU that this job has there, none bound to a task, whatever the
# options of sbatch left in the environment, and the job's memory. The steps overlap others, so that
# `srun --jobid JOB --pty bash`, or a step that a reward starts, does not wait until Ray ends.
step=(srun --export=ALL --nodes=1 --ntasks=1 --ntasks-per-node=1 --overlap --mem=0)
step+=(--cpus-per-task="$cpus" --cpu-bind=none)
if [ "$gpus" -gt 0 ]; then step+=(--gpus-per-node="$gpus" --gpu-bind=none); fi
# Sessions, logs and what Ray spilled would stay on a node's disk. So Ray runs below a bash, which passes signals on
# to it, and removes them when it has ended.
ray_files=/tmp/ray-$SLURM_JOB_ID
# shellcheck disable=SC2016  # for the bash of the step
{
    run_ray='"${@:2}" & ray=$!; trap "kill $ray 2>/dev/null" TERM INT'
    run_ray+='; while wait "$ray"; status=$?; kill -0 "$ray" 2>/dev/null; do :; done'
    run_ray+='; rm -rf "$1"; exit "$status"'
}
ray_start=(bash -c "$run_ray" ray-node "$ray_files")
ray_start+=(ray start --block --disable-usage-stats --num-cpus="$cpus" --num-gpus="$gpus" @STORE@)
ray_start+=(--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port="$((port + 1))")

start_ray() { # start_ray NODE OPTION...
    local node=$1
    shift
    "${step[@]}" --nodelist="$node" "${ray_start[@]}" "$@" >>"$state/ray-$node.log" 2>&1 &
    rays[$node]=$!
}
gone=
any_gone() { # whether the Ray of a node has ended: gone says which, and its last words are shown
    local node status
    for node in "${!rays[@]}"; do
        if kill -0 "${rays[$node]}" 2>/dev/null; then continue; fi
        status=0
        wait "${rays[$node]}" || status=$?
        gone="Ray on $node has ended: its srun has status $status, and its output is in $state/ray-$node.log"
        tail -n 5 "$state/ray-$node.log" | sed "s/^/$node: /" >&2
        return 0
    done
    return 1
}

say "head on $head ($address), $num_nodes nodes"
start_ray "$head" --head --node-ip-address="$head_ip" --port="$port" --dashboard-port="$((port + 2))" \
    --ray-client-server-port="$((port + 3))" --temp-dir="$ray_files"

deadline=$((SECONDS + join_timeout_s))
wait_for() { # wait_for WHAT COMMAND...: until the command succeeds, Ray ends, or it is too late
    local what=$1
    shift
    until "$@"; do
        if any_gone; then die "waiting for $what: $gone"; fi
        [ "$SECONDS" -lt "$deadline" ] || die "waited ${join_timeout_s}s for $what; see $state/*.log"
        sleep 5
    done
}
# shellcheck disable=SC2329  # wait_for calls it
head_answers() { timeout 60 ray health-check --address "$address" >/dev/null 2>&1; }
# shellcheck disable=SC2329  # wait_for calls it
all_joined() {
    joined=$(RAY_ADDRESS=$address timeout 60 python3 -c '
import ray
ray.init(logging_level="ERROR", log_to_driver=False)
print(sum(node["Alive"] for node in ray.nodes()))' 2>>"$state/wait.log" | tail -n 1) || true
    say "${joined:-0} of $num_nodes nodes are there"
    [ "${joined:-0}" -ge "$num_nodes" ]
}

wait_for "the head" head_answers
for host in "${hosts[@]:1}"; do start_ray "$host" --address="$address"; done
wait_for "$num_nodes nodes" all_joined

# ------------------------------------------------------------------------------------------ the run
checkpoints=$run_dir/$run_name/checkpoints
resume=()
# Started again by Slurm before the first checkpoint, it begins at step 1 in the folder that is there.
if compgen -G "$checkpoints/step_*" >/dev/null || [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then resume=(--resume); fi

RAY_ADDRESS=$address dphrl train "$state/config.yaml" "run_dir=$run_dir" ${resume[@]+"${resume[@]}"} &
train=$!

# A signal ends `wait`, not the run. 127: an earlier `wait` had its status.
status=127
while
    heard=
    waited=0
    wait "$train" || waited=$?
    [ "$waited" -eq 127 ] || status=$waited
    [ -n "$heard" ]
do :; done
train=
if [ "$status" -eq 1 ] && any_gone; then say "$gone" >&2; fi
take_down

# Back in the queue only if time alone ended it: not when it was done (0), failed (1), or was given bad input (2).
stopped=
if [ "$status" -eq 143 ] || { [ "$status" -eq 137 ] && [ -e "$state/given-up" ]; }; then stopped=yes; fi
if [ -n "$out_of_time" ] && [ -n "$stopped" ]; then
    # Without progress it would go round for ever. Chunks are those of the reference stage and of evaluations.
    [ -n "$(find "$run_dir/$run_name" -newer "$state/started" \
        \( -path "*/checkpoints/step_*" -o -name "chunk_*.parquet" \) -print -quit 2>/dev/null)" ] ||
        die "out of time, and nothing was saved since it began; lower checkpoint.every_minutes, or ask for more --time"
    say "out of time; back in the queue, to go on from what is saved"
    scontrol requeue "$SLURM_JOB_ID" ||
        say "it could not be put back in the queue; the same sbatch command goes on from what is saved" >&2
fi
exit "$status"
"""
