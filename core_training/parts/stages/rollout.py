"""The sampling and judging of answers, for the stages that train on the model's own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core_training.parts.section import AnswerTokens, Section


class Rollout(Section):
    """Stages `ppo`, `rloo` and `grpo`: how answers are sampled, and what judges them."""

    reward_model: str | None = Field(None, description="Run folder of a run of stage `reward`.")
    reward_function: (
        str | Annotated[dict[str, Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)] | None
    ) = Field(
        None,
        description="Instead: `FILE.py:name`, a function of (prompts, completions), two lists of texts, that returns "
        "a list of numbers; further parameters are columns of the prompts' records, a list of values each. "
        "`trl:think_format_reward` is one of TRL's (docs/stages.md). Several with their weights: `{a.py:f: 1, b.py:g: "
        "0.5}`; each is reported by itself.",
    )
    max_new_tokens: AnswerTokens = Field(64, description="Longest answer, in tokens.")
    # Below 0.01, where the likeliest token is all but certain, logits leave the range of their type.
    temperature: Annotated[float, Field(ge=0.01)] = Field(1.0, description="Sampling temperature.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus sampling; 1 samples from all tokens.")
    stop: list[str] = Field(
        default_factory=list, description="Tokens that end an answer, besides the model's end-of-sequence token."
    )
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Taken off the reward of an answer that was cut at `max_new_tokens`."
    )

    @property
    def reward_functions(self) -> dict[str, float]:
        """The functions that judge, with their weights."""
        if self.reward_function is None or isinstance(self.reward_function, dict):
            return self.reward_function or {}
        return {self.reward_function: 1.0}
