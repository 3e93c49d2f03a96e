"""What `dphrl submit` hands to Ray Jobs, and what its commands make of the answers. The cluster is not asked here."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.jobs.client import Job, JobClient, exit_status_of, next_id
from cluster.jobs.submission import STOP_WAIT, plan_submission
from cluster.jobs.wheel import stand_alone
from dphrl import __version__
from dphrl.config.loading import InputError

ROOT = Path(__file__).resolve().parents[2]
ALWAYS_SET = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": "120"}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def job(status: str, exit_status: int | None = None, job_id: str = "mine") -> Job:
    return Job(job_id, status, "python", 1.0, 2.0, exit_status, "")


# ------------------------------------------------------------ what is submitted


def test_a_preset_with_its_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["learner.num_steps=4", "algorithm.divergence={name: alpha, alpha: 0.5}"]
    plan = plan_submission("demo-math", overrides, resume=True, insist=True, working_dir=tmp_path, environ={})
    words = shlex.split(plan.entrypoint)
    assert words[:6] == ["python", "-P", "-m", "dphrl", "train", "demo-math"]
    assert words[6:] == [*overrides, f"run_dir={tmp_path / 'runs'}", "--resume", "--insist"]
    assert plan.run_name == "demo-math"
    assert plan.runtime_env["working_dir"] == str(tmp_path)
    assert "runs" in plan.runtime_env["excludes"]
    assert plan.runtime_env["env_vars"] == ALWAYS_SET
    assert str(tmp_path / "runs" / "demo-math") in plan.notes[0]


def test_an_absolute_run_dir_is_left_alone(tmp_path: Path) -> None:
    plan = plan_submission("demo-math", [f"run_dir={tmp_path}"], working_dir=tmp_path, environ={})
    assert plan.entrypoint.count("run_dir=") == 1
    assert plan.notes == ()


def test_a_file_is_named_as_the_job_will_find_it(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    path = folder / "mine.yaml"
    path.write_text("base: demo-math\nrun_name: mine\nrun_dir: /shared\n")
    uploaded = plan_submission(str(path), [], working_dir=tmp_path, environ={})
    assert shlex.split(uploaded.entrypoint)[5:] == ["configs/mine.yaml"]
    assert "working_dir" not in plan_submission(str(path), [], environ={}).runtime_env
    assert shlex.split(plan_submission(str(path), [], environ={}).entrypoint)[5] == str(path)
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    with pytest.raises(InputError, match="lies outside the uploaded folder"):
        plan_submission(str(path), [], working_dir=elsewhere, environ={})


def test_a_folder_that_would_hide_the_program_changes_how_it_is_started(tmp_path: Path) -> None:
    for name in ("actors", "cluster"):
        (tmp_path / name).mkdir()
    usual = plan_submission("demo-math", [], working_dir=tmp_path, environ={}).entrypoint
    assert shlex.split(usual)[:4] == ["python", "-P", "-m", "dphrl"]
    (tmp_path / "dphrl").mkdir()
    (tmp_path / "dphrl" / "__init__.py").write_text("raise SystemExit('theirs was loaded')")
    (tmp_path / "my_rewards.py").write_text("print('their reward can be imported')")
    words = shlex.split(plan_submission("demo-math", [], working_dir=tmp_path, environ={}).entrypoint)
    assert words[:3] == ["python", "-P", "-c"]
    assert words[4:6] == ["train", "demo-math"]
    # As Ray starts it: in the uploaded folder, which is first on the path.
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    # The user's modules are found as before.
    with_theirs = words[3].replace("main()", "import my_rewards; main()")
    for arguments in ([*words[1:4], "version"], ["-P", "-c", with_theirs, "version"]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout.split()[-1]) == (0, __version__), done.stdout + done.stderr
    # A wheel is before the uploaded folder on the path.
    with_wheel = plan_submission("demo-math", [], working_dir=tmp_path, wheel=make_wheel(tmp_path), environ={})
    assert shlex.split(with_wheel.entrypoint)[:4] == ["python", "-P", "-m", "dphrl"]


def make_wheel(folder: Path, version: bytes = b"0.1.0") -> Path:
    """As pip builds one, with a requirement that no machine can meet."""
    wheel = folder / "dphrl-0.1.0-py3-none-any.whl"
    about = "dphrl-0.1.0.dist-info"
    fields = b"Metadata-Version: 2.4\nName: dphrl\nVersion: 0.1.0\nRequires-Dist: no-such-package==99\n"
    metadata = fields + b"\nRequires-Dist: is a field\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("dphrl/__init__.py", b"__version__ = '%s'" % version)
        archive.writestr("dphrl/own_code.py", b"")
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", f"dphrl/__init__.py,,\n{about}/METADATA,sha256=abc,9\n{about}/RECORD,,\n")
    return wheel


def test_a_wheel_brings_the_program_alone_and_is_known_by_its_content(tmp_path: Path) -> None:
    """Ray has pip install it into an empty folder, and sends a wheel once for each name."""
    (tmp_path / "made").mkdir()
    made = stand_alone(make_wheel(tmp_path), tmp_path / "made")
    assert stand_alone(make_wheel(tmp_path), tmp_path / "made") == made
    assert stand_alone(make_wheel(tmp_path, b"0.1.0+more"), tmp_path / "made").name != made.name
    pip = [sys.executable, "-m", "pip", "install", "--no-index", f"--target={tmp_path / 'there'}", str(made)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there" / "dphrl" / "own_code.py").is_file()
    (metadata,) = (tmp_path / "there").glob("*.dist-info/METADATA")
    assert metadata.read_text().count("Requires-Dist") == 1, "the description stays"


def test_environment_and_wheel(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    here = {"DPHRL_DATA": "/data", "SECRET": "x", "WANDB_MODE": "offline", "HF_HOME": ""}
    plan = plan_submission("demo-math", [], wheel=wheel, env=["WANDB_MODE", "A=1=2"], environ=here)
    variables = plan.runtime_env["env_vars"]
    assert variables == {**ALWAYS_SET, "DPHRL_DATA": "/data", "WANDB_MODE": "offline", "A": "1=2"}
    assert plan.wheel == wheel
    assert "working_dir" not in plan.runtime_env, "a wheel needs no folder beside it"


def test_how_long_a_stopped_job_may_save_can_be_given() -> None:
    plan = plan_submission("demo-math", [], env=["RAY_JOB_STOP_WAIT_TIME_S=600"], environ={})
    assert plan.runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"


def test_ray_reads_that_variable() -> None:
    from ray.dashboard.modules.job import job_supervisor

    assert set(STOP_WAIT) <= set(re.findall(r'os\.environ\.get\(\s*"(\w+)"', inspect.getsource(job_supervisor)))


def test_no_secret_travels_with_a_job() -> None:
    here = {
        "MLFLOW_TRACKING_URI": "https://me:sesame@mlflow",
        "WANDB_API_KEY": "sesame",
        "HF_TOKEN": "sesame",
        "DPHRL_DATA": "s3://me:sesame@bucket/data",
        "HF_HOME": "/shared/hf",
    }
    plan = plan_submission("demo-math", ["tracking.mlflow=true", "tracking.wandb=true"], environ=here)
    assert "sesame" not in f"{plan}"
    assert plan.runtime_env["env_vars"] == {**ALWAYS_SET, "HF_HOME": "/shared/hf"}
    said = [note for note in plan.notes if "the nodes' own environment must hold it" in note]
    assert [note.split()[0] for note in said] == ["WANDB_API_KEY", "MLFLOW_TRACKING_URI"]


@pytest.mark.parametrize(
    "text", ["WANDB_API_KEY", "MY_SECRET_2", "GIT_PAT", "X_PASSWORD", "A=https://a-token-of-so-many@host/x"]
)
def test_a_secret_is_told_by_its_name_or_its_text_and_not_shown(text: str) -> None:
    with pytest.raises(InputError, match="looks like a secret") as caught:
        plan_submission("demo-math", [], env=[text], environ={text: "sesame"})
    assert "sesame" not in str(caught.value)
    assert "so-many@" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("KEYBOARD=x", "TOKENIZERS_PARALLELISM=false", "MONKEY=1", "DATA=hf://datasets/a/b@c", "PAT_LENGTH=9"),
        *("SSL_KEY_FILE=/etc/ssl/key.pem", "SSL_KEY_FILE=one", "GOOGLE_APPLICATION_CREDENTIALS=/shared/one"),
        *("OPENAI_API_KEY=EMPTY", "DATA=abfss://container@account.dfs.core.windows.net/x", "REPO=ssh://git@host/x"),
    ],
)
def test_what_is_no_secret_goes_along(text: str) -> None:
    assert plan_submission("demo-math", [], env=[text], environ={}).runtime_env["env_vars"][text.partition("=")[0]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo-math", "learner.num_stepz=3"], "learner.num_stepz: unknown key"),
        (["demo-math", "--working-dir", "/no/such"], "--working-dir /no/such: no such folder"),
        (["demo-math", "--wheel", "/no/such.whl"], "--wheel /no/such.whl: no such wheel"),
        (["demo-math", "--wheel", "OTHER"], "OTHER: holds no dphrl (dphrl/own_code.py is not in it); make one with"),
        (["demo-math", "--wheel", "BROKEN"], "BROKEN: cannot be read (File is not a zip file); make one with"),
        (["demo-math", "--include", "*.bin", "--no-upload"], "--include and --no-upload: nothing is uploaded"),
        (["demo-math", "--env", "A-B=1"], "--env A-B: write NAME=VALUE"),
        (["demo-math", "--env", "HF_TOKEN=hf_x"], "--env HF_TOKEN: looks like a secret"),
        (["demo-math", "--env", "DB=postgres://me:pw@host/x"], "--env DB: looks like a secret"),
        (
            ["demo-math", "reward.name=a:b", "reward.params={api_key: sk-x0123}"],
            "command line: reward.params.api_key: looks like a secret",
        ),
        (["demo-math", "--env", "SURELY_NOT_SET_HERE"], "--env SURELY_NOT_SET_HERE: not set here"),
        (["demo-math", "--resume", "--overwrite"], "--resume and --overwrite"),
        (["demo-math", "--insist"], "--insist: is about a run that goes on; add --resume"),
        (["demo-math", "--address", "http://127.0.0.1:1"], "http://127.0.0.1:1: no Ray cluster answers there"),
    ],
)
def test_bad_input_ends_before_anything_is_submitted(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken-1-py3-none-any.whl").touch()
    zipfile.ZipFile(tmp_path / "other-1-py3-none-any.whl", "w").close()
    names = {"OTHER": "other-1-py3-none-any.whl", "BROKEN": "broken-1-py3-none-any.whl"}
    for name, path in names.items():
        arguments, words = [path if word == name else word for word in arguments], words.replace(name, path)
    result = invoke("submit", *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert words in line


def test_jobs_are_named_after_their_run() -> None:
    assert next_id("demo-math", []) == "demo-math"
    assert next_id("demo-math", ["demo-math", "demo-math-js", "other"]) == "demo-math-2"
    assert next_id("demo-math", ["demo-math", "demo-math-9", "demo-math-x"]) == "demo-math-10"
    assert next_id("a.b", ["a-b"]) == "a-b-2"  # Ray's ids go into paths and URLs


# ------------------------------------------------------------ what comes back


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (job("SUCCEEDED", 0), 0),
        (job("FAILED", 2), 2),
        (job("FAILED", 1), 1),
        (job("FAILED", None), 1),  # its node went away
        (job("FAILED", -9), 1),
        (job("STOPPED", None), 130),
    ],
)
def test_the_jobs_status_is_the_commands(ended: Job, status: int) -> None:
    assert exit_status_of(ended) == status


class FakeClient:
    """Ray's client, as far as these commands ask it."""

    def __init__(self, jobs: list[Any]) -> None:
        self.jobs, self.submitted = jobs, []

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def submit_job(self, **job: Any) -> str:
        self.submitted.append(job)
        return str(job["submission_id"])

    def stop_job(self, job_id: str) -> bool:
        if job_id == "lost":
            raise RuntimeError("Request failed with status code 404: Job lost does not exist")
        return job_id == "running"

    def get_job_info(self, job_id: str) -> Any:
        ended = details(job_id, "FAILED" if job_id == "bad" else "SUCCEEDED")
        ended.driver_exit_code = 2 if job_id == "bad" else 0
        return ended

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield f"first of {job_id}\n"
        yield "last\n"

    def get_job_logs(self, job_id: str) -> str:
        return f"the log of {job_id}\n"


def details(job_id: str | None, status: str, start: int = 0) -> Any:
    return SimpleNamespace(
        submission_id=job_id, status=status, entrypoint="python x", start_time=start, end_time=start + 5000,
        driver_exit_code=None, message=None,
    )  # fmt: skip


@pytest.fixture
def ray_jobs(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    client = FakeClient(
        [details("late", "RUNNING", 2000), details("demo-math", "SUCCEEDED", 1000), details(None, "RUNNING")]
    )
    import ray.job_submission

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", lambda address: client)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return client


def test_the_wheel_is_sent_as_ray_needs_it(ray_jobs: FakeClient, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    done = invoke("submit", "demo-math", f"run_dir={tmp_path}", "--no-upload", "--wheel", str(wheel))
    assert done.exit_code == 0, done.output
    (sent,) = ray_jobs.submitted
    (path,) = sent["runtime_env"]["py_modules"]
    assert re.fullmatch(r"dphrl-0\.1\.0-0[0-9a-f]{16}-py3-none-any\.whl", Path(path).name)


def test_submit_without_wait_says_how_to_follow(ray_jobs: FakeClient, tmp_path: Path) -> None:
    result = invoke("submit", "demo-math", f"run_dir={tmp_path}", "--no-upload")
    assert result.exit_code == 0, result.output
    assert "submitted as demo-math-2 to http://127.0.0.1:8265" in result.output
    assert "dphrl jobs logs demo-math-2 --follow" in result.output
    (sent,) = ray_jobs.submitted
    assert sent["metadata"] == {"dphrl_run": "demo-math", "dphrl_folder": f"{tmp_path}/demo-math"}


def test_a_submitted_run_may_insist(ray_jobs: FakeClient, tmp_path: Path) -> None:
    assert invoke("submit", "demo-math", f"run_dir={tmp_path}", "--no-upload", "--resume", "--insist").exit_code == 0
    assert ray_jobs.submitted[0]["entrypoint"].endswith(" --resume --insist")


def test_two_jobs_of_one_run_would_share_its_folder(ray_jobs: FakeClient, tmp_path: Path) -> None:
    result = invoke("submit", "demo-math", "run_name=late", f"run_dir={tmp_path}", "--no-upload")
    assert result.exit_code == 2
    assert "late: is still" in result.stderr
    assert ray_jobs.submitted == []


def test_list_logs_and_stop(ray_jobs: FakeClient) -> None:
    lines = invoke("jobs", "list").output.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["demo-math", "late"]  # oldest first, drivers left out
    assert invoke("jobs", "logs", "late").output == "the log of late\n"
    assert invoke("jobs", "stop", "running").output == "running is being stopped\n"
    assert invoke("jobs", "stop", "late").output == "late had ended already\n"
    lost = invoke("jobs", "stop", "lost")
    assert (lost.exit_code, "no such job" in lost.stderr) == (2, True)


@pytest.mark.parametrize(("job_id", "status", "words"), [("bad", 2, "job bad failed, exit status 2"), ("good", 0, "")])
def test_following_shows_the_log_and_exits_as_the_job_did(
    ray_jobs: FakeClient, job_id: str, status: int, words: str
) -> None:
    done = invoke("jobs", "logs", job_id, "--follow")
    assert (done.exit_code, done.stdout) == (status, f"first of {job_id}\nlast\n")
    assert done.stderr.strip().removeprefix("dphrl: ") == words


def test_an_address_given_beats_the_environment(ray_jobs: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    assert JobClient(None).address == "http://other:8265"
    assert JobClient("http://head:8265").address == "http://head:8265"


def test_a_missing_token_is_said_without_rays_essay(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.job_submission

    def refuse(address: str) -> None:
        raise ray.exceptions.AuthenticationError("Unauthorized: Missing authentication token")

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", refuse)
    result = invoke("jobs", "list", "--address", "http://head:8265")
    assert result.exit_code == 2
    assert "the cluster wants a token" in result.stderr


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("Request failed with status code 500: No available agent to submit job", "see dashboard_agent.log there"),
        ("Request failed with status code 401: nobody", "the cluster wants a token; set RAY_AUTH_MODE=token"),
        (
            "Request failed with status code 500: out of\n disk",
            "the cluster refused: Request failed with status code 500",
        ),
    ],
)
def test_a_refusal_of_the_cluster_is_a_line(
    reply: str, words: str, ray_jobs: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise RuntimeError(reply)

    monkeypatch.setattr(ray_jobs, "submit_job", refuse)
    result = invoke("submit", "demo-math")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert words in line
