"""The section `model`."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from core_training.parts.section import Section


class Model(Section):
    """The base model."""

    name_or_path: str = Field(
        description="Folder of the base model (weights, tokenizer, chat template), or its name on the hub, "
        "`OWNER/NAME` or `OWNER/NAME@REVISION`, of which this machine's cache has the files. A run writes down the "
        "commit, and goes on with it. In a real federation: the model's name, which each site maps in `site.yaml`."
    )
    download: bool = Field(
        False,
        description="Fetch a model by its name on the hub, once, where the cache lacks it. A site does so only if its "
        "own `site.yaml` allows it.",
    )
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        None,
        description="SHA-256 over the base's weights, as `fedloom model get` prints it; others are refused. A run of a "
        "model by its name on the hub writes it down.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type the frozen weights are held in and the model computes in; trained weights are float32.",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(None, description="How attention is computed, in transformers' words. Unset: what it chooses itself.")
    )
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Mixtures of experts, stages pretrain and sft: weight of the loss that keeps the router's choices "
        "in balance (Fedus et al. 2022). 0 leaves it out.",
    )
    chat_template: str | None = Field(
        None,
        description="Chat template to use instead of the model's own: a Jinja file, or the name of a published one "
        "(chatml, llama3, qwen3, gemma3, …: docs/templates.md).",
    )
    add_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Texts that become tokens of their own: each begins as the mean of all tokens, and its rows are "
        "trained and travel with the rest, beside adapters too. Those like `<|im_start|>` are special: no part of what "
        "a person or a reward function is shown.",
    )
    chat_date: Annotated[str, BeforeValidator(str)] = Field(
        "2025-01-01",
        description="The day that a chat template sees which prints today's date: the same records are the same tokens "
        "on every day.",
    )
    adapters: list[str] = Field(
        default_factory=list,
        description="Run folders whose results the run starts from, in this order: an adapter is merged into the "
        "base, a whole model takes its place. The result is also the reference policy, for the whole run.",
    )

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        if (self.attn_implementation or "").startswith("flash_") and self.dtype == "float32":
            raise ValueError(f"attn_implementation: {self.attn_implementation} is for 16 bits; set dtype: bfloat16")
        if len(set(self.add_tokens)) < len(self.add_tokens):
            raise ValueError("add_tokens: one of them is given twice")
        try:
            date.fromisoformat(self.chat_date)
        except ValueError:
            raise ValueError(f"chat_date: {self.chat_date!r} is not a day, such as 2025-01-31") from None
        return self
