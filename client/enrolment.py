"""A site's part in secure aggregation, whatever the run: its identity, the roster it pinned, its demands."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.pinned_roster import IDENTITY_KEY, load_identity, pinned_roster
from client.site_config import SiteConfig
from core_training.foundation.errors import InputError
from core_training.privacy.ledger import LEDGER_FILE, PrivacyLedger
from core_training.recipe.schema import Recipe
from security.private_files import read_private_file
from security.secure_aggregation.terms import Minimums, terms_of
from strategies.ring_scale import largest_change


@dataclass(frozen=True)
class Enrolment:
    """`roster` maps the sites' names to their identities; it is empty where none is pinned.

    `identity` is None for a gossip node, which is known by its certificate, and for a site without the key. `topology`
    is the kind of runs that the site takes part in: who gives it orders is a server, or its own node.
    """

    topology: Literal["federated", "gossip"]
    rounding_secret: str
    identity: Ed25519PrivateKey | None = None
    roster: Mapping[str, str] = field(default_factory=dict)
    minimums: Minimums = field(default_factory=Minimums)
    required: bool = False
    max_update_norm: float | None = None
    ledger: PrivacyLedger | None = None
    """The site's account of what it has released, with its budget; None keeps one beside its runs."""

    def check(self, recipe: Recipe) -> None:
        """Raise InputError for a recipe of another topology, and for one that protects less than this site demands."""
        if recipe.topology.kind != self.topology:
            # A node's site hands its own node the trained state as it is: a server must not get that by asking.
            raise InputError(
                f"topology.kind: this site takes part in {self.topology} runs, not in {recipe.topology.kind}"
            )
        terms = recipe.privacy.differential_privacy
        if terms is not None and terms.tell_losses and self.ledger is not None:
            raise InputError(
                "privacy.differential_privacy.tell_losses: it is for simulations, as no ε covers losses; leave it out"
            )
        if terms is None and self.ledger is not None and self.ledger.budget is not None:
            budget = self.ledger.budget
            raise InputError(
                f"privacy.differential_privacy: this site takes part in no run without it (privacy in its site.yaml: ε "
                f"{budget.epsilon:g} at δ {budget.delta:g} for each {budget.unit} in all); give it"
            )
        if recipe.privacy.secure is not None:
            self.minimums.check(terms_of(recipe, largest_change(recipe)))
        elif self.required:
            raise InputError(
                "privacy.secure_aggregation: this site takes part in no run without it (secure_aggregation.required "
                "in its site.yaml); set it to true"
            )
        elif self.max_update_norm is not None:
            self._check_norm(recipe.aggregation.max_update_norm, self.max_update_norm)

    @staticmethod
    def _check_norm(offered: float | None, most: float) -> None:
        if offered is None or offered > most:
            raise InputError(
                f"aggregation.max_update_norm: {'none is set' if offered is None else f'{offered:g}'}, and this site "
                f"takes part where no site's change counts that is larger than {most:g} (max_update_norm in its "
                f"site.yaml); set it to {most:g} or less"
            )


def load_enrolment(folder: Path, config: SiteConfig) -> Enrolment:
    """The enrolment in a site's folder. Raises InputError when key or roster is unusable."""
    identity = load_identity(folder) if (folder / IDENTITY_KEY).exists() else None
    pinned = pinned_roster(folder)
    demands = config.secure_aggregation
    return Enrolment(
        topology="federated" if config.server is not None else "gossip",
        rounding_secret=rounding_secret(folder),
        identity=identity,
        roster=pinned.identities if pinned else {},
        minimums=demands.minimums,
        required=demands.required,
        max_update_norm=config.max_update_norm,
        ledger=PrivacyLedger(folder / LEDGER_FILE, config.privacy.budget if config.privacy else None),
    )


def rounding_secret(folder: Path) -> str:
    """The secret that a site or node rounds its updates by, always the same: made of a key that stays in its folder.

    Raises InputError when the key cannot be read.
    """
    return hashlib.sha256(b"rounding" + read_private_file(folder / "keys" / "node.key")).hexdigest()
