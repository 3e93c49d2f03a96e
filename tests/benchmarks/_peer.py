"""What a comparison with TRL needs: TRL itself, and a model that both sides let talk to the limit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# The one version that the comparison was checked with. Its requirements come with dphrl's own, in versions it takes.
TRL = "trl==1.16.0"
NEEDED = ("accelerate", "datasets", "jinja2", "pandas", "psutil", "pyarrow", "transformers", "yaml")
# Tokens of a vocabulary that no answer holds, by order of preference.
NEVER_SAID = ("<repo_name>", "<unk>")


def ensure_trl() -> Path:
    """A folder of its own with TRL in it, to be put on PYTHONPATH: this environment stays as it is.

    Made once, from the package index. Exits with status 2 where that or a requirement is missing.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"TRL needs {', '.join(missing)}: pip install 'dphrl[dev]'", file=sys.stderr)
        raise SystemExit(2)
    root = Path(os.environ.get("DPHRL_CACHE") or Path.home() / ".cache" / "dphrl").expanduser()
    folder = root / "benchmarks" / TRL.replace("==", "-")
    if (folder / "trl").is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".trl-", dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(made), TRL]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            print(f"{TRL} could not be installed: {done.stderr.strip()[-300:]}", file=sys.stderr)
            raise SystemExit(2)
        made.replace(folder)
    return folder


def make_unending(model: Path, folder: Path) -> Path:
    """In `folder`, `model` with another end of an answer: a token that it never says. Its weights are links.

    Both sides then sample to the limit by themselves, without a rule against the end that only one of them has.
    Raises ValueError when the vocabulary has none of NEVER_SAID.
    """
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    vocabulary = json.loads((model / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    end = next((token for token in NEVER_SAID if token in ids), None)
    if end is None:
        raise ValueError(f"{model}: its vocabulary has none of {', '.join(NEVER_SAID)}")
    _change(folder / "config.json", {"eos_token_id": ids[end]})
    _change(folder / "generation_config.json", {"eos_token_id": ids[end]})
    _change(folder / "tokenizer_config.json", {"eos_token": end})
    return folder


def _change(file: Path, values: dict[str, Any]) -> None:
    changed = json.loads(file.read_text()) | values
    file.unlink()  # the link, not the model's own file
    file.write_text(json.dumps(changed, indent=2))
