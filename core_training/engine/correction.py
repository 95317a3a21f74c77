"""Corrections of the local step: what keeps many steps on one site's data from leading away from all sites' optimum.

A correction is added to the gradients just before each optimizer step, through PyTorch's own hook there. Every trainer
ends in that step, however often it takes one and however it came by its gradients, so this seam serves all stages:
gradient accumulation, clipping and the reported loss are over by then. Knows nothing of stages, rounds or other sites.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from core_training.foundation.errors import InputError
from core_training.foundation.state import Manifest, TrainableState
from core_training.models.parameters import Parameters, read_parameters
from core_training.parts.outer_steps.feddyn import DynamicRegularisation
from core_training.recipe.schema import Recipe

_STATE_FILE = "correction.safetensors"
_NUMBERS_FILE = "correction.json"


class Start(Enum):
    """The event between a slice and the one before it."""

    SAME_ROUND = auto()
    """Nothing: no state was written."""
    NEXT_ROUND = auto()
    """The state that the one trained here became in the mean with the others'."""
    LATER_ROUND = auto()
    """Such a state after rounds that this site missed."""


class Correction(Protocol):
    """A site's own correction: it remembers from slice to slice what no other site is told."""

    def during(
        self, parameters: Parameters, optimizer: Any, start: Start, *, left_out: bool = False
    ) -> AbstractContextManager[None]:
        """Correct every step that `optimizer` (PyTorch's own) takes within. `parameters` hold the slice's start.

        `left_out`: what the round before led to here entered no mean.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write what it remembers into `folder`, which exists."""
        ...

    def load(self, folder: Path, manifest: Manifest) -> None:
        """Remember what `save` wrote."""
        ...


def correction_of(recipe: Recipe) -> Correction | None:
    """A new correction as the recipe asks for it. Central training has nothing to be corrected.

    Raises InputError for DeepSpeed, which may be a site's own choice (`site.yaml`) and not the recipe's.
    """
    settings = recipe.aggregation
    if recipe.topology.kind == "central" or not settings.corrects:
        return None
    if recipe.deepspeed.used:
        raise InputError(
            "deepspeed: aggregation.proximal_mu, scaffold and outer.step feddyn change gradients that DeepSpeed keeps "
            "to itself; train without it, or without them"
        )
    if settings.outer.step_part.correction is not None:
        correction: Correction = settings.outer.step_part.make_correction(settings.outer)
        return correction
    return Scaffold() if settings.scaffold else FedProx(settings.proximal_mu)


class FedProx:
    """Adds μ(w − w₀), the gradient of μ/2·‖w − w₀‖², where w₀ is the state the round began with (Li et al. 2020)."""

    def __init__(self, mu: float) -> None:
        self._mu = mu
        self._center: TrainableState | None = None

    @contextmanager
    def during(self, parameters: Parameters, optimizer: Any, start: Start, *, left_out: bool = False) -> Iterator[None]:
        # A round may be trained in several slices: all are pulled to where it began.
        if self._center is None or start is not Start.SAME_ROUND:
            self._center = read_parameters(parameters)
        with _before_each_step(optimizer, partial(_pull, parameters, _beside(parameters, self._center), self._mu)):
            yield

    def save(self, folder: Path) -> None:
        if self._center is not None:
            self._center.write(folder / _STATE_FILE)

    def load(self, folder: Path, manifest: Manifest) -> None:
        self._center = _read_state(folder, manifest)


class Scaffold:
    """SCAFFOLD (Karimireddy et al. 2020, option II): adds c − cᵢ, the mean's direction less this site's own.

    With x the state a round began with, yᵢ what a site sent of it, x⁺ the mean, and η the sum of the round's learning
    rates, cᵢ = (x − yᵢ)/η and c = (x − x⁺)/η, so c − cᵢ = (yᵢ − x⁺)/η: a site knows it from what it sent and what it
    got. For this to hold whatever the weights and whoever took part, a site takes the bend out of the state that it
    sends: yᵢ = x − η·(its mean gradient along the bent path). See docs/decisions/015.
    """

    def __init__(self) -> None:
        self._sent: TrainableState | None = None
        self._learning_rates = 0.0
        """The sum over the steps that led to `_sent`."""

    @contextmanager
    def during(self, parameters: Parameters, optimizer: Any, start: Start, *, left_out: bool = False) -> Iterator[None]:
        bends = self._bends(parameters, start)
        learning_rates = 0.0

        def bend() -> None:
            nonlocal learning_rates
            # The groups differ in weight decay alone, so one speaks for all.
            learning_rates += optimizer.param_groups[0]["lr"]
            for parameter, direction in bends:
                _add_gradient(parameter, direction)

        with _before_each_step(optimizer, bend):
            yield
        # The bends moved the parameters by −η(c − cᵢ): without them the state is what the class docstring calls yᵢ.
        with torch.no_grad():
            for parameter, direction in bends:
                parameter.add_(direction, alpha=learning_rates)
        self._sent, self._learning_rates = read_parameters(parameters), learning_rates

    def _bends(self, parameters: Parameters, start: Start) -> list[tuple[Any, torch.Tensor]]:
        """Each parameter with its part of c − cᵢ; none where a site cannot know it."""
        # While the learning rate warms up from 0, a round may move nothing.
        if self._sent is None or self._learning_rates == 0 or start is not Start.NEXT_ROUND:
            return []
        sent = _beside(parameters, self._sent)
        return [
            (parameter, (before - parameter.detach()) / self._learning_rates)
            for before, parameter in zip(sent, parameters.values(), strict=True)
        ]

    def save(self, folder: Path) -> None:
        if self._sent is not None:
            self._sent.write(folder / _STATE_FILE)
            (folder / _NUMBERS_FILE).write_text(json.dumps({"learning_rates": self._learning_rates}))

    def load(self, folder: Path, manifest: Manifest) -> None:
        self._sent = _read_state(folder, manifest)
        if self._sent is not None:
            self._learning_rates = json.loads((folder / _NUMBERS_FILE).read_text())["learning_rates"]


class FedDyn:
    """FedDyn (Acar et al. 2021): adds −gᵢ + α(w − x), the gradient of −⟨gᵢ, w⟩ + α/2·‖w − x‖², where x is the state
    that the round began with and gᵢ⁺ = gᵢ − α(yᵢ − x) of what the site sent.

    With cᵢ = −gᵢ/α, the sum of the site's own changes that counted, that is α(w − (x − cᵢ)): FedProx's pull, away from
    where the site itself has gone so far. The server has the sum of all cᵢ (`strategies.outer_steps.feddyn`), so a
    change that entered no mean must not enter cᵢ. See docs/decisions/048.
    """

    def __init__(self, settings: DynamicRegularisation) -> None:
        self._alpha = settings.alpha
        self._center: TrainableState | None = None
        """The state that the present round began with, x."""
        self._counted: TrainableState | None = None
        """cᵢ without the present round's change."""
        self._trained: TrainableState | None = None
        """What the present round led to, yᵢ."""

    @contextmanager
    def during(self, parameters: Parameters, optimizer: Any, start: Start, *, left_out: bool = False) -> Iterator[None]:
        if self._center is None or start is not Start.SAME_ROUND:
            if not left_out:
                self._settle()
            self._center = read_parameters(parameters)
        pulled_to = self._center
        if self._counted is not None:
            pulled_to = TrainableState(pulled_to.manifest, pulled_to.buffer - self._counted.buffer)
        with _before_each_step(optimizer, partial(_pull, parameters, _beside(parameters, pulled_to), self._alpha)):
            yield
        self._trained = read_parameters(parameters)

    def _settle(self) -> None:
        """Count the change of the round that has ended."""
        if self._center is None or self._trained is None:
            return
        change = self._trained.buffer - self._center.buffer
        before = 0.0 if self._counted is None else self._counted.buffer
        self._counted = TrainableState(self._center.manifest, before + change)

    def save(self, folder: Path) -> None:
        for name, state in (("center", self._center), ("counted", self._counted), ("trained", self._trained)):
            if state is not None:
                state.write(folder / f"correction-{name}.safetensors")

    def load(self, folder: Path, manifest: Manifest) -> None:
        self._center, self._counted, self._trained = (
            _read_state(folder, manifest, f"correction-{name}.safetensors") for name in ("center", "counted", "trained")
        )


@contextmanager
def _before_each_step(optimizer: Any, correct: Callable[[], None]) -> Iterator[None]:
    hook = optimizer.register_step_pre_hook(lambda *_: correct())
    try:
        yield
    finally:
        hook.remove()


def _pull(parameters: Parameters, centers: Sequence[torch.Tensor], strength: float) -> None:
    for parameter, center in zip(parameters.values(), centers, strict=True):
        _add_gradient(parameter, parameter.detach() - center, strength)


def _add_gradient(parameter: Any, gradient: torch.Tensor, scale: float = 1.0) -> None:
    if parameter.grad is None:  # no part of this batch's loss
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient, alpha=scale)


def _beside(parameters: Parameters, state: TrainableState) -> Sequence[torch.Tensor]:
    """The state's tensors where the parameters are."""
    pairs = zip(state.tensors(), parameters.values(), strict=True)
    return [torch.from_numpy(view).to(parameter.device) for (_, view), parameter in pairs]


def _read_state(folder: Path, manifest: Manifest, name: str = _STATE_FILE) -> TrainableState | None:
    file = folder / name
    return TrainableState.from_bytes(file.read_bytes(), manifest) if file.exists() else None
