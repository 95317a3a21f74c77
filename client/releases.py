"""What a run releases about a site or its units, on the site's account before it leaves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from core_training.foundation.state import TrainableState
from core_training.privacy.ledger import PrivacyLedger
from core_training.privacy.mechanism import RecordMechanism, SiteMechanism, mechanism_of
from core_training.recipe.schema import Recipe
from strategies.messages import TrainOrder


def released_digest(order: TrainOrder, trained: TrainableState) -> str:
    """The digest (hex) of what leaves in answer to an order: of the state, and of the room that the ring has for sites.

    With other room the noise that hides a whole site is another one.
    """
    room = order.ring.sites if order.ring is not None else 0
    return hashlib.sha256(f"{trained.digest} {room}".encode()).hexdigest()


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

    def check(self, steps: int) -> None:
        """Raise BudgetSpentError, before any of them is taken, where so many steps would lead beyond the budget."""
        if self.mechanism is not None:
            self.ledger.check(self.mechanism.release(steps))

    def charge(self, round_number: int, digest: str, steps: int) -> None:
        """Write down that a state of this digest leaves, to which so many steps led; once, however often it leaves.

        Raises BudgetSpentError where that would lead beyond the budget, and RunError where nothing can be written.
        """
        if self.mechanism is not None:
            self.ledger.charge(self.run_id, round_number, digest, self.mechanism.release(steps))
