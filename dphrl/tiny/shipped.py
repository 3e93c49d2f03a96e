"""The embedded models' weights that come with the package, in float16, one file for each task.

    python -m dphrl.tiny.shipped factor sql   # train and write them anew: after any change of a recipe

Another CPU rounds differently, and after some three hundred steps the warm start gives another model: an equally good
one, but not the one that the results in `dphrl/suites/results` started from. With these files every machine starts from
the same figures, and nobody has to wait for a warm start.
"""

from __future__ import annotations

import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from dphrl.tiny import model as tiny_model
from dphrl.tiny.recipe import RECIPES, TASKS, WarmStartRecipe
from dphrl.tiny.warm_start import demonstration_loss, warm_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_FOLDER = files("dphrl.tiny").joinpath("weights")
_FINGERPRINT = "recipe_fingerprint"


def load_shipped(recipe: WarmStartRecipe) -> tuple[PreTrainedModel, PreTrainedTokenizerFast] | None:
    """The model that comes with the package for exactly this recipe, in float32; None when there is none."""
    from safetensors import safe_open

    with as_file(_FOLDER / f"{recipe.task}.safetensors") as path:
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            if file.metadata()[_FINGERPRINT] != recipe.fingerprint():
                return None
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    tokenizer = tiny_model.build_tokenizer(TASKS[recipe.task].vocabulary)
    model = tiny_model.build_model(recipe.shape, tokenizer, recipe.seed)
    # The head shares the weights of the embedding, so it is not in the file.
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model.eval(), tokenizer


def write_shipped(recipe: WarmStartRecipe, model: PreTrainedModel, folder: Path) -> Path:
    """Write `model`'s weights, rounded to float16, to `folder` as the ones that come with the package."""
    from safetensors.torch import save_file

    state = {name: weight.detach().half() for name, weight in model.named_parameters()}
    path = folder / f"{recipe.task}.safetensors"
    save_file(state, path, metadata={_FINGERPRINT: recipe.fingerprint()})
    path.chmod(0o644)  # safetensors writes files private to the user
    return path


def _show_step(done: int, total: int) -> None:
    print(f"\rwarm start, step {done}/{total}", end="\n" if done == total else "", flush=True)


def main(tasks: list[str]) -> int:
    """Train the tasks' models and write them into this source tree. Returns the exit status."""
    if not tasks or set(tasks) - set(RECIPES):
        print(f"usage: python -m dphrl.tiny.shipped TASK ...   (of {', '.join(RECIPES)})", file=sys.stderr)
        return 2
    for task in tasks:
        recipe = RECIPES[task]
        model, _ = warm_start(recipe, _show_step)
        path = write_shipped(recipe, model, Path(str(_FOLDER)))
        loss = demonstration_loss(model, recipe, seed=recipe.seed + 1)
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB  {loss:.4f} nats a token on fresh demonstrations")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
