"""A run on Slurm: one batch script that starts a Ray cluster on its nodes, trains, and takes the cluster down.

Plain bash, no `module load`: the environment is the submitting shell's, or DPHRL_VENV's. The script is written so that
Slurm may start it again: it goes on from the last checkpoint.
"""

from __future__ import annotations

import shlex

from cluster.render.nodes import RenderOptions, as_comments, made_by, node_shape, nodes_for, object_name, with_settings
from dphrl.config.loading import config_to_yaml
from dphrl.config.schema import Config

TIME_LIMIT = "24:00:00"
# Slurm warns so long before the time limit ends; in that time, a job that is to go on must be put back in the queue.
WARNING_S = 120


def render_slurm(config: Config, options: RenderOptions) -> str:
    """The script for `sbatch`. Raises InputError when the nodes cannot hold the run."""
    nodes = nodes_for(config, options, node_shape(config, options))
    settings = config_to_yaml(with_settings(config, config.run_dir, autoscaling="none"))
    store = config.cluster.object_store_gib
    directives = [
        f"--job-name={object_name(config.run_name)}",
        f"--nodes={nodes.count}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={nodes.cpus}",
        *([f"--gpus-per-node={nodes.gpus}"] if nodes.gpus else []),
        # Otherwise Ray's ports could be those of another job's Ray on the same node.
        "--exclusive",
        f"--time={TIME_LIMIT}",
        "--output=%x-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{WARNING_S}",
    ]
    values = {
        "DIRECTIVES": "\n".join(f"#SBATCH {directive}" for directive in directives),
        "HEADER": as_comments(_header(config, options, str(nodes))),
        "NODES": str(nodes.count),
        "CPUS": str(nodes.cpus),
        "GPUS": str(nodes.gpus),
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
join_timeout_s=${DPHRL_JOIN_TIMEOUT_S:-600}

say() { printf 'dphrl: %s\n' "$*"; }
die() { printf 'dphrl: failed: %s\n' "$*" >&2; exit 1; }

cd "${SLURM_SUBMIT_DIR:-$PWD}"
case $run_dir in
    /*) ;;
    '~'/*) run_dir=$HOME/${run_dir#'~/'} ;;
    *) run_dir=$PWD/$run_dir ;;
esac
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
: >"$state/started"
cat >"$state/config.yaml" <<'@END@'
@CONFIG@
@END@

steps=()
train=
out_of_time=
# shellcheck disable=SC2329  # the traps call it
cleanup() {
    local status=$? pid
    trap - EXIT
    trap '' TERM INT USR1
    for pid in $train ${steps[@]+"${steps[@]}"}; do kill "$pid" 2>/dev/null || true; done
    rm -rf "$token_file" "$state/.ray"
    # Slurm ends with the job what is left of it.
    exit "$status"
}
trap cleanup EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

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
address=$head_ip:$((20000 + SLURM_JOB_ID % 10000))

# A token of this job's own: HOME is where Ray keeps one, and where Python looks for a user's packages.
unset RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH
(
    umask 077
    export PYTHONUSERBASE=${PYTHONUSERBASE:-$HOME/.local}
    HOME=$state ray get-auth-token --generate >"$token_file"
)
[ -s "$token_file" ] || die "Ray made no token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token_file

step=(srun --export=ALL --ntasks-per-node=1 --cpus-per-task="$cpus")
if [ "$gpus" -gt 0 ]; then step+=(--gpus-per-node="$gpus"); fi
ray_start=(ray start --block --disable-usage-stats --num-cpus="$cpus" --num-gpus="$gpus" @STORE@)

say "head on $head ($address), $num_nodes nodes"
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" \
    "${ray_start[@]}" --head --node-ip-address="$head_ip" --port="${address##*:}" \
    --temp-dir="/tmp/ray-$SLURM_JOB_ID" >"$state/head.log" 2>&1 &
steps+=($!)

deadline=$((SECONDS + join_timeout_s))
wait_for() { # wait_for WHAT COMMAND...: until the command succeeds, Ray ends, or it is too late
    local what=$1 pid
    shift
    until "$@"; do
        for pid in "${steps[@]}"; do
            kill -0 "$pid" 2>/dev/null || die "Ray ended while waiting for $what; see $state/*.log"
        done
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
if [ "$num_nodes" -gt 1 ]; then
    "${step[@]}" --nodes="$((num_nodes - 1))" --ntasks="$((num_nodes - 1))" --exclude="$head" \
        "${ray_start[@]}" --address="$address" >"$state/workers.log" 2>&1 &
    steps+=($!)
fi
wait_for "$num_nodes nodes" all_joined

# ------------------------------------------------------------------------------------------ the run
checkpoints=$run_dir/$run_name/checkpoints
resume=()
# Started again by Slurm before the first checkpoint, it begins at step 1 in the folder that is there.
if compgen -G "$checkpoints/step_*" >/dev/null || [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then resume=(--resume); fi

RAY_ADDRESS=$address dphrl train "$state/config.yaml" "run_dir=$run_dir" ${resume[@]+"${resume[@]}"} &
train=$!
trap 'out_of_time=yes; kill "$train" 2>/dev/null || true' USR1

# A signal ends `wait`, not the run.
status=0
wait "$train" || status=$?
while kill -0 "$train" 2>/dev/null; do wait "$train" || status=$?; done
train=

if [ -n "$out_of_time" ] && [ "$status" -ne 0 ]; then
    # Without progress it would go round for ever.
    [ -n "$(find "$checkpoints" -maxdepth 1 -name 'step_*' -newer "$state/started" -print -quit 2>/dev/null)" ] ||
        die "out of time without a new checkpoint; lower checkpoint.every_steps, or ask for a longer --time"
    say "out of time; back in the queue, to go on from the last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
