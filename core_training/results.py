"""A finished run's result: found in its run folder, loaded to be used, and written for use elsewhere.

Knows nothing of how the run was carried out: a run folder of any topology holds a recipe and an adapter or a model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_training.base_model import BaseModel, load_tokenizer
from core_training.durable import commit_folder
from core_training.errors import InputError, ProtocolError
from core_training.export import ADAPTER_CONFIG, read_result, result_name
from core_training.recipe import Recipe, load_recipe
from core_training.run_folder import RunFolder


@dataclass(frozen=True)
class Result:
    """What a run ended with: `folder` is its `adapter` or `model`, `recipe` names the base model's folder here."""

    recipe: Recipe
    folder: Path

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).exists()

    @property
    def base_folder(self) -> Path | None:
        """The base model's folder, or None where the recipe's name for it is no folder on this machine."""
        folder = Path(self.recipe.model.name_or_path)
        return folder.resolve() if folder.is_dir() else None


def find_result(run: Path, base: Path | None = None, site: str | None = None) -> Result:
    """The result in run folder `run`; `base` is the base model's folder, in place of the recipe's name for it.

    `site` chooses among the results of a simulation whose sites ended with different ones (gossip by Metropolis).
    Raises InputError when this is no run folder, or the run has not ended.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run}: not a run folder (it has no recipe.yaml)")
    recipe = load_recipe(run / "recipe.yaml")
    if base is not None:
        if not base.is_dir():
            raise InputError(f"--base: {base}: no such folder; name the base model's")
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": str(base)})})
    return Result(recipe, _result_folder(run, result_name(recipe), site))


def load_result(result: Result) -> BaseModel:
    """The base model with the trained state in it, ready to be asked.

    Raises InputError when the base model is not here, or is not the one that was trained on.
    """
    if result.base_folder is None:
        raise InputError(
            f"the base model '{result.recipe.model.name_or_path}' is no folder here; name it with --base DIR "
            "(paths are relative to the folder a command is run in)"
        )
    base = BaseModel(result.recipe)
    try:
        state = read_result(result.folder, base.manifest)
    except ProtocolError as error:
        raise InputError(f"{result.folder} does not fit the base model {result.base_folder}: {error}") from None
    from core_training.parameters import write_parameters

    write_parameters(base.trainable_parameters, state)
    base.model.eval()
    base.model.config.use_cache = True
    return base


def export_adapter(result: Result, to: Path) -> bool:
    """Write the adapter alone, as PEFT and vLLM load it. Returns whether the tokenizer could be put beside it.

    Where the base model is on this machine, the adapter names it by its absolute path. Raises InputError when `to`
    holds something.
    """
    to = _free(to)
    base = result.base_folder
    tokenizer: Any = load_tokenizer(result.recipe) if base is not None else None
    with commit_folder(to) as scratch:
        shutil.copytree(result.folder, scratch, dirs_exist_ok=True)
        if base is not None:
            config = json.loads((scratch / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = str(base)
            (scratch / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
            tokenizer.save_pretrained(scratch)
    return tokenizer is not None or (to / "tokenizer_config.json").exists()


def export_model(result: Result, to: Path) -> None:
    """Write one whole model with its tokenizer, in the base model's dtype; an adapter is merged into its base.

    Raises InputError when `to` holds something, and as `load_result`.
    """
    to = _free(to)
    base = load_result(result)
    model = base.model.merge_and_unload() if result.is_adapter else base.model
    with commit_folder(to) as scratch:
        model.save_pretrained(scratch)
        base.tokenizer.save_pretrained(scratch)


def _free(to: Path) -> Path:
    if to.exists() and not to.is_dir():
        raise InputError(f"--to: {to} is a file; name a new folder")
    if to.is_dir() and any(to.iterdir()):
        raise InputError(f"--to: {to} exists and is not empty; name a new folder")
    return to.resolve()


def _result_folder(run: Path, name: str, site: str | None) -> Path:
    """The run's own result, or that of one of a simulation's sites."""
    if site is None and (run / name).is_dir():
        return run / name
    summary = RunFolder(run).summary()
    if summary is None:
        raise InputError(
            f"{run}: there is no result yet ({name}/): the run has not completed; --resume goes on with it"
        )
    by_site = {path.parts[-3]: path for path in sorted(run.glob(f"sites/*/*/{name}"))}
    if not by_site:
        raise InputError(f"{run}: it holds no result ({name}/)" + ("" if site is None else " of single sites"))
    if site is None and summary.get("state_digest") is not None:  # all sites ended with this one state
        return next(iter(by_site.values()))
    if site not in by_site:
        raise InputError(f"--site: each site has a result of its own; choose one of {', '.join(by_site)}")
    return by_site[site]
