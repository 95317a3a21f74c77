"""From files to a model ready to train: tokenizer, base weights, earlier runs merged in, head, tuning mode."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import core_training.foundation.environment as environment
from core_training.foundation.bounded_reading import ForeignTextError, read_bounded, shortened_text
from core_training.foundation.errors import InputError, ProtocolError
from core_training.foundation.hub_models import find_model, hub_model
from core_training.foundation.limits import TooMuchError
from core_training.foundation.model_files import (
    LARGEST_SMALL_FILE,
    check_model_folder,
    weight_names,
    weights_digest,
)
from core_training.models.chat_template import named_template, rendered, template_names
from core_training.models.heads import add_value_head, with_score_head
from core_training.models.loaded_digest import model_digests
from core_training.models.merging import merged
from core_training.models.parameters import (
    manifest_of,
    persistent_buffers,
    trainable_parameters,
    write_buffers,
    write_parameters,
)
from core_training.models.tokenizer_trial import is_panic, try_out
from core_training.models.vocabulary import add_to_model, add_to_tokenizer, digest_with
from core_training.recipe.schema import Recipe
from core_training.runs.finished_run import Result, find_result
from core_training.runs.result_format import read_buffers, read_origin, read_result
from core_training.tuning.added_rows import check_rows_are_trained
from core_training.tuning.base import load_tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_log = logging.getLogger(__name__)

_LONGEST_TEMPLATE = 2**20


@dataclass(frozen=True)
class StartingModel:
    """The model that a run starts from: a causal language model without adapters, not quantised."""

    model: PreTrainedModel
    name: str
    digest: str
    """SHA-256 (hex) over the base's weight files and, in order, the results of earlier runs that were merged in.

    It tells the bases of results from one another. What sites start from is held against `parts`.
    """
    parts: Mapping[str, str]
    """SHA-256 (hex) of all that was loaded, by what it is: `model_digests`, and what was added to the model."""
    rows: int
    """The tokens that the base has rows for, without those that the recipe adds."""


def load_starting_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> StartingModel:
    """The base model with the results of `model.adapters` in it.

    An adapter is merged into the weights, in `model.dtype`; wholly trained weights take their place. A run that itself
    started from earlier ones brings them along, unless they are in the list before it. Raises InputError when a folder
    lacks something, and for an adapter of another base.
    """
    start = _load_base(recipe)
    if recipe.model.add_tokens:
        add_to_model(start.model, tokenizer, recipe.model.add_tokens)
        added = digest_with("", recipe.model.add_tokens)
        start = replace(
            start,
            digest=digest_with(start.digest, recipe.model.add_tokens),
            parts={**start.parts, "added tokens": added},
        )
    for run in recipe.model.adapters:
        start = _with_run(start, Path(run), recipe)
    return start


def tune(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """The model with its stage's head, exactly that trainable which the tuning mode says. Sets all seeds.

    Raises InputError where stage, mode and model do not go together.
    """
    from transformers import set_seed

    head = recipe.stage_part.head
    if recipe.tuning_part.result != "adapter" and head != "score":
        check_loads_whole(model, "tuning.mode", "use lora")
    if head == "score":
        model = with_score_head(model, recipe.training.seed)
    set_seed(recipe.training.seed)
    model = load_tuning(recipe).apply(model)
    check_rows_are_trained(model)
    if head == "value_head":
        add_value_head(model)
    return model


def check_loads_whole(model: PreTrainedModel, key: str, remedy: str) -> None:
    """Raise InputError, which begins with `key`, for a model that nobody could load again once it is written whole.

    Transformers takes some models of text out of larger ones, and knows no configuration of theirs alone (Mllama's).
    """
    from transformers import AutoModelForCausalLM

    if type(model.config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"{key}: a {type(model).__name__} written whole would not be loaded again: transformers has no language "
            f"model of a {type(model.config).__name__}; {remedy}"
        )


def unquantised(recipe: Recipe) -> Recipe:
    """The recipe with LoRA in the place of QLoRA: the same trained tensors, on weights that can be merged into."""
    if (mode := recipe.tuning_part.unquantised) is None:
        return recipe
    return recipe.model_copy(update={"tuning": recipe.tuning.model_copy(update={"mode": mode})})


def base_folder(recipe: Recipe) -> Path:
    """The folder of the recipe's base model: the one of that name, or its files in the hub's cache.

    Raises InputError where it is not on this machine, or is no model's.
    """
    name, where = recipe.model.name_or_path, _where(recipe)
    if (folder := find_model(name)) is None:
        if (model := hub_model(name)) is None:
            raise InputError(f"{where}: no such folder; name a model's, or its name on the hub (OWNER/NAME)")
        raise InputError(
            f"{where}: no such folder, and as a name on the hub not (or not wholly) in this machine's cache; fetch it "
            f"once with `fedloom model get {model}`, or set model.download: true"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{where}: no config.json in it, so it is not a model folder")
    try:
        check_model_folder(folder)
    except InputError as error:
        raise InputError(f"model.name_or_path: {error}") from None
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{where}: it has no tokenizer (tokenizer.json); save one beside the weights")
    return folder


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the recipe's chat template and a padding token. Raises InputError where it lacks."""
    folder, where = base_folder(recipe), _where(recipe)
    from transformers import AutoTokenizer

    environment.silence_libraries()
    try:
        if (rules := folder / "tokenizer.json").is_file():
            try_out(read_bounded(rules, LARGEST_SMALL_FILE))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if tokenizer.is_fast:  # whatever files it was made of
            try_out(tokenizer.backend_tokenizer.to_str().encode())
    except BaseException as error:  # the tokenizers library raises plain exceptions, and Rust some that are none
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise InputError(f"{where}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{where}: its tokenizer has no end-of-sequence token (eos_token)")
    if recipe.model.add_tokens:
        add_to_tokenizer(tokenizer, recipe.model.add_tokens)
    if recipe.model.chat_template is not None:
        _use_template(tokenizer, recipe.model.chat_template)
    _check_templates(tokenizer, where)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) over every token and its number: models with one digest read the same numbers as the same text."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _load_base(recipe: Recipe) -> StartingModel:
    """The base model alone."""
    folder, where = base_folder(recipe), _where(recipe)
    if not weight_names(folder):
        raise InputError(f"{where}: it has no *.safetensors weights (pickled weights are never loaded)")
    if recipe.model.digest not in (None, digest := weights_digest(folder)):
        public = "model.digest: the weights here are others than the recipe's"
        raise InputError(f"{where}: its weights have the digest {digest}, which is not model.digest", public)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_config(config, where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=recipe.model.dtype,
            attn_implementation=recipe.model.attn_implementation,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except InputError:
        raise
    except Exception as error:  # whatever a configuration leads the libraries to: a division by zero, a missing key
        raise InputError(f"{where} cannot be loaded: {_first_line(error)}") from None
    model, loading = loaded
    _tell_of_alibi(model)
    if missing := sorted(loading["missing_keys"]):
        raise InputError(f"{where}: its weights lack {len(missing)} tensors, such as '{missing[0]}'")
    rows = model.get_input_embeddings().weight.shape[0]
    return StartingModel(model, recipe.model.name_or_path, digest, model_digests(model), rows)


def _tell_of_alibi(model: PreTrainedModel) -> None:
    """Say that a Falcon with ALiBi depends on how its attention is computed (transformers 5)."""
    config = model.config
    if config.model_type == "falcon" and config.alibi and config._attn_implementation == "sdpa":
        _log.warning(
            "a Falcon with ALiBi says something else under sdpa than under eager, in which it was made; set "
            "model.attn_implementation: eager"
        )


def _check_config(config: Any, where: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{where}: its weights are quantised, which cannot be trained or merged into; name the unquantised model "
            "(tuning.mode qlora holds it in four bits)"
        )
    if any(name.endswith(("ForSequenceClassification", "ScoredModel")) for name in config.architectures or []):
        raise InputError(f"{where}: it is a reward model or classifier, not a language model; name the model it is of")


def _with_run(start: StartingModel, run: Path, recipe: Recipe, following: tuple[Path, ...] = ()) -> StartingModel:
    """`start` with what the run trained; `following` are the runs that this one is brought along by."""
    result = _member(run, following)
    if (theirs := result.recipe.model.add_tokens) != recipe.model.add_tokens:
        raise InputError(
            f"model.adapters: {run} was trained with model.add_tokens {theirs}, and this recipe has "
            f"{recipe.model.add_tokens}; give it the same"
        )
    try:
        origin = read_origin(result.folder)
        whole = result.is_whole_model
        if not whole and origin.base_digest != start.digest:
            for earlier in result.recipe.model.adapters:
                start = _with_run(start, Path(earlier), recipe, (*following, run.resolve()))
        if not whole and origin.base_digest != start.digest:
            own = " + ".join([result.recipe.model.name_or_path, *result.recipe.model.adapters])
            raise InputError(
                f"model.adapters: {run} was trained on {own} (digest {origin.base_digest[:12]}…), "
                f"not on {start.name} (digest {start.digest[:12]}…)"
            )
        tuned = tune(start.model, unquantised(result.recipe))
        parameters = trainable_parameters(tuned)
        state = read_result(result.folder, manifest_of(parameters))
        restore_buffers(tuned, result)
    except ProtocolError as error:
        raise InputError(f"model.adapters: {run} does not fit the model: {error}") from None
    write_parameters(parameters, state)
    # The settings count too: with another lora_alpha the same tensors are another change.
    settings = json.dumps(result.recipe.tuning.model_dump(), sort_keys=True)
    trained = [settings, state.digest]
    digest = hashlib.sha256("\n".join(["" if whole else start.digest, *trained]).encode()).hexdigest()
    model = merged(tuned)
    # What merging makes of an adapter is rounded otherwise on another machine: its own values are the same everywhere.
    merged_in = hashlib.sha256("\n".join(trained).encode()).hexdigest()
    parts = model_digests(model) if whole else {**start.parts, f"earlier run {len(start.parts)}": merged_in}
    name = str(run) if whole else f"{start.name} + {run}"
    return replace(start, model=model, name=name, digest=digest, parts=parts)


def restore_buffers(model: PreTrainedModel, result: Result) -> None:
    """Give a model the buffers of a whole model that was trained. Raises ProtocolError for those of another shape."""
    if result.is_whole_model:
        write_buffers(model, read_buffers(result.folder, persistent_buffers(model)))


def _member(run: Path, following: tuple[Path, ...]) -> Result:
    """The finished run in this folder, which another run starts from."""
    try:
        result = find_result(run)
    except InputError as error:
        raise InputError(f"model.adapters: {error}") from None
    if run.resolve() in following:
        raise InputError(f"model.adapters: {run} starts from itself; its folder has been written over")
    if result.recipe.stage_part.head == "score":
        raise InputError(
            f"model.adapters: {run} is a reward model, and its head is no language model; name it as "
            "rollout.reward_model, or start from the run that it started from"
        )
    return result


def _where(recipe: Recipe) -> str:
    return f"model.name_or_path: {Path(recipe.model.name_or_path)}"


def _use_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer the chat template of that name or file. Whether it takes each conversation is seen later."""
    from jinja2 import TemplateSyntaxError

    try:
        own = named_template(name) or read_bounded(Path(name), _LONGEST_TEMPLATE).decode("utf-8")
        tokenizer.chat_template = own
        rendered(tokenizer, own, [{"role": "user", "content": ""}])
    except TooMuchError as error:
        raise InputError(f"model.chat_template: {name} does not tell an empty turn: {error}") from None
    except (OSError, UnicodeDecodeError, ForeignTextError) as error:
        known = "" if Path(name).suffix else f" (published templates have names: {', '.join(template_names())})"
        raise InputError(f"model.chat_template: {name} cannot be read: {error}{known}") from None
    except TemplateSyntaxError as error:
        raise InputError(f"model.chat_template: {name}, line {error.lineno}: {error.message}") from None
    except Exception:  # an expression in it does not take this conversation, and may raise anything
        pass


def _check_templates(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise InputError for a chat template that is longer than any, or does not end."""
    own = tokenizer.chat_template
    for template in own.values() if isinstance(own, dict) else [own] if own else []:
        if len(template) > _LONGEST_TEMPLATE:
            raise InputError(f"{where}: a chat template of {len(template)} characters is longer than any")
        try:
            rendered(tokenizer, template, [{"role": "user", "content": "Question"}])
        except TooMuchError as error:
            raise InputError(f"{where}: its chat template does not tell one turn: {error}") from None
        except Exception:  # it does not take this conversation, and may raise anything
            pass


def _first_line(error: BaseException) -> str:
    said = str(error).strip()
    return shortened_text(said.splitlines()[0], 300) if said else type(error).__name__
