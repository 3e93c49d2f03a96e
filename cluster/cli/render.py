"""`dphrl render`: write a file that starts a run on a cluster."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.cli.support import CONFIG_HELP, ConfigArgument, OverridesArgument, exit_status, say

KindArgument = Annotated[
    Literal["kubernetes", "slurm", "compose", "ray"],
    typer.Argument(metavar="kubernetes|slurm|compose|ray", help="What is to start the run."),
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="The file; standard output if not given.")]
ImageOption = Annotated[str, typer.Option("--image", help="Container image; else dphrl:cuda or dphrl:cpu.")]
GpusOption = Annotated[
    int | None, typer.Option("--gpus-per-node", min=0, help="GPUs of a node; else what the run takes, up to 8.")
]
CpusOption = Annotated[
    int | None, typer.Option("--cpus-per-node", min=1, help="CPUs of a node for Ray; else 10 a GPU, or 8.")
]
MemoryOption = Annotated[
    int | None,
    typer.Option(
        "--memory-per-node", metavar="GIB", min=1, help="Kubernetes: of a node; else as planned. Slurm: else all."
    ),
]
NodesOption = Annotated[
    int | None, typer.Option("--max-nodes", min=1, help="How far the cluster may grow; else to what is needed.")
]
NamespaceOption = Annotated[str, typer.Option("--namespace", help="Kubernetes namespace.")]
ClaimOption = Annotated[
    str, typer.Option("--volume-claim", metavar="NAME", help="Kubernetes: a shared volume that exists.")
]
VolumeOption = Annotated[
    str,
    typer.Option("--volume-size", metavar="SIZE", help="Kubernetes: of the volume made otherwise; else as planned."),
]
ClassOption = Annotated[
    str,
    typer.Option("--storage-class", metavar="NAME", help="Kubernetes: of that volume; it must offer ReadWriteMany."),
]
SecretOption = Annotated[
    str,
    typer.Option(
        "--secret",
        metavar="NAME",
        help="The Secret with HF_TOKEN and the like, if it exists; Compose: the file NAME.env. '' for none.",
    ),
]
EnvOption = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME=VALUE", help="A variable of the run's processes, such as NCCL's; repeat it."),
]
SelectorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--node-selector", metavar="NAME=VALUE", help="Kubernetes: label of nodes for workers (with GPUs); repeat it."
    ),
]
ResourceOption = Annotated[
    list[str] | None,
    typer.Option("--resource", metavar="NAME=AMOUNT", help="Kubernetes: what these ask for too: rdma/ib=8; repeat it."),
]
PullOption = Annotated[
    str, typer.Option("--image-pull-secret", metavar="NAME", help="Kubernetes: the Secret to pull the image with.")
]
DeadlineOption = Annotated[
    int | None,
    typer.Option(
        "--active-deadline", metavar="SECONDS", min=1, help="Kubernetes: end the job after this time; else never."
    ),
]
EnvFileOption = Annotated[
    str, typer.Option("--env-file", metavar="PATH", help="Slurm: NAME=VALUE lines, read when the job starts.")
]
WarningOption = Annotated[
    int, typer.Option("--warn-before", metavar="SECONDS", help="Slurm: how long before its time is up a run saves.")
]
HostOption = Annotated[
    list[str] | None, typer.Option("--host", metavar="ADDRESS", help="ray: a machine; repeat it, the head first.")
]
UserOption = Annotated[str, typer.Option("--ssh-user", help="ray: who logs in on the machines.")]
KeyOption = Annotated[str, typer.Option("--ssh-key", metavar="PATH", help="ray: the private key for that.")]


def add_render_command(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        short_help="Write a file that starts a run on a cluster.",
        help=f"""Write the file that starts a run on Kubernetes, Slurm, Docker Compose, or your own machines (`ray up`).

{CONFIG_HELP}

The file holds the configuration, makes as many nodes as the run needs, and says at its top how to use it. On Kubernetes
memory and volume are what `dphrl plan --simulate` shows.

\b
Examples:
  dphrl render kubernetes my.yaml --image registry/dphrl:cuda --gpus-per-node 8 -o run.yaml
  dphrl render kubernetes my.yaml --node-selector gpu=h100 --resource rdma/ib=8 --env NCCL_IB_HCA=mlx5 -o run.yaml
  dphrl render slurm my.yaml run_dir=/shared/runs --gpus-per-node 8 | sbatch --partition gpu
  dphrl render compose demo-math -o compose.yaml
  dphrl render ray my.yaml run_dir=/shared/runs --host 10.0.0.1 --host 10.0.0.2 --ssh-key ~/.ssh/id -o cluster.yaml""",
    )(render)


def render(
    kind: KindArgument,
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    output: OutputOption = None,
    image: ImageOption = "",
    gpus_per_node: GpusOption = None,
    cpus_per_node: CpusOption = None,
    memory_per_node: MemoryOption = None,
    max_nodes: NodesOption = None,
    namespace: NamespaceOption = "",
    volume_claim: ClaimOption = "",
    volume_size: VolumeOption = "",
    storage_class: ClassOption = "",
    secret: SecretOption = "dphrl",
    env: EnvOption = None,
    node_selector: SelectorOption = None,
    resource: ResourceOption = None,
    image_pull_secret: PullOption = "",
    active_deadline: DeadlineOption = None,
    env_file: EnvFileOption = "",
    warn_before: WarningOption = 300,
    host: HostOption = None,
    ssh_user: UserOption = "ubuntu",
    ssh_key: KeyOption = "",
) -> None:
    with exit_status() as run:
        loaded = run.load(config, overrides)
        import cluster.render.nodes as rendering
        from dphrl.outputs import check_output, save_output

        if output is not None:
            check_output(output)
        options = rendering.RenderOptions(
            image=image,
            gpus_per_node=gpus_per_node,
            cpus_per_node=cpus_per_node,
            memory_gib_per_node=memory_per_node,
            max_nodes=max_nodes,
            namespace=namespace,
            volume_claim=volume_claim,
            volume_size=volume_size,
            storage_class=storage_class,
            secret=secret,
            env=tuple(env or []),
            node_selector=tuple(node_selector or []),
            resources=tuple(resource or []),
            image_pull_secret=image_pull_secret,
            active_deadline_s=active_deadline,
            env_file=env_file,
            warn_before_s=warn_before,
            hosts=tuple(host or []),
            ssh_user=ssh_user,
            ssh_key=ssh_key,
            command=_command_line(),
        )
        text = rendering.render(kind, loaded, options)
        if output is None:
            sys.stdout.write(text)
            return
        save_output(output, text)
        say(f"written to {output}; its first lines say how to use it")


def _command_line() -> str:
    """The command that was typed, without --output: the text of a file should not depend on where the file goes."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word in ("-o", "--output"):
            skip = not skip
        elif not word.startswith(("--output=", "-o")):
            words.append(word)
    return shlex.join(["dphrl", *words])
