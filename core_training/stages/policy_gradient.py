"""The base of PPO, RLOO and GRPO: sample answers, score them, judge them, and train on them for several passes.

One optimizer step of the run (its schedule, its local steps) is one rollout with all the updates made from it. The
rollout's minibatches are the same in every pass, so that the policy is scored in the very forward that is trained, and
the first ratio is exactly 1; the prompts come shuffled anyway.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.distributions import Categorical
from transformers.modeling_layers import GradientCheckpointingLayer

from core_training.data.examples import IGNORED, Batch, Example, Row, Tokens
from core_training.data.records import Record
from core_training.foundation.errors import InputError
from core_training.foundation.trainable import NOTHING_EVALUATED, EvalReport
from core_training.models.base_model import BaseModel
from core_training.models.context import context_length
from core_training.models.heads import VALUE_HEAD, innermost
from core_training.models.prepared_model import PreparedModel
from core_training.parts.data_kinds.values import Prompt
from core_training.recipe.schema import Recipe
from core_training.stages.base import BatchLoss, Stage, mean_figure
from core_training.stages.chat import prompt_tokens
from core_training.stages.kl import Estimator, KLController, kl_estimates
from core_training.stages.language import at_positions, labelled_logits, labelled_positions, token_logps
from core_training.stages.rewards import load_judge
from core_training.stages.rollout import Sampler, plain_text

_PART = "reward_"
"""The beginning of the names of figures that are parts of the reward."""
_KL_COEF = "kl_coef"

Part = dict[str, torch.Tensor]
"""A minibatch of a rollout: the tensors of `Sampler.sample`; `rewards` (answers,); and, of shape (answers, positions)
with a position where some answer has a token, `mask`, `logps`, `reference_logps`, `values`, and what `credit` adds."""

Sum = Callable[[torch.Tensor], torch.Tensor]
"""The sum of a tensor over all processes."""


class Scores(NamedTuple):
    """A model's figures on sampled answers, each of shape (answers, positions) and 0 outside the answers."""

    mask: torch.Tensor
    logps: torch.Tensor
    """Log-probability (nats) of each token under the policy at its sampling temperature."""
    entropy: torch.Tensor
    values: torch.Tensor | None
    """Expected return before each token, where there is a value head."""


def clipped_losses(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """−min(r·A, clip(r, 1 ± ε)·A) with r = π/π_old, and where the clipped side was taken (Schulman 2017, eq. 7)."""
    # Shapes: logps, losses (answers, positions), for whole answers (answers,); advantages broadcast to them.
    ratio = torch.exp(logps - old_logps)
    free = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -torch.minimum(free, clipped), clipped < free


def masked_figure(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A figure that is the mean of `values` where the mask is true."""
    # Shapes: values, mask (answers, positions); sum, count ().
    return (values.detach().float() * mask).sum(), mask.sum()


class PolicyGradientStage(Stage[Prompt]):
    """A stage whose subclasses turn rewards into advantages (`credit`) and give the loss (`policy_loss`)."""

    adds_up = False  # a batch is one rollout
    usual_truncation = "keep_end"  # where the answer follows
    kl_coef: float
    kl_estimator: Estimator = "k1"

    def __init__(self, recipe: Recipe, base: BaseModel) -> None:
        super().__init__(recipe, base)
        part, settings = recipe.stage_part, recipe.stage_settings
        self.generations = part.answers(settings)
        """Answers to each prompt."""
        self.passes = part.passes(settings)
        """Passes over a rollout."""
        self.mini_batches = part.mini_batches(settings)
        """Parts of a rollout, an update each."""
        self.judge = load_judge(recipe, base)
        self.sampler = Sampler.of(recipe.rollout, base)

    @property
    def initial_digest(self) -> str:
        """A digest over the model and the reward model that judges; a reward function is the site's own."""
        if self.judge.digest is None:
            return super().initial_digest
        return hashlib.sha256(f"{super().initial_digest}\n{self.judge.digest}".encode()).hexdigest()

    def kl_controller(self) -> KLController:
        return KLController(self.kl_coef)

    def policy_loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """The loss to minimise, on a part of a rollout."""
        raise NotImplementedError

    def credit(self, parts: Sequence[Part], kl_coef: float, total: Sum) -> None:
        """Add `advantages` (and whatever else the loss wants) to the parts of one rollout."""
        raise NotImplementedError

    @property
    def further_columns(self) -> list[str]:
        return self.judge.columns

    def tokenise(self, record: Record, values: Prompt) -> Example:
        ids = prompt_tokens(values.prompt, self.base, record, values.tools).input_ids
        length = min(len(ids), self.recipe.training.max_length)
        room = min(context_length(self.base.model), self.judge.room)
        if length + self.recipe.rollout.max_new_tokens > room:
            raise InputError(
                f"{record.place}: a prompt of {length} tokens and an answer of rollout.max_new_tokens "
                f"({self.recipe.rollout.max_new_tokens}) exceed the {room} tokens that the model or its judge takes; "
                "lower it, or training.max_length, to which prompts are cut"
            )
        return Example((Tokens(ids, ids.copy()),), columns=self.judge.columns_of(record))

    def cut(self, whole: Example, limit: int) -> list[Example]:
        """Nothing of a prompt is learnt, so that any of it will do."""
        return self.shortened(whole, limit)

    def check(self, examples: Sequence[Example]) -> None:
        prompts = [plain_text(example.sequences[0].input_ids, self.base.tokenizer) for example in examples[:2]]
        self.judge.try_out(prompts, [example.columns for example in examples[:2]])

    def weight(self, batch: Batch) -> torch.Tensor:
        """The answers' tokens in a part of a rollout."""
        return batch["mask"].sum()

    def score(self, model: nn.Module, answers: Batch) -> Scores:
        """One forward over sampled answers; the output layer runs only where some answer has a token."""
        # Shapes: logits (answers, positions, vocabulary); hidden (answers, positions, width); scores as `mask`.
        hidden: list[torch.Tensor] = []
        inner = innermost(self.base.model)
        value_head = getattr(inner, VALUE_HEAD, None)
        # The output layer's input is what the value head reads: no other layer's activations need to be kept for it.
        watch = inner.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
        try:
            logits, labels = labelled_logits(model, answers)
        finally:
            watch.remove()
        mask = labels != IGNORED
        logits = logits / self.recipe.rollout.temperature
        # One answer at a time: another tensor of the logits' size would be the largest of all.
        policies = [Categorical(logits=row, validate_args=False) for row in logits.detach()]
        entropy = torch.stack([policy.entropy() for policy in policies]) * mask
        if value_head is None:
            return Scores(mask, token_logps(logits, labels), entropy, None)
        values = value_head(at_positions(hidden[0], labelled_positions(answers))).squeeze(-1) * mask
        return Scores(mask, token_logps(logits, labels), entropy, values)

    def set_mode(self, model: nn.Module) -> None:
        """Leave dropout out, which would make another policy than the one that sampled."""
        model.eval()
        if self.recipe.training.gradient_checkpointing:
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):  # recomputes activations in training mode only
                    module.training = True

    def updates(
        self, prepared: PreparedModel, batches: Sequence[Sequence[Batch]], memory: dict[str, float]
    ) -> Iterator[Sequence[Sequence[Batch]]]:
        """One rollout on each batch; an update for each of their minibatches, in every pass."""
        rollouts = [self.roll_out(prepared, prompts) for (prompts,) in batches]
        parts = [part for rollout in rollouts for part in rollout]
        controller = self.kl_controller()
        # The coefficient is steered over the whole run, so it is read from what checkpoints keep.
        controller.coef = memory.get(_KL_COEF, controller.coef)
        # All rollouts of the step together, as PPO whitens over all of them.
        self.credit(parts, controller.coef, prepared.total)
        for part in parts:
            part["kl_coef"] = torch.tensor([controller.coef], device=prepared.device)
        # One update takes the same minibatch of every rollout; a small rollout has none for the last updates.
        minibatches = [[r[i] for r in rollouts if i < len(r)] for i in range(max(map(len, rollouts)))]
        for number in range(self.passes):
            for minibatch in minibatches:
                yield [[part | {"first_pass": torch.tensor(number == 0, device=prepared.device)}] for part in minibatch]
        kl = torch.stack([self.kl(part).sum() for part in parts]).sum()
        # Counted, not multiplied: processes may have unequal numbers of answers, and must steer alike.
        count = torch.tensor(sum(len(part["rewards"]) for part in parts), device=prepared.device)
        answers = int(prepared.total(count))
        # Only now: one coefficient holds from a step's rewards to its last pass.
        controller.update(float(prepared.total(kl)) / answers, answers)
        memory[_KL_COEF] = controller.coef

    @torch.no_grad()
    def roll_out(self, prepared: PreparedModel, prompts: Batch) -> list[Part]:
        """Answers to a batch of prompts, judged, and scored by policy and reference, in `mini_batches` parts."""
        prepared.model.eval()
        answers = self.sampler.sample(prepared.unwrapped, prompts, self.generations)
        answers |= self.rewards(answers)
        rows = torch.arange(len(answers["rewards"]), device=answers["rewards"].device)
        # All processes must make as many updates.
        parts = [
            self._scored(prepared.model, {name: tensor[chosen] for name, tensor in answers.items()})
            for chosen in rows.tensor_split(min(self.mini_batches, prepared.fewest(len(rows))))
        ]
        self._add_reference(prepared, parts)
        return parts

    def rewards(self, answers: Batch) -> Part:
        """The judge's `rewards`, less the penalty for an answer that was cut, and their parts; shapes (answers,)."""
        judged = self.judge(answers)
        penalty = self.recipe.rollout.missing_eos_penalty
        cut = 0.0 if penalty is None else penalty * (~answers["ended"]).float()
        return {"rewards": judged.total - cut, **{_PART + name: part for name, part in judged.parts.items()}}

    def kl(self, part: Batch) -> torch.Tensor:
        """Estimated KL from the reference policy, of each token (answers, positions), as the answers were sampled."""
        return kl_estimates(part["logps"], part["reference_logps"], self.kl_estimator) * part["mask"]

    def rollout_figures(self, part: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The figures on sampled answers: means over answers, KL in nats an answer, length in tokens."""
        return {
            "reward": mean_figure(part["rewards"]),
            "kl": mean_figure(self.kl(part).sum(dim=1)),
            "answer_length": mean_figure(part["mask"].sum(dim=1)),
            "ended": mean_figure(part["ended"]),
            **{name: mean_figure(rewards) for name, rewards in part.items() if name.startswith(_PART)},
        }

    def loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        """The policy's loss on a minibatch; a rollout's own figures count in the first of its passes."""
        loss = self.policy_loss(model, batch)
        figures = self.rollout_figures(batch)
        if self.kl_controller().target is not None:
            figures["kl_coef"] = mean_figure(batch["kl_coef"])
        first = batch["first_pass"]  # names that every batch has
        counted = {name: (total * first, count * first) for name, (total, count) in figures.items()}
        return replace(loss, figures={**loss.figures, **counted})

    def evaluate(self, prepared: PreparedModel, rows: Sequence[Row]) -> EvalReport:
        """−(reward − kl_coef·KL), with one answer to each prompt, from a fixed seed; the caller's generator is kept."""
        devices = [prepared.device] if prepared.device.type == "cuda" else []
        sampled: list[tuple[int, Part]] = []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            for index, (mine, prompts) in enumerate(prepared.shared_batches(rows)):
                # A seed for each batch at each process, or processes would draw alike.
                torch.manual_seed(self.recipe.training.seed + index * prepared.processes + prepared.process)
                answers = self.sampler.sample(prepared.unwrapped, prompts)
                scored = self._scored(prepared.model, answers | self.rewards(answers))
                sampled.append((len(mine), scored))
        self._add_reference(prepared, [part for _, part in sampled])
        report = NOTHING_EVALUATED
        for examples, part in sampled:
            gains = part["rewards"] - self.kl_coef * self.kl(part).sum(dim=1)
            count = torch.tensor(len(gains), device=gains.device)
            loss = BatchLoss(-gains.sum(), count, part["mask"].sum(), self.rollout_figures(part))
            report += loss.report(examples)
        return report

    def _scored(self, model: nn.Module, answers: Part) -> Part:
        scores = self.score(model, answers)
        values = {} if scores.values is None else {"values": scores.values}
        return answers | {"mask": scores.mask, "logps": scores.logps} | values

    def _add_reference(self, prepared: PreparedModel, parts: Sequence[Part]) -> None:
        # Once for all parts: each change of policy copies all trained parameters.
        with prepared.reference_policy():
            for part in parts:
                part["reference_logps"] = self.score(prepared.model, part).logps
