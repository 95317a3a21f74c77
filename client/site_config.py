"""A site's account of itself in `site.yaml`: its name, data and models, hardware, terms. The file never leaves it.

A recipe comes from outside. It may name data sets, models, runs and reward functions that this file lists, and no
path of the site.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from core_training.data.hub_cache import is_hub_name
from core_training.foundation.bounded_reading import ForeignTextError, place_and_words, read_yaml
from core_training.foundation.errors import InputError
from core_training.foundation.hub_models import hub_model
from core_training.models.chat_template import named_template, template_names, template_tokens
from core_training.parts.section import Section
from core_training.parts.stages.rollout import Rollout
from core_training.privacy.ledger import Budget
from core_training.recipe.differential_privacy import EACH_RECORD
from core_training.recipe.schema import Recipe
from core_training.recipe.sections.deepspeed import DeepSpeed
from core_training.recipe.sections.simulation import Simulation
from security.secure_aggregation.terms import Minimums
from strategies.fedavg import MOST_PROCESSES
from strategies.messages import HELD_OUT, SITE_NAME

_log = logging.getLogger(__name__)

SITE_FILE = "site.yaml"

_Clip = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SecureAggregationTerms(Section):
    """The least that this site asks of a run's secure aggregation. A recipe that falls short is refused here."""

    required: bool = Field(False, description="Refuse runs without secure aggregation.")
    threshold: Annotated[float, Field(ge=0.5, lt=1)] = Field(
        0.5,
        description=(
            "More than this share of the sites must be needed to open a sum. Whatever it is, so many must be that no "
            "fewer than `minimum_sites` − 1 in league with the server read this site's update."
        ),
    )
    minimum_sites: Annotated[int, Field(ge=2, le=51)] = Field(
        3, description="The fewest updates in a sum that is opened."
    )
    ring_bits: Literal[16, 24, 32] = Field(16, description="The fewest bits of a value on its way.")
    least_clip: _Clip | None = Field(None, description="The smallest `privacy.clip`.")
    most_clip: _Clip | None = Field(None, description="The largest `privacy.clip`.")

    @property
    def minimums(self) -> Minimums:
        return Minimums(**self.model_dump(exclude={"required"}))


class EvaluationTerms(Section):
    """What this site lets others learn when a run's result is judged on its data sets (`fedloom server evaluate`)."""

    most: Annotated[int, Field(ge=0, le=1000)] = Field(
        8, description="The most different evaluations of one run that are answered; 0 answers none."
    )
    least_items: Annotated[int, Field(ge=1)] = Field(
        10, description="Nothing is told of a data set with fewer items than that."
    )
    tell_own_figures: bool = Field(
        False, description="Whether this site's own figures may be told, not only in sums; never where sums are masked."
    )
    despite_differential_privacy: bool = Field(
        False, description="Answer of runs under differential privacy too, though no ε covers what is told."
    )


class PrivacyBudget(Section):
    """The most that all runs together may tell of any one unit of this site. It takes part in private runs alone."""

    epsilon: Annotated[float, Field(gt=0, le=1e3)] = Field(
        description="The ε of all runs together; what would lead beyond it is refused (`fedloom privacy`)."
    )
    delta: Annotated[float, Field(gt=0, lt=0.1)] = Field(1e-5, description="The δ that goes with it.")
    unit: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        EACH_RECORD, description="Whose part is hidden: each `record`, or the column that says whose a record is."
    )

    @property
    def budget(self) -> Budget:
        return Budget(self.unit, self.epsilon, self.delta)


class SiteConfig(Section):
    """The content of `site.yaml`. Relative paths in the file are relative to its folder; here they are absolute."""

    name: Annotated[str, Field(pattern=SITE_NAME)]
    server: str | None = Field(None, description="The federation server, HOST:PORT. Gossip nodes have none.")
    data: dict[str, str | list[str]] = Field(
        default_factory=dict, description="Name of a data set in a recipe: its files here (file, glob, folder or list)."
    )
    models: dict[str, str] = Field(
        default_factory=dict,
        description="Name of a base model in a recipe: its folder, or its name on the hub (`OWNER/NAME@REVISION`).",
    )
    download: bool = Field(
        False,
        description="Whether a recipe may have this site fetch such a model, as named here, that its cache lacks.",
    )
    runs: dict[str, str] = Field(
        default_factory=dict,
        description="Name of an earlier run in a recipe (`model.adapters`, `rollout.reward_model`): its folder here.",
    )
    reward_functions: dict[str, str] = Field(
        default_factory=dict,
        description="Name of a reward function in a recipe: `FILE.py:name` here. No code ever comes with a recipe.",
    )
    add_tokens: list[str] = Field(
        default_factory=list,
        description="Texts that a recipe may make tokens of its own, besides those of a published chat template.",
    )
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed, description="How this site trains, whatever a recipe says.")
    secure_aggregation: SecureAggregationTerms = Field(
        default_factory=SecureAggregationTerms, description="What this site asks of secure aggregation."
    )
    evaluation: EvaluationTerms = Field(
        default_factory=EvaluationTerms, description="What this site tells when a run's result is judged on its data."
    )
    max_update_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description=(
            "Refuse runs in which another site could move the model further in a round: their "
            "`aggregation.max_update_norm` must be as much or less. Under masks `most_clip` does it."
        ),
    )
    privacy: PrivacyBudget | None = Field(
        None, description="The site's budget for differential privacy. Unset: none, and runs without it are joined."
    )
    max_message_bytes: Annotated[int, Field(ge=1)] = Field(
        4 * 2**30, description="The most bytes of tensors that one message to or from the worker may hold."
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if HELD_OUT in self.data:
            raise ValueError(f"data.{HELD_OUT}: the name stands for what a run held out; call the data set otherwise")
        return self

    @model_validator(mode="after")
    def _check_deepspeed(self) -> Self:
        self.deepspeed.check()
        if self.deepspeed.processes > MOST_PROCESSES:
            raise ValueError(f"deepspeed.processes: a site of a run has {MOST_PROCESSES} processes at most")
        return self

    def resolve(self, recipe: Recipe) -> Recipe:
        """The recipe with this site's files, model folder and hardware in the place of names.

        Raises InputError when the recipe names something that the site does not list, or a path of the site. What the
        recipe's writer wants the curve told to is not heeded, which is said.
        """
        if recipe.training.report_to:
            _log.warning(
                "training.report_to: %s: a recipe from outside does not make this site report; its curve is in runs/",
                ", ".join(recipe.training.report_to),
            )
        if (template := recipe.model.chat_template) is not None and named_template(template) is None:
            raise InputError(
                "model.chat_template: a recipe from outside cannot name a file of this site; it can name a published "
                f"template ({', '.join(template_names())})"
            )
        self._check_tokens(recipe)
        if recipe.model.download and not self.download:
            raise InputError(
                f"model.download: site '{self.name}' fetches nothing for a recipe from outside (its own site.yaml does "
                "not say download: true); leave it out, and have the model fetched there"
            )
        if recipe.deepspeed.config is not None:
            raise InputError("deepspeed.config: a recipe from outside cannot name a file of this site")
        if recipe.data.cache is not None:
            raise InputError("data.cache: a recipe from outside cannot name a folder of this site")
        if recipe.data.train is None:
            raise InputError(f"data.train: the recipe names no data set; this site has {_listed(self.data)}")
        model = {
            "name_or_path": self._own("model.name_or_path", "model", recipe.model.name_or_path, self.models),
            "adapters": [self._own("model.adapters", "run", name, self.runs) for name in recipe.model.adapters],
        }
        rollout: dict[str, Any] = {}
        if recipe.rollout.reward_model is not None:
            rollout["reward_model"] = self._own("rollout.reward_model", "run", recipe.rollout.reward_model, self.runs)
        if recipe.rollout.reward_function is not None:
            rollout["reward_function"] = self._functions(recipe.rollout)
        data = {"train": self._files("train", recipe.data.train)}
        if recipe.data.eval is not None:
            data["eval"] = self._files("eval", recipe.data.eval)
        return recipe.model_copy(
            update={
                "model": recipe.model.model_copy(update=model),
                "rollout": recipe.rollout.model_copy(update=rollout),
                "training": recipe.training.model_copy(update={"report_to": []}),
                "data": recipe.data.model_copy(update=data),
                "deepspeed": self.deepspeed,
                "simulation": Simulation(),
                "output": Recipe.model_fields["output"].default,
            }
        )

    def _check_tokens(self, recipe: Recipe) -> None:
        """Raise InputError for added tokens of a stranger's choice: whether one's row moves tells if a text has it."""
        known = {*self.add_tokens, *template_tokens(recipe.model.chat_template)}
        for token in recipe.model.add_tokens:
            if token not in known:
                raise InputError(
                    f"model.add_tokens: {token!r} is none of the named chat template's, and site '{self.name}' does "
                    "not allow it (add_tokens in site.yaml): whether it is trained would tell if the records have it"
                )

    def _own(self, key: str, kind: str, name: str, own: dict[str, str]) -> str:
        """The entry `name` of one of the site's lists."""
        if name not in own:
            raise InputError(f"{key}: site '{self.name}' has no {kind} '{name}', it has {_listed(own)}")
        return own[name]

    def _functions(self, rollout: Rollout) -> str | dict[str, float]:
        """The site's own functions for those that a recipe names; TRL's need no entry."""
        key, weights = "rollout.reward_function", rollout.reward_functions
        own = {
            name: name if name.startswith("trl:") else self._own(key, "reward function", name, self.reward_functions)
            for name in weights
        }
        if isinstance(rollout.reward_function, str):
            return own[rollout.reward_function]
        if len(set(own.values())) < len(own):
            raise InputError(f"{key}: two of {', '.join(own)} are the same function at site '{self.name}'")
        return {own[name]: weight for name, weight in weights.items()}

    def _files(self, key: str, names: str | list[str]) -> list[str]:
        files: list[str] = []
        for name in [names] if isinstance(names, str) else names:
            if name not in self.data:
                known = _listed(self.data)
                raise InputError(f"data.{key}: site '{self.name}' has no data set '{name}', it has {known}")
            files += _as_list(self.data[name])
        return files


def load_site_config(folder: Path) -> SiteConfig:
    """Read `<folder>/site.yaml`. Raises InputError that names the key and what would be right."""
    path = folder / SITE_FILE
    try:
        document = read_yaml(path)
    except FileNotFoundError:
        made_by = "`fedloom client init` or `fedloom p2p init`"
        raise InputError(f"{path}: no such file; make the folder with {made_by}") from None
    except (OSError, ForeignTextError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    config = parse_site_config(document, str(path))
    return config.model_copy(
        update={
            "data": {name: [_data_place(folder, file) for file in _as_list(own)] for name, own in config.data.items()},
            "models": {name: model_place(place, folder) for name, place in config.models.items()},
            "runs": {name: _absolute(folder, path) for name, path in config.runs.items()},
            "reward_functions": {name: _absolute(folder, place) for name, place in config.reward_functions.items()},
            "deepspeed": config.deepspeed.model_copy(
                update={"config": config.deepspeed.config and _absolute(folder, config.deepspeed.config)}
            ),
        }
    )


def parse_site_config(document: Any, source: str) -> SiteConfig:
    """Check the content of a `site.yaml`; `source` names it in errors, which are those of `load_site_config`."""
    try:
        return SiteConfig.model_validate(document)
    except ValidationError as error:
        place, said = place_and_words(error)
        raise InputError(f"{source}: {place or 'the file'}: {said}") from None


def _absolute(folder: Path, path: str) -> str:
    return str(folder.absolute() / os.path.expanduser(path))


def model_place(place: str, folder: Path) -> str:
    """A model's folder, absolute (`place` is relative to `folder`), or its name on the hub where there is none."""
    path = _absolute(folder, place)
    return place if hub_model(place) is not None and not Path(path).is_dir() else path


def _data_place(folder: Path, place: str) -> str:
    """The path of a site's data, or the name of a data set on the hub that is in this machine's cache."""
    path = _absolute(folder, place)
    return place if is_hub_name(place) and not Path(path).exists() and not Path(path).suffix else path


def _as_list(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else files


def _listed(names: dict[str, str] | dict[str, str | list[str]]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
