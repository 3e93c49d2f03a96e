"""The file for `ray up`: taken by Ray's own checks, and by Ray's own launcher, for a machine that is a stand-in."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.render.launcher import SECRETS
from cluster.render.nodes import RenderOptions, render
from dphrl.config.loading import InputError, list_presets, load_config

BIN = Path(sys.executable).parent
HOSTS = ("10.0.0.1", "10.0.0.2", "node-3.example")
SHARED = "run_dir=/shared/runs"
AWKWARD = "data.prompt_template=\"Solve {question}\n\n$HOME ${HOME} `id` 'x' \\boxed{}  \nEND_OF_CONFIG\""


def file_for(name: str, *overrides: str, **options: Any) -> dict[str, Any]:
    config = load_config(name, [SHARED, *overrides])
    found: dict[str, Any] = yaml.safe_load(render("ray", config, RenderOptions(**{"hosts": HOSTS, **options})))
    return found


def take(document: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of it; it raises, or exits, on what it does not take."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(document))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("options", [{}, {"image": "dphrl:cuda", "ssh_key": "~/.ssh/id", "ssh_user": "ray"}])
@pytest.mark.parametrize("name", list_presets())
def test_every_preset_is_taken_by_rays_own_checks(name: str, options: dict[str, str]) -> None:
    prepared = take(file_for(name, **options))
    (kind,) = prepared["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"]) == (2, 2)
    assert prepared["provider"]["worker_ips"] == list(HOSTS[1:])


@pytest.mark.parametrize(
    "broken", [{"max_worker": 2}, {"auth": {"ssh_usr": "x"}}, {"docker": {"images": "x"}}, {"head_ip": "1.2.3.4"}]
)
def test_rays_checks_see_a_field_that_does_not_exist(broken: dict[str, Any]) -> None:
    document = file_for("demo-math")
    take(document)
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        take(document | broken)


def test_a_container_sees_the_folder_of_the_runs_and_no_secret_stands_in_the_file(monkeypatch: Any) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "not-for-a-file")
    config = load_config("demo-math", [SHARED])
    text = render("ray", config, RenderOptions(hosts=HOSTS, image="dphrl:cpu"))
    assert "not-for-a-file" not in text
    docker = yaml.safe_load(text)["docker"]
    assert "-v /shared/runs:/shared/runs" in docker["run_options"]
    assert {f"-e {name}" for name in SECRETS} <= set(docker["run_options"])


def test_what_is_known_of_a_machine_is_told_and_the_rest_is_left_to_ray() -> None:
    start = file_for("demo-math", "cluster.object_store_gib=null")["worker_start_ray_commands"][-1]
    assert "num-" not in start
    assert "object-store" not in start
    told = file_for("demo-math", "cluster.object_store_gib=2", gpus_per_node=4, cpus_per_node=40)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "--num-gpus=4 --num-cpus=40 --object-store-memory=2147483648" in told[key][-1]


STANDINS = {
    # Runs on this machine what it was to run over there: everything behind the address.
    "ssh": """import os, sys
words = sys.argv[1:]
at = next(i for i, word in enumerate(words) if word == "ubuntu@10.0.0.1")
open(os.environ["LOG"], "a").write("ssh\\n")
os.environ["HOME"] = os.environ["THERE"]
os.execvp("bash", ["bash", "-c", " ".join(words[at + 1:]) or "true"])""",
    "rsync": """import os, pathlib, shutil, sys
source, target = sys.argv[-2:]
target = pathlib.Path(target.partition(":")[2].replace("~", os.environ["THERE"], 1))
target.parent.mkdir(parents=True, exist_ok=True)
shutil.copy(source, target)""",
    "ray": """import os, sys
seen = " ".join(f"{key}={os.environ.get(key)}" for key in ("OMP_NUM_THREADS", "RAY_AUTH_MODE", "RAY_worker_niceness"))
open(os.environ["LOG"], "a").write(f"ray {' '.join(sys.argv[1:])} [{seen}]\\n")""",
}


def test_rays_launcher_writes_the_configuration_and_the_token_and_starts_the_head(tmp_path: Path) -> None:
    """Its own program, up to the commands that it sends; SSH, and Ray on the machine, are stand-ins."""
    there, here, tools, log = (tmp_path / name for name in ("there", "here", "tools", "log"))
    for folder in (there, here / ".ray", tools):
        folder.mkdir(parents=True)
    (here / ".ray" / "auth_token").write_text("a" * 64)
    # A login shell finds programs where its own files say.
    (there / ".bashrc").write_text(f"export PATH={tools}:$PATH\n")
    for name, program in STANDINS.items():
        (tools / name).write_text(f"#!{sys.executable}\n{program}\n")
        (tools / name).chmod(0o755)
    config = load_config("demo-math", [SHARED, AWKWARD])
    (tmp_path / "cluster.yaml").write_text(render("ray", config, RenderOptions(hosts=HOSTS)))
    done = subprocess.run(
        [str(BIN / "ray"), "up", str(tmp_path / "cluster.yaml"), "--yes", "--no-config-cache"],
        env=os.environ
        | {"HOME": str(here), "THERE": str(there), "LOG": str(log), "PATH": f"{tools}:{os.environ['PATH']}"}
        | {"RAY_TMPDIR": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (there / ".ray" / "auth_token").read_text() == "a" * 64
    written = load_config(str(there / ".dphrl" / "dphrl-demo-math.yaml"), [])
    assert written.data == config.data
    assert (written.run_dir, written.cluster.address) == ("/shared/runs", "10.0.0.1:6379")
    (started,) = [line for line in log.read_text().splitlines() if line.startswith("ray start")]
    assert started.startswith("ray start --head --port=6379 --autoscaling-config=")
    assert started.endswith("[OMP_NUM_THREADS=None RAY_AUTH_MODE=token RAY_worker_niceness=0]")


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"hosts": ()}, "--host: no machine; name each"),
        ([], {"hosts": ("me@x",)}, "--host me@x: no address; give a name"),
        ([], {"hosts": ("a", "b", "a")}, "--host a: is there twice; name"),
        ([], {"ssh_user": "a b"}, "--ssh-user a b: no name of a user; give"),
        (["run_dir=runs"], {}, "run_dir runs: is relative, and every machine must see it; give"),
        ([], {"gpus_per_node": 2}, "--host: 3 given; this run needs 4 nodes of 2 GPUs and 20 CPUs; name as many"),
    ],
)
def test_a_bad_option_is_one_line(overrides: list[str], options: dict[str, Any], message: str) -> None:
    config = load_config("paper/sql-dph-js", [SHARED, *overrides])
    with pytest.raises(InputError) as caught:
        render("ray", config, RenderOptions(**{"hosts": HOSTS, **options}))
    assert len(caught.value.lines) == 1
    assert str(caught.value).startswith(message)
