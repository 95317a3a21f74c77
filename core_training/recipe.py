"""The recipe: the one YAML file that says what to train, how, and where.

Every key that a recipe may hold is in this file, with its type, default and meaning (`docs/recipe.md` is made from it).
Paths are relative to the folder the command is run in. Reading a recipe imports none of the heavy libraries.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core_training.errors import InputError
from core_training.stages import STAGES
from core_training.tuning import TUNING_MODES

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the recipe: unknown keys and wrong types are errors, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """The base model."""

    name_or_path: str = Field(description="Folder of the base model (weights, tokenizer, chat template).")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type the base weights are held in.")
    chat_template: str | None = Field(None, description="Jinja file to use instead of the model's own chat template.")


class Lora(Section):
    """Low-rank adaptation (Hu et al. 2021); names and defaults as in PEFT's `LoraConfig`."""

    r: PositiveInt = Field(8, description="Rank of the update.")
    lora_alpha: PositiveInt = Field(16, description="Scale: the update is multiplied by lora_alpha / r.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout before the down-projection.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Modules that get adapters: `all-linear` (all but the output layer) or names."
    )


class Tuning(Section):
    """Which parameters are trained, and so which ones travel."""

    mode: Literal["full", "freeze", "lora", "qlora"] = Field("lora", description="full | freeze | lora | qlora.")
    lora: Lora = Field(default_factory=Lora, description="Settings of `lora`.")


class Data(Section):
    """Training and evaluation records."""

    train: str | list[str] | None = Field(
        None,
        description="File, glob, folder or list of them: .jsonl .json .csv .parquet .txt, text ones also as .gz. "
        "In a real federation: the data set's name, which each site maps to files of its own in `site.yaml`.",
    )
    eval: str | list[str] | None = Field(None, description="Evaluation files; without it a part of `train` is kept.")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of records kept for evaluation, chosen by a stable hash of each record."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="The stage's column name: the name it has in the files, where they differ."
    )


class Training(Section):
    """The optimisation; names as in Hugging Face's `TrainingArguments`."""

    learning_rate: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Peak learning rate. Unset: 2e-4 for lora and qlora, 2e-5 for full and freeze."
    )
    per_device_train_batch_size: PositiveInt = Field(8, description="Rows in a batch, on each process.")
    per_device_eval_batch_size: PositiveInt = Field(16, description="Rows in an evaluation batch.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Batches that make one optimizer step.")
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="Tokens a row is cut to (cuts are counted).")
    max_steps: PositiveInt | None = Field(
        None,
        description="Optimizer steps of a central run. Unset: rounds × local_steps of the topology, if it has them.",
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Passes over the data of a central run with neither `max_steps` nor rounds."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Seed of initialisation, data order and dropout."
    )
    optim: Literal["adamw_torch", "sgd"] = Field("adamw_torch", description="Optimizer.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="Schedule over the whole run, not over each round."
    )
    warmup_steps: Count = Field(0, description="Steps over which the learning rate rises from 0.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay (AdamW).")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Gradient clipping; 0 turns it off.")
    packing: bool | None = Field(
        None, description="Put several examples in one row, without cross-talk. Unset: on for pretrain, off for sft."
    )
    gradient_checkpointing: bool = Field(False, description="Trade compute for activation memory.")
    save_steps: PositiveInt = Field(100, description="Steps between two checkpoints of a central run.")


class DeepSpeed(Section):
    """A DeepSpeed group: ZeRO data parallelism over several processes of one machine."""

    processes: PositiveInt = Field(1, description="Processes; 1 trains without DeepSpeed.")
    stage: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage.")
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="What moves to CPU memory: nothing, the optimizer, or (ZeRO 3) the parameters too."
    )
    config: str | None = Field(None, description="A DeepSpeed JSON file, used instead of the keys above.")


class Topology(Section):
    """Who trains, and how the results meet."""

    kind: Literal["central", "federated", "gossip"] = Field("central", description="central | federated | gossip.")
    rounds: PositiveInt | None = Field(None, description="Exchanges (gossip: epochs).")
    local_steps: PositiveInt | None = Field(None, description="Optimizer steps at each site between two exchanges.")
    minimum_sites: PositiveInt = Field(1, description="Sites that must answer for a round to count.")
    round_deadline: Annotated[float, Field(gt=0)] = Field(
        3600.0, description="Seconds after which a round goes on without the sites that have not answered."
    )
    eval_every: PositiveInt = Field(1, description="Rounds between two evaluations on the sites' held-out records.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Federated: stop after this many evaluations without a lower loss."
    )
    graph: Literal["complete", "ring"] = Field("complete", description="Who talks to whom under `mixing: metropolis`.")


class Aggregation(Section):
    """The arithmetic on the sites' states."""

    rule: Literal["fedavg"] = Field("fedavg", description="Federated: mean weighted by loss tokens (McMahan 2017).")
    mixing: Literal["group", "metropolis"] = Field(
        "group", description="Gossip: weighted mean of all in one group, or Metropolis–Hastings weights on `graph`."
    )


class Privacy(Section):
    """What protects the updates on their way."""

    secure_aggregation: bool = Field(False, description="Only the sum of the updates becomes known.")
    codec: Literal["fp32", "bf16", "ring16", "ring24", "ring32"] = Field("fp32", description="How updates travel.")
    differential_privacy: None = Field(None, description="Not available yet.")


class Simulation(Section):
    """The sites of `fedloom simulate`: given one by one, or made by partition of `data.train`."""

    sites: list[str] | dict[str, str] | None = Field(
        None, description="A file for each site (its name is the file's), or `name: file`."
    )
    partition: Literal["iid", "dirichlet", "size_skew", "natural"] | None = Field(
        None, description="How `data.train` is divided: evenly, by label skew, by size skew, or by a column's values."
    )
    count: PositiveInt | None = Field(None, description="Sites to make (not for `natural`).")
    by: str | None = Field(None, description="The column of `dirichlet` and `natural`.")
    alpha: Annotated[float, Field(gt=0)] = Field(0.5, description="Dirichlet concentration: smaller is more uneven.")
    engine: Literal["inprocess", "ray"] = Field("inprocess", description="inprocess | ray (extra `simulation`).")


class Recipe(Section):
    """The whole recipe."""

    model: Model
    stage: Literal["pretrain", "sft", "reward", "ppo", "dpo", "kto", "orpo", "simpo"]
    tuning: Tuning = Field(default_factory=Tuning)
    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed)
    topology: Topology = Field(default_factory=Topology)
    aggregation: Aggregation = Field(default_factory=Aggregation)
    privacy: Privacy = Field(default_factory=Privacy)
    simulation: Simulation = Field(default_factory=Simulation)
    output: Annotated[str, Field(min_length=1)] = Field("runs/latest", description="The run folder.")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.stage not in STAGES:
            raise ValueError(f"stage: '{self.stage}' is not in this version; it has {', '.join(STAGES)}")
        if self.tuning.mode not in TUNING_MODES:
            raise ValueError(
                f"tuning.mode: '{self.tuning.mode}' is not in this version; it has {', '.join(TUNING_MODES)}"
            )
        if self.privacy.secure_aggregation or self.privacy.codec != "fp32":
            raise ValueError("privacy: this version sends updates as codec fp32, without secure aggregation")
        if self.topology.kind != "central":
            for key in ("rounds", "local_steps"):
                if getattr(self.topology, key) is None:
                    raise ValueError(f"topology.{key}: a {self.topology.kind} run needs it, a whole number from 1 up")
        if self.deepspeed.offload == "all" and self.deepspeed.stage != 3:
            raise ValueError("deepspeed.offload: 'all' needs deepspeed.stage 3; ZeRO 0–2 can offload the 'optimizer'")
        if self.simulation.sites is not None and not self.simulation.sites:
            raise ValueError("simulation.sites: name at least one site's file")
        if self.simulation.sites is not None and self.simulation.partition is not None:
            raise ValueError("simulation: give either 'sites' or 'partition', not both")
        if self.simulation.partition in ("iid", "dirichlet", "size_skew") and self.simulation.count is None:
            raise ValueError(f"simulation.count: partition '{self.simulation.partition}' needs the number of sites")
        if self.simulation.partition in ("dirichlet", "natural") and self.simulation.by is None:
            raise ValueError(f"simulation.by: partition '{self.simulation.partition}' needs a column to divide by")
        return self

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, with the tuning mode's default where the recipe gives none."""
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        return 2e-4 if self.tuning.mode in ("lora", "qlora") else 2e-5

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run at one site; None where the number of epochs decides."""
        in_rounds = (self.topology.rounds or 0) * (self.topology.local_steps or 0)
        if self.topology.kind == "central" and self.training.max_steps is not None:
            return self.training.max_steps
        return in_rounds or None

    @property
    def engine_digest(self) -> str:
        """SHA-256 (hex) over what decides the training at a site: parties with one digest run the same recipe."""
        parts = self.model_dump(include={"stage", "tuning", "training", "topology", "aggregation", "privacy"})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises InputError, naming the key (or the YAML line) and what would be right.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return parse_recipe(text, source=str(path), overrides=overrides)


def parse_recipe(text: str, source: str = "recipe", overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from YAML text; `source` names it in errors, which are those of `load_recipe`."""
    document = _parse_yaml(text, source)
    if not isinstance(document, dict):
        raise InputError(f"{source}: a recipe is a mapping of sections (model, stage, tuning, data, …)")
    for override in overrides or []:
        _apply_override(document, override)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for item in error.errors():
            by_key.setdefault(_key_of(item["loc"]), []).append(item)
        # Where a key may have several types, an error further inside says more than that it is not of the other type.
        telling = [key for key in by_key if not any(other.startswith(key + ".") for other in by_key)]
        raise InputError(f"{source}: " + "; ".join(_explain(key, by_key[key]) for key in telling[:3])) from None


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] != "tag:yaml.org,2002:float"]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{source}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise InputError(f"{source}: not a recipe: it is nested too deeply") from None


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"'{override}': an override is KEY=VALUE, such as training.learning_rate=1e-4")
    *parents, last = key.split(".")
    target = document
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(f"{key}: '{parent}' is a value, not a section")
        target = inner
    target[last] = _parse_yaml(value, key)


_TYPE_ENDINGS = re.compile(r"^(literal\[|list\[|dict\[|function-)|^(str|int|float|bool|none)$")
"""What pydantic puts at the end of an error's place for each type that a key may have."""


def _key_of(location: Sequence[str | int]) -> str:
    parts = [str(part) for part in location]
    while len(parts) > 1 and _TYPE_ENDINGS.search(parts[-1]):
        parts.pop()
    return ".".join(part for part in parts if not part.startswith(("literal[", "list[", "dict[")))


def _explain(key: str, errors: list[Any]) -> str:
    """What pydantic says of one key as a sentence: the key, what is wrong, what would be right.

    A key that may have several types has an error for each of them.
    """
    error = errors[0]
    *section, name = [str(part) for part in error["loc"]] or [""]
    if error["type"] == "extra_forbidden":
        known = _keys_of(section)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: this key is required"
    if error["type"] == "model_type":
        examples = ", ".join(_keys_of([*section, name])[:3])
        return f"{key}: this is a section with keys of its own ({examples}, …), not {error['input']!r}"
    if not key:
        return str(error["msg"]).removeprefix("Value error, ")
    messages = list(dict.fromkeys(str(one["msg"])[0].lower() + str(one["msg"])[1:] for one in errors))
    wanted = " or ".join([messages[0], *(message.removeprefix("input should be ") for message in messages[1:])])
    return f"{key}: {wanted}, not {error['input']!r}"


def _keys_of(location: list[str]) -> list[str]:
    section: Any = Recipe
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
