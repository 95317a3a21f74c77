"""A finished run's result, found in its run folder. Loads no model: that is for those who use it.

Knows nothing of how the run was carried out: a run folder of any topology holds a recipe and what was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core_training.foundation.errors import InputError
from core_training.foundation.hub_models import find_model
from core_training.foundation.model_files import check_result_folder
from core_training.foundation.places import is_folder
from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.result_format import ADAPTER_CONFIG, LAYERS, result_name
from core_training.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Result:
    """The result of a run: `folder` is its `adapter`, `model` or `layers`, `recipe` names the base model here."""

    recipe: Recipe
    folder: Path

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).exists()

    @property
    def is_whole_model(self) -> bool:
        """Whether every weight was trained, so that the base's are not needed."""
        return self.recipe.tuning_part.result == "model" and self.folder.name != LAYERS

    @property
    def base_folder(self) -> Path | None:
        """The base model's folder, or None where the recipe's name for it stands for none on this machine."""
        folder = find_model(self.recipe.model.name_or_path)
        return None if folder is None else folder.resolve()

    @property
    def base_name(self) -> str:
        """What others may call the base model: its folder's absolute path, or the recipe's name for it."""
        folder = Path(self.recipe.model.name_or_path)
        return str(folder.resolve()) if is_folder(folder) else self.recipe.model.name_or_path


def find_result(run: Path, base: Path | None = None, site: str | None = None) -> Result:
    """The result in run folder `run`; `base` is the base model's folder or hub name, in place of the recipe's for it.

    `site` chooses among the results of a simulation whose sites ended with different ones (gossip by Metropolis).
    Raises InputError when this is no run folder, when the run has not ended, and for a result of pipes and devices.
    """
    if not is_folder(run):
        raise InputError(f"{run}: no such run folder")
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run}: not a run folder (it has no recipe.yaml)")
    recipe = load_recipe(run / "recipe.yaml")
    if base is not None:
        if find_model(str(base)) is None:
            raise InputError(
                f"--base: {base}: no such folder, nor such a model in the hub's cache; name the base model's"
            )
        model = recipe.model.model_copy(update={"name_or_path": str(base), "digest": None})
        recipe = recipe.model_copy(update={"model": model})
    name = LAYERS if site is None and (run / LAYERS).is_dir() else result_name(recipe)
    folder = _result_folder(run, name, site)
    check_result_folder(folder)
    return Result(recipe, folder)


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
