"""What `dphrl submit` hands to the cluster: the command, the upload and the variables of a job."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.jobs.upload import Upload, plan_upload
from cluster.jobs.wheel import check_wheel
from dphrl.config.loading import InputError, list_presets, load_config
from dphrl.config.schema import Config
from dphrl.config.secrets import is_secret_variable
from dphrl.own_code import OWN_AMONG_OTHERS, hides_program

# Variables that a run needs to find the same things on the cluster. What --env names is added to them.
PASSED_ON = ("DPHRL_DATA", "DPHRL_LOG", "HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE")
# Variables of trackers that are secrets or hold them, so that they must be in the nodes' own environment.
LEFT_HERE = {"wandb": "WANDB_API_KEY", "mlflow": "MLFLOW_TRACKING_URI"}
# How a job starts the program: as a module, because a --wheel brings no command `dphrl` to a node. With -P
# no module is imported from the folder that Ray was started in.
PROGRAM = ("python", "-P", "-m", "dphrl")
# The same where the uploaded folder holds another `dphrl`: Ray puts that folder first on the path whatever -P says.
PROGRAM_BESIDE_ANOTHER = ("python", "-P", "-c", OWN_AMONG_OTHERS)
# What Ray waits for a job that it stops before it kills it, in seconds, as the job's variable: a run takes its step to
# the end and saves it. Ray's own is 3.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
# Keys of data and models. Elsewhere a text may be called as a file is by chance.
PATH_KEYS = ("path", "databases")
# A longer text is a template, not a path.
MAX_PATH = 1024


@dataclass(frozen=True)
class Submission:
    """A job before it has an id. The id is made from `run_name`. folder: the run's, as the nodes name it. upload: what
    goes of the working directory; None uploads nothing. wheel: the file as the user has it. notes: lines for the user.
    """

    run_name: str
    entrypoint: str
    folder: Path
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    upload: Upload | None = None
    wheel: Path | None = None
    notes: tuple[str, ...] = ()


def plan_submission(
    source: str,
    overrides: Sequence[str],
    *,
    resume: bool = False,
    insist: bool = False,
    overwrite: bool = False,
    working_dir: Path | None = None,
    wheel: Path | None = None,
    include: Sequence[str] = (),
    env: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Submission:
    """What `dphrl submit` hands to the cluster. The configuration is checked here first; the job checks it again
    where it runs, with the data, the models and the user's own reward that are there.

    working_dir: uploaded, and the job starts in it, so that relative paths mean the same; None uploads nothing.
    include: patterns of data and models in it that go although the configuration does not name them.
    wheel: a dphrl to run instead of the one installed on the nodes.

    Raises InputError, one line each, for what is wrong with the configuration or the paths.
    """
    config = load_config(source, overrides)
    if working_dir is not None and not working_dir.is_dir():
        raise InputError(f"--working-dir {working_dir}: no such folder; name the one the job should start in")
    if include and working_dir is None:
        raise InputError("--include and --no-upload: nothing is uploaded; choose one")
    if wheel is not None:
        check_wheel(wheel)
    arguments, notes = [_config_argument(source, working_dir), *overrides], []
    run_dir = Path(config.run_dir).expanduser()
    if not run_dir.is_absolute():
        # The job's own folder is deleted with the job, so the results must not go there.
        run_dir = Path.cwd() / run_dir
        arguments.append(f"run_dir={run_dir}")
        notes.append(f"results go to {run_dir / config.run_name}: every node must see that path (run_dir sets it)")
    for tracker, name in LEFT_HERE.items():
        if getattr(config.tracking, tracker) and environ.get(name):
            notes.append(f"{name} stays here, where others cannot read it: the nodes' own environment must hold it")
    flags = {"--resume": resume, "--insist": insist, "--overwrite": overwrite}
    # Python looks in the wheel first, then in the uploaded folder, then in what is installed on the nodes.
    hidden = working_dir is not None and wheel is None and hides_program(working_dir)
    program = PROGRAM_BESIDE_ANOTHER if hidden else PROGRAM
    words = [*program, "train", *arguments, *(flag for flag, wanted in flags.items() if wanted)]
    runtime_env: dict[str, Any] = {"env_vars": _variables(env, environ)}
    upload = None
    if working_dir is not None:
        named = _named_paths(config, working_dir)
        upload = plan_upload(working_dir.resolve(), [*named], include)
        _check_goes(source, named, working_dir, upload)
        runtime_env |= {"working_dir": str(upload.folder), "excludes": [*upload.excludes]}
        notes += upload.notes()
    folder = run_dir / config.run_name
    return Submission(config.run_name, shlex.join(words), folder, runtime_env, upload, wheel, tuple(notes))


def _named_paths(config: Config, working_dir: Path) -> dict[str, str]:
    """The files and folders of the working directory that the configuration names by relative paths, and the keys that
    do. A pattern of files names what it matches."""
    named: dict[str, str] = {}
    for key, text in _texts(config.model_dump(mode="json"), ""):
        is_path = key.rpartition(".")[2] in PATH_KEYS or "/" in text or Path(text).suffix
        if key == "run_dir" or not is_path or not text or len(text) > MAX_PATH or Path(text).is_absolute():
            continue
        try:
            parts = Path(text).parts
            found = [] if ".." in parts or not parts else [path for path in working_dir.glob(text) if path.exists()]
        except (ValueError, OSError, NotImplementedError):
            continue  # not a path at all
        for path in found:
            named.setdefault(path.relative_to(working_dir).as_posix(), key)
    return {path: key for path, key in named.items() if path != "."}


def _texts(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text of a tree of settings, and its key."""
    if isinstance(tree, str):
        yield key, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield from _texts(value, f"{key}.{name}" if key else str(name))


def _check_goes(source: str, named: Mapping[str, str], working_dir: Path, upload: Upload) -> None:
    """Raises InputError for the configuration's own file, and for data or a model that it names by a relative path,
    when something leaves them out: the job would look for them in vain."""
    of_data = {path: f"{key}: {path}" for path, key in named.items() if key.rpartition(".")[2] in PATH_KEYS}
    if source not in list_presets():
        of_data[_config_argument(source, working_dir)] = source
    for path, what in of_data.items():
        if not upload.holds(path):
            raise InputError(
                f"{what}: is left out of the upload, by .gitignore or as a folder that never goes (runs, .venv), so "
                "the job would not find it; let it go, or give an absolute path that every node sees"
            )


def _config_argument(source: str, working_dir: Path | None) -> str:
    """The configuration as the job will find it: a preset's name, or the file's path there."""
    if source in list_presets():
        return source
    path = Path(source).expanduser().resolve()
    if working_dir is None:
        return str(path)
    try:
        return str(path.relative_to(working_dir.resolve()))
    except ValueError:
        raise InputError(
            f"{source}: lies outside the uploaded folder {working_dir}, so the job could not read it; move it there, "
            "or choose another --working-dir"
        ) from None


def _variables(env: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The job's variables: NAME=VALUE as given, NAME with the value it has here. Everybody who sees the dashboard reads
    them, so secrets are not among them. Raises InputError for a name that is not set here, and for a secret."""
    # A job's output goes to a file, and a line should be in it as soon as it is written.
    known = {name: environ[name] for name in PASSED_ON if environ.get(name)}
    variables = {"PYTHONUNBUFFERED": "1", **STOP_WAIT} | {
        name: value for name, value in known.items() if not is_secret_variable(name, value)
    }
    for text in env:
        name, given, value = text.partition("=")
        if not name.isidentifier():
            raise InputError(f"--env {name}: write NAME=VALUE, or NAME for the value it has here")
        if not given and name not in environ:
            raise InputError(f"--env {name}: not set here; write {name}=VALUE")
        variables[name] = value if given else environ[name]
        if is_secret_variable(name, variables[name]):
            raise InputError(
                f"--env {name}: looks like a secret, and everybody who sees the cluster's dashboard reads a job's "
                "variables; set it in the environment of the cluster's nodes"
            )
    return variables
