"""Whether a model that runs will name can be had from here."""

from __future__ import annotations

from pathlib import Path

from cluster.doctor.check import Check


def examine_model(model: str) -> Check:
    """model: as model.path has it, a folder, an embedded model's name or a hub name, for which the hub is asked."""
    name = "model"
    if Path(model).expanduser().is_dir() or model.count("/") != 1 or model.startswith(("/", ".", "~")):
        return Check(name, "ok", f"{model}: no name on the hub, so no token is needed")
    try:
        from dphrl.hub import access_obstacle, is_cached, is_offline

        obstacle, cached, offline = access_obstacle(model), is_cached(model), is_offline()
    except ImportError as error:
        return Check(name, "missing", f"{model}: not asked ({error})", "run `make setup`")
    if obstacle:
        found, _, remedy = obstacle.removeprefix("model.path: ").partition("; ")
        return Check(name, "missing", found, remedy)
    if cached:
        return Check(name, "ok", f"{model}: on this machine")
    if offline:
        remedy = "download it where there is a network, or unset HF_HUB_OFFLINE"
        return Check(name, "missing", f"{model}: not on this machine, and Hugging Face's libraries are offline", remedy)
    return Check(name, "ok", f"{model}: the hub grants it")
