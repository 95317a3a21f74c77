"""A step that trains a recipe, in the recipe's own topology."""

from __future__ import annotations

from core_training import __version__
from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from experiments.digests import Digester, digest_of
from experiments.documents import beside, mapping_at, recipe_of
from experiments.running import OnProgress, check_topology, run_recipe
from experiments.steps.step import Step


class RecipeStep(Step):
    """`recipe` (a file's name, or a recipe) with the values under `set`."""

    KEY, KEYS, FIGURES = "recipe", ("set",), True

    @property
    def what(self) -> str:
        if self._comes_of_a_step:
            return f"recipe {self.settings['recipe']}"
        recipe = self._recipe()
        return f"{recipe.stage} · {recipe.tuning.mode} · {recipe.topology.kind}"

    @property
    def _comes_of_a_step(self) -> bool:
        """Whether its recipe is a file that an earlier step has yet to write."""
        given = self.settings["recipe"]
        if not isinstance(given, str) or not given.startswith(str(self.folder.parent)):
            return False
        return not beside(given, self.home).exists()

    def check(self) -> None:
        mapping_at(self.settings, "set", self.place)
        if not self._comes_of_a_step:
            check_topology(self._recipe(), self.place)

    def digest(self, digester: Digester) -> str:
        return digest_of([self.KEY, __version__, digester.of_recipe(self._recipe())])

    def run(self, on_progress: OnProgress, *, resume: bool) -> None:
        recipe = self._recipe()
        check_topology(recipe, self.place)
        run_recipe(recipe, on_progress, resume=resume)

    @property
    def is_there(self) -> bool:
        return RunFolder(self.folder).has_completed

    def _recipe(self) -> Recipe:
        values = mapping_at(self.settings, "set", self.place)
        try:
            return recipe_of(self.settings["recipe"], values, self.home, self.place, self.folder)
        except InputError as error:
            said = str(error)
            raise InputError(said if self.place.rstrip(".") in said else f"{self.place.rstrip('.')}: {said}") from None
