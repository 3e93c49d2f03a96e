"""Whether a run may go on from its checkpoint: with what it was trained with, or because the user insists."""

from __future__ import annotations

from pathlib import Path

from dphrl.config.changes import compare_settings
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.fingerprint import input_hashes
from dphrl.fingerprint.code import hash_code
from dphrl.fingerprint.model import MODEL_PARTS
from dphrl.learner.checkpoint import CheckpointManifest, newest_whole, read_manifest
from dphrl.prepare import Prepared

REMEDY = "--insist goes on all the same, --overwrite starts anew"
# Where the configuration names what a part of the inputs is a hash of.
NAMED_BY = {
    **dict.fromkeys(MODEL_PARTS, "model.path"),
    "prompts": "data",
    "databases": "data.train.databases",
    "reward code": "reward.name",
    "plugin code": "algorithm.plugins",
}


def training_inputs(config: Config, prepared: Prepared) -> dict[str, str]:
    """One hash for each thing that training depends on and that the configuration only names."""
    hashes = input_hashes(config, prepared.model_dir, prepared.prompts)
    return hashes | {"plugin code": hash_code(config.algorithm.plugins)}


class ResumeCheck:
    """Compares a run that is to go on with what its newest checkpoint was trained with.

    Without a checkpoint nothing was trained, so that nothing is compared; reference stage and evaluation look after
    their own files. insist: changes are noted instead of refused. remedy: what the user may do.

    Raises InputError when there are checkpoints and none is whole.
    """

    def __init__(self, config: Config, *, insist: bool = False, remedy: str = REMEDY) -> None:
        self._config, self._insist, self._remedy = config, insist, remedy
        self.notes: list[str] = []
        found = newest_whole(config.folder / "checkpoints", lambda line: None)  # said when the run restores it
        self._checkpoint: Path | None = found
        self._manifest: CheckpointManifest | None = None if found is None else read_manifest(found)

    def check_settings(self) -> None:
        """Raises InputError, a line that names every changed key with its old and its new value."""
        if self._manifest is None:
            return
        done, wanted = self._manifest.step, self._config.learner.num_steps
        if wanted < done:
            raise InputError(
                f"learner.num_steps={wanted}: {self._checkpoint} has {done} steps behind it; set it to {done} or more"
            )
        stored = self._manifest.settings
        changes = compare_settings(stored, self._config)
        if changes.unknown:
            gone = ", ".join(changes.unknown)
            self.notes.append(f"resume: {self._checkpoint} was trained with settings that this version lacks: {gone}")
        if self._config.learner.lr_schedule == "linear" and (stored.get("learner") or {}).get("num_steps") != wanted:
            self.notes.append(f"resume: the learning rate of lr_schedule: linear now falls until step {wanted}")
        if changes.changed:
            self._judge(f"{self._checkpoint} was trained with other settings: {', '.join(changes.changed)}")

    def check_inputs(self, prepared: Prepared) -> None:
        """Raises InputError, a line that names what has another content than before under an unchanged setting."""
        if self._manifest is None:
            return
        stored, given = self._manifest.inputs, training_inputs(self._config, prepared)
        if untold := [part for part in given if part not in stored]:
            self.notes.append(
                f"resume: {self._checkpoint} is of an older version and does not tell of {', '.join(untold)}; what is "
                "given now is taken on trust"
            )
        if changed := [part for part in given if stored.get(part, given[part]) != given[part]]:
            named = ", ".join(f"{part} ({NAMED_BY[part]})" for part in changed)
            self._judge(f"{self._checkpoint} was trained with another content of {named}")

    def _judge(self, said: str) -> None:
        if not self._insist:
            raise InputError(f"{said}; {self._remedy}")
        self.notes.append(f"resume: --insist goes on although {said}")
