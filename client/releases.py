"""What a run releases about a site or its units, on the site's account before it leaves."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import DataReport
from core_training.privacy.accounting import Release, epsilon_of
from core_training.privacy.ledger import BudgetSpentError, PrivacyLedger
from core_training.privacy.mechanism import RecordMechanism, SiteMechanism, mechanism_of
from core_training.recipe.differential_privacy import DifferentialPrivacy
from core_training.recipe.schema import Recipe
from strategies.messages import TrainOrder

_ROUNDING = 1.001


@dataclass(frozen=True)
class Releases:
    """One run's releases at this site; of a run without differential privacy there is no account."""

    run_id: str
    ledger: PrivacyLedger
    mechanism: RecordMechanism | SiteMechanism | None

    @classmethod
    def of(cls, recipe: Recipe, units: int, run_id: str, ledger: PrivacyLedger) -> Releases:
        """Those of a run at a site that trains on so many units.

        Raises BudgetSpentError where the whole run would lead beyond the site's budget, and InputError where what it
        comes to cannot be computed.
        """
        mechanism = mechanism_of(recipe, units)
        if mechanism is not None:
            ledger.check(mechanism.run, but_for=run_id)
        return cls(run_id, ledger, mechanism)

    @property
    def tell_losses(self) -> bool:
        """Whether the run's losses and counts may leave the site."""
        return self.mechanism is None or self.mechanism.terms.tell_losses

    def announced(self, data: DataReport) -> DataReport:
        """What the site says of its data: under differential privacy no more than how many units it has.

        The other counts follow from what a recipe holds out, cuts and leaves out, and so would tell of single records.
        """
        if self.tell_losses:
            return data
        return DataReport(data.units or data.train_examples, 0, 0, 0, data.units)

    def check(self, steps: int) -> None:
        """Raise BudgetSpentError, before any of them is taken, where so many steps would lead too far."""
        if self.mechanism is not None:
            release = self.mechanism.release(steps)
            self._check_run(release, self.mechanism.terms)
            self.ledger.check(release)

    def charge(self, order: TrainOrder, sent: TrainableState, steps: int) -> None:
        """Write down that a state leaves, to which so many steps led; once, however often it leaves.

        Raises BudgetSpentError where that would lead beyond the budget, and RunError where nothing can be written.
        """
        if self.mechanism is None:  # a large state's digest takes long
            return
        # With other room in the ring for sites, the noise that hides a whole one is another, too.
        room = order.ring.sites if order.ring is not None else 0
        self._charge(order.round, hashlib.sha256(f"{sent.digest} {room}".encode()).hexdigest(), steps)

    def charge_failure(self, order: TrainOrder, steps: int) -> None:
        """Write down a slice that failed: that it did is an answer, too, each time."""
        self._charge(order.round, secrets.token_hex(32), steps)

    def _charge(self, round_number: int, digest: str, steps: int) -> None:
        if self.mechanism is not None:
            self.ledger.charge(self.run_id, round_number, digest, self.mechanism.release(steps))

    def _check_run(self, release: Release, terms: DifferentialPrivacy) -> None:
        """Raise BudgetSpentError where the run would come to more than the ε that its recipe names."""
        if terms.epsilon is None:
            return
        so_far = [line.release for line in self.ledger.lines() if line.run == self.run_id]
        if (epsilon := epsilon_of([*so_far, release], terms.delta)) > terms.epsilon * _ROUNDING:
            raise BudgetSpentError(
                f"privacy.differential_privacy.epsilon: {release.steps} more steps would bring this run to ε "
                f"{epsilon:.3g}, and its recipe says {terms.epsilon:g}; rounds that were void or taken back count, too"
            )
