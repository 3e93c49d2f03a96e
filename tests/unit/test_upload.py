"""What of a working directory goes to the cluster, compared with the package that Ray makes of it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from cluster.jobs import upload
from cluster.jobs.submission import plan_submission
from cluster.jobs.upload import LARGE_BYTES, Upload, largest, plan_upload, size_text
from dphrl.config.loading import InputError

MB = 10**6
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----\n"


def put(folder: Path, **sizes: int | str) -> None:
    """Files by their path, with so many bytes (none of them on disk) or this text."""
    for name, size in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(size if isinstance(size, str) else "")
        if isinstance(size, int):
            os.truncate(path, size)


def packed_by_ray(planned: Upload, folder: Path) -> set[str]:
    """The files that Ray's client packs, with the patterns of the upload."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = folder / "package.zip"
    package.unlink(missing_ok=True)  # Ray leaves one that is there alone
    excludes = [*get_runtime_env_default_excludes(), *planned.excludes]
    create_package(str(planned.folder), package, include_gitignore=True, excludes=excludes)
    assert package.stat().st_size <= planned.num_bytes + 200
    return {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    put(
        folder,
        **{
            "train.py": "x = 1",
            ".gitignore": "scratch/\n*.log\n",
            "scratch/a.py": "x",
            "run.log": "x",
            "nested/.gitignore": "local.py\n",
            "nested/local.py": "x",
            "nested/kept.py": "x",
            "runs/mine/metrics.jsonl": "{}",
            ".venv/lib/x.py": "x",
            "package/__pycache__/x.pyc": "x",
            "configs/wandb/default.yaml": "a: 1",
            "data/raw.parquet": 800 * MB,
            "data/train.jsonl": 20 * MB,
            "data/small.jsonl": "{}",
            "data/corpus.txt": 11 * MB,
            "models/a/model.safetensors": 1200 * MB,
            "models/a/config.json": "{}",
            "models/b/pytorch_model.bin": 90 * MB,
            "vocabulary.bin": 10,
            "notes [old] #1.csv": 30 * MB,
            ".env": "TOKEN=sesame",
            ".env.production": "TOKEN=sesame",
            ".env.example": "TOKEN=",
            "deploy/prod.env": "TOKEN=sesame",
            "deploy/key.pem": KEY,
            "deploy/certificate.pem": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
            "deploy/notes.txt": f"the key:\n{KEY}",
            "deploy/code.py": "KEY = '-----BEGIN PRIVATE KEY-----'\n",
            ".ssh/config": "Host x",
            "id_ed25519": KEY,
            "id_ed25519.pub": "ssh-ed25519 AAAA",
        },
    )
    return folder


CODE = {
    *("train.py", ".gitignore", "nested/.gitignore", "nested/kept.py", "configs/wandb/default.yaml"),
    *("data/small.jsonl", "models/a/config.json", ".env.example", "deploy/certificate.pem", "deploy/code.py"),
    "id_ed25519.pub",
}


def test_code_goes_and_data_models_and_secrets_stay(repository: Path, tmp_path: Path) -> None:
    planned = plan_upload(repository)
    assert set(planned.files) == CODE
    assert packed_by_ray(planned, tmp_path) == CODE
    assert planned.num_bytes < 10_000
    assert set(planned.data) == {
        *("data/raw.parquet", "data/train.jsonl", "data/corpus.txt", "models/a/model.safetensors"),
        *("models/b/pytorch_model.bin", "vocabulary.bin", "notes [old] #1.csv"),
    }
    assert set(planned.secrets) == {
        *(".env", ".env.production", "deploy/prod.env", "deploy/key.pem", "deploy/notes.txt", ".ssh/config"),
        "id_ed25519",
    }
    data, secrets = planned.notes()
    assert data.startswith(
        "not uploaded, as data or models: models/a/model.safetensors 1.2 GB, data/raw.parquet 800 MB, "
        "notes [old] #1.csv 30 MB, vocabulary.bin 10 bytes; "
    )
    assert secrets.startswith("not uploaded, as secrets: .env, ")


def test_what_the_configuration_names_goes(repository: Path, tmp_path: Path) -> None:
    put(repository, **{"table.parquet/part-0.parquet": 3, "models/a/tokenizer.db": 3})
    (repository / "models/a/model.safetensors").write_text("small")
    overrides = [
        *(
            "model.path=models/a",
            f"run_dir={tmp_path}",
            "reward.name=my:reward",
            "reward.params={words: vocabulary.bin}",
        ),
        "data.train={name: mine, path: data/train.json*, answer_field: answer}",
        "data.evaluation=[{name: models, path: table.parquet, answer_field: answer}]",
    ]
    planned = plan_submission("demo-math", overrides, working_dir=repository, environ={}).upload
    assert planned is not None
    added = {"models/a/model.safetensors", "models/a/tokenizer.db", "data/train.jsonl", "table.parquet/part-0.parquet"}
    assert set(planned.files) == CODE | added | {"vocabulary.bin"}, "a data set's name is no path"
    assert packed_by_ray(planned, tmp_path) == set(planned.files)


def test_what_is_included_goes_but_no_secret_and_no_run(repository: Path, tmp_path: Path) -> None:
    planned = plan_upload(repository, include=["./vocabulary.bin", ".env", "runs/**", "deploy/*", "notes*"])
    assert set(planned.files) == CODE | {"vocabulary.bin", "notes [old] #1.csv"}
    assert packed_by_ray(planned, tmp_path) == set(planned.files)
    (repository / "data/raw.parquet").unlink()
    (repository / "models/a/model.safetensors").unlink()
    everything = plan_upload(repository, include=["*"])
    assert set(everything.files) == CODE | set(everything.files) - set(everything.secrets)
    assert {"data/train.jsonl", "models/b/pytorch_model.bin"} <= set(everything.files)
    assert not any(path.startswith(("runs/", ".venv/")) or path == ".env" for path in everything.files)
    assert packed_by_ray(everything, tmp_path) == set(everything.files)


def test_many_large_texts_are_one_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    put(folder, **{f"shards/{i}.jsonl": LARGE_BYTES for i in range(30)}, **{"shards/30.jsonl": 5, "a.jsonl": 5})
    planned = plan_upload(folder)
    assert "/shards/*.jsonl" in planned.excludes
    assert set(planned.files) == {"a.jsonl"}
    assert packed_by_ray(planned, tmp_path) == {"a.jsonl"}


def test_a_folder_above_rays_limit_is_refused_with_its_largest_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, **{"videos/2024/talk.mp4": 500 * MB, "images/a.png": 60 * MB, "images/b.png": 60 * MB, "x.py": "x"})
    with pytest.raises(InputError) as caught:
        plan_upload(tmp_path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"--working-dir {tmp_path}: 4 files of 620 MB, and Ray takes 537 MB; the largest: ")
    assert "videos/2024/talk.mp4 500 MB, images/ 120 MB, x.py 1 bytes; " in line
    for remedy in (".gitignore", "--working-dir", "--no-upload"):
        assert remedy in line.partition("largest")[2]
    (tmp_path / ".gitignore").write_text("videos\n")
    (note,) = plan_upload(tmp_path).notes()
    assert note.startswith("large, and every node fetches it: images/ 120 MB")
    monkeypatch.setattr(upload, "_limit_bytes", lambda: 100 * MB)
    with pytest.raises(InputError, match="4 files of 120 MB, and Ray takes 100 MB"):
        plan_upload(tmp_path)


@pytest.mark.parametrize(
    ("key", "path", "ignored"),
    [
        ("data.train", "data/train.jsonl", "data/\n"),
        ("model.path", "runs/mine/hf", ""),
        ("configuration", "mine.yaml", "*.yaml\n"),
    ],
)
def test_what_the_job_would_not_find_is_told_here(key: str, path: str, ignored: str, tmp_path: Path) -> None:
    put(tmp_path, **{path: "{}", ".gitignore": ignored})
    if key == "configuration":
        (tmp_path / path).write_text("base: demo-math\n")
    source = str(tmp_path / path) if key == "configuration" else "demo-math"
    overrides = {
        "data.train": [
            f"data.train={{name: mine, kind: math, path: {path}}}",
            "data.evaluation=[]",
            "reward.name=math_answer",
        ],
        "model.path": [f"model.path={path}"],
        "configuration": [],
    }[key]
    with pytest.raises(InputError, match=rf"{path}: is left out of the upload, by .gitignore or as a folder"):
        plan_submission(source, [*overrides, "run_dir=/shared"], working_dir=tmp_path, environ={})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, **{"a.py": "x", "theirs.py": "x"})
    allowed = os.access
    monkeypatch.setattr(upload.os, "access", lambda path, mode: "theirs" not in str(path) and allowed(path, mode))
    with pytest.raises(InputError, match=r"cannot be uploaded: .*/theirs.py cannot be read; leave it out"):
        plan_upload(tmp_path)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (734_003_200, "734 MB"),
        (1.25e9, "1.25 GB"),
    ],
)
def test_sizes_are_told_in_three_digits(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text


def test_the_largest_are_named_where_their_bytes_are() -> None:
    files = {"a/b/c": 95, "a/d": 5, "e/f": 50, "e/g": 40, "h": 60, **{f"{i}": 1 for i in range(9)}}
    assert largest(files) == "a/b/c 95 bytes, e/ 90 bytes, h 60 bytes, 0 1 bytes, 1 1 bytes and 7 more"
    assert largest({}) == ""


def test_ray_says_nothing_about_what_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, **{"a.py": "x", ".gitignore": "*.log\n"})
    with caplog.at_level("INFO"):
        assert "a.py" in plan_upload(tmp_path).files
    assert caplog.records == []
