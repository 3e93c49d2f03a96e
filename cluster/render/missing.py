"""What a run needs that is on this machine and in no container: code of the user's own, data and models on disks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dphrl.config.loading import config_to_yaml
from dphrl.config.schema import Config


def code_lines(config: Config, image: str) -> list[str]:
    """A line for a file's header where the configuration names modules of the user's own."""
    modules = [*config.algorithm.plugins]
    if config.reward.is_custom:
        modules.insert(0, config.reward.name.partition(":")[0])
    names = _in_a_line(", ".join(dict.fromkeys(modules)))
    return [f"Code:     {names}: your own; {image} must have it, its folder in PYTHONPATH"] if names else []


def path_lines(config: Config, data_dir: str) -> list[str]:
    """Lines for a file's header where the configuration names places that containers do not see.

    data_dir: where containers have what is in the folder that DPHRL_DATA names here.
    """
    places = [f"{key}={place}" for key, place in _places(config) if _is_here(place, data_dir)]
    if not places:
        return []
    return [
        f"Paths:    {_in_a_line(', '.join(places))}: of this machine;",
        f"          bring what is there into the folder that DPHRL_DATA names, and write {data_dir}/... for it below",
    ]


def needs_data(config: Config, data_dir: str) -> bool:
    """Whether the run reads what is in the folder that DPHRL_DATA names."""
    there = any(place.startswith(f"{data_dir}/") or _is_here(place, data_dir) for _, place in _places(config))
    return there or "DPHRL_DATA" in config_to_yaml(config)


def _in_a_line(text: str) -> str:
    """A line break in a setting must not end the comment."""
    return " ".join(text.split())


def _places(config: Config) -> Iterator[tuple[str, str]]:
    yield "model.path", config.model.path
    sections = {"data.train": config.data.train}
    sections |= {f"data.evaluation.{i}": section for i, section in enumerate(config.data.evaluation)}
    for name, section in sections.items():
        for key, place in (("path", section.path), ("databases", section.databases)):
            if place:
                yield f"{name}.{key}", place


def _is_here(place: str, data_dir: str) -> bool:
    """A word such as org/name is a hub's, unless a folder here has it. Volumes are mounted beside data_dir."""
    mounted = f"{Path(data_dir).parent}".rstrip("/") or data_dir
    if place.startswith(("$", f"{mounted}/")):
        return False
    return place.startswith(("/", "~", "./", "../")) or Path(place).exists()
