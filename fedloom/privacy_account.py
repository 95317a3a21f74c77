"""A recipe's protection and its limits, in five plain lines: they promise nothing beyond docs/security.md.

Loads no model and no data, and does not know how many sites there will be.
"""

from __future__ import annotations

from contextlib import suppress

from core_training.foundation.errors import ProtocolError
from core_training.parts.aggregation_rules.group_gate import GROUP_GATE
from core_training.privacy.accounting import epsilon_of
from core_training.privacy.mechanism import RecordMechanism, SiteMechanism
from core_training.recipe.differential_privacy import EACH_RECORD, DifferentialPrivacy
from core_training.recipe.schema import Recipe
from core_training.recipe.sections.privacy import SecureAggregation
from security.secure_aggregation.graph import MOST_NEIGHBOURS
from security.secure_aggregation.terms import Terms, terms_of

_EXAMPLES = (3, 6, 16)
"""Numbers of sites for which a rule is worked out."""

_MOST_EPSILON = 10.0
"""Beyond it, one site's part may show in full all the same."""

_WORKED_OUT = (1_000, 10_000)
"""Numbers of units for which ε is worked out."""


def privacy_of(recipe: Recipe) -> dict[str, str]:
    """A line each on who sees what, one dishonest party's power, drop-outs, and what is not protected.

    One on what differential privacy comes to, where the recipe asks for it. Raises InputError where that cannot be
    computed, for want of dp-accounting.
    """
    account = _of_parties(recipe)
    if recipe.privacy.differential_privacy is not None:
        hidden = recipe.privacy.differential_privacy.hidden
        account[f"each {hidden}"] = _of_each_unit(recipe, recipe.privacy.differential_privacy)
    return account


def _of_parties(recipe: Recipe) -> dict[str, str]:
    if recipe.topology.kind == "central":
        return _central(recipe)
    secure = recipe.privacy.secure
    if recipe.topology.kind == "federated":
        return _federated_masked(recipe, secure) if secure else _federated(recipe)
    return _gossip_masked(recipe, secure) if secure else _gossip(recipe)


def _of_each_unit(recipe: Recipe, terms: DifferentialPrivacy) -> str:
    """What may be told of any one unit, by whoever sees all that a site sends; or of a site, by who sees the sums."""
    if (of_sites := SiteMechanism.of(recipe)) is not None:
        return _of_each_site(of_sites)
    of = "record" if terms.unit == EACH_RECORD else f"{terms.unit}, all its records together,"
    found = [mechanism for units in _WORKED_OUT if (mechanism := RecordMechanism.of(recipe, units)) is not None]
    if terms.epsilon is not None:
        noise = ", ".join(f"{one.noise_multiplier:.2f} clips with {one.units:,} of them" for one in found)
        said = f"ε {terms.epsilon:g} at most at δ {terms.delta:g}; the noise for it is {noise}"
    else:
        worked_out = ", ".join(f"{epsilon_of([one.run], terms.delta):.3g} with {one.units:,} of them" for one in found)
        said = f"ε {worked_out}, at δ {terms.delta:g}"
    told = "; losses are told, and not covered" if terms.tell_losses else "; sites tell no losses"
    return f"what a site sends tells little of any one {of} it has: {said}, if no round is void{told}"


def _of_each_site(mechanism: SiteMechanism) -> str:
    terms, noise = mechanism.terms, mechanism.noise_multiplier
    epsilon = epsilon_of([mechanism.run], terms.delta)
    worth = "" if epsilon <= _MOST_EPSILON else ", which is no privacy: take more noise, or fewer rounds"
    return (
        f"the sums of {mechanism.rounds} rounds tell of a whole site ε {epsilon:.3g} at δ {terms.delta:g}{worth}, if "
        f"no round is void; each sum has noise of {noise:.3g} times the most that one site can add, which few sites do "
        "not bear (docs/privacy.md); sites tell no losses"
    )


def _remembers(recipe: Recipe) -> str:
    if recipe.privacy.differential_privacy is not None:
        return "what the final model remembers of each record beyond what ε bounds"
    return "what the final model remembers of the records (privacy.differential_privacy bounds it)"


def _central(recipe: Recipe) -> dict[str, str]:
    return _account(
        sees="whoever may read this machine's files; nothing leaves it",
        server="there is none",
        site="there is none",
        drop_outs="nobody else takes part; an interrupted run goes on with --resume",
        unprotected=_remembers(recipe),
    )


def _federated_masked(recipe: Recipe, secure: SecureAggregation) -> dict[str, str]:
    terms = terms_of(recipe, clip=1.0)
    if isinstance(secure.threshold, int):
        rule = f"{_sites(secure.threshold)} remain"
    else:
        worked_out = ", ".join(f"{terms.threshold_of(count)} of {count}" for count in _EXAMPLES)
        rule = f"more than {secure.threshold or '⅔'} of those that began remain ({worked_out})"
    least, league = terms.minimum_sites, _sites(_league(terms))
    return _account(
        sees=f"the server sees sums over at least {least} sites, of changes{_figures_seen(recipe)}, never a "
        f"site's own; of each site its number of records, its times{_and_final_loss(recipe)}",
        server="alone it opens no single update and takes no site's place; but it can choose who takes part, so that "
        "two runs over sites that differ by one leave that one's update as the difference, unless the sites demand "
        f"minimum_sites of them all; it can send states of its own making{_and_judge(recipe)}; with {league} in league "
        f"it opens another's update{_is_refused(terms)}",
        site=f"it sees {_mean_seen(recipe)}, so of {least} sites the sum of the other {least - 1}; unseen, it can "
        f"{_push(recipe)}{_gated(recipe)}",
        drop_outs=f"a round counts when {rule}, and at least {max(least, recipe.topology.fewest_sites)}, within "
        f"{recipe.topology.round_deadline:g} s; else it is void, the state stays, and the next round begins",
        unprotected=f"the difference between sums over different sites; {_signs(recipe)}{_remembers(recipe)}",
    )


def _federated(recipe: Recipe) -> dict[str, str]:
    topology = recipe.topology
    return _account(
        sees=f"the server sees every site's own {_update(recipe)}, its weight{_and_losses(recipe)} and times",
        server=f"it can read {_text(recipe)} out of single updates, send states of its own making, leave sites out, "
        "and make any state the result",
        site=f"it sees {_mean_seen(recipe, 'the mean of all sites')}; it can {_push(recipe)}{_gated(recipe)}",
        drop_outs=f"a round counts with at least {_sites(recipe.needed_sites)} within {topology.round_deadline:g} "
        "s; else it is tried again, and after three times the run stops at its last commit",
        unprotected=f"single updates, from the server{_codec_hides_nothing(recipe)}; privacy.secure_aggregation: true "
        f"leaves it their sum; {_remembers(recipe)}",
    )


def _gossip_masked(recipe: Recipe, secure: SecureAggregation) -> dict[str, str]:
    least = max(secure.minimum_sites, recipe.topology.fewest_sites)
    return _account(
        sees=f"the members of a group see the sum of their changes and weights, over at least {least} members, and no "
        "other member's own; of each other they know name, address and when it answers",
        server="there is none; whoever signs the roster says who belongs, and could fill it with sites of their own",
        site=f"it sees the sum, so of {least} members that of the other {least - 1}; in league with all but one, that "
        f"one's own; unseen, it can {_push(recipe)}; by accusing others it can make groups as small as that"
        f"{_is_believed(recipe, least)}",
        drop_outs="the group breaks up and forms again in the same round, with new keys and at least "
        f"{least} members; with fewer the round is void, and the state stays",
        unprotected=f"the difference between the sums of groups that are not the same; {_signs(recipe)}"
        f"{_remembers(recipe)}",
    )


def _gossip(recipe: Recipe) -> dict[str, str]:
    least = recipe.topology.fewest_sites
    in_rings = recipe.privacy.ring_bits is not None
    remedy = "privacy.secure_aggregation: true leaves them the sum"
    if recipe.aggregation.mixing != "group":
        remedy = "secure aggregation, which hides them, needs aggregation.mixing group"
    return _account(
        sees="each member of a group sees its share of every other's change as it is, and the sum of them all"
        if in_rings
        else f"each node sees the whole {_update(recipe)} and the weight of every node that it mixes with",
        server="there is none; whoever signs the roster says who belongs",
        site=f"it can read {_text(recipe)} out of what the others send; it can {_push(recipe)}"
        f"{_is_believed(recipe, least)}",
        drop_outs="the group breaks up and forms again in the same round, with at least "
        f"{_sites(least)}; with fewer the round is void, and the state stays"
        if in_rings
        else f"the others go on without who does not answer; a round counts with at least {_sites(least)}; with fewer "
        "it is void, the state stays, and it is held again",
        unprotected=f"single updates, from the other nodes{_codec_hides_nothing(recipe)}; {remedy}; "
        f"{_remembers(recipe)}",
    )


def _league(terms: Terms) -> int:
    """The sites that a dishonest server needs to open another's update, in the cohort that suits it best."""
    needed = []
    for cohort in range(terms.minimum_sites, MOST_NEIGHBOURS + 2):  # in a larger one that many share masks, too
        with suppress(ProtocolError):  # no run with so many sites
            needed.append(terms.league_of(cohort))
    return min(needed)


def _is_refused(terms: Terms) -> str:
    """What becomes of a threshold that keeps less than `minimum_sites` promises."""
    if _league(terms) >= terms.minimum_sites - 1:
        return ""
    return (
        f"; a site that demands minimum_sites {terms.minimum_sites} for itself refuses cohorts of such a size (leave "
        "privacy.secure_aggregation.threshold out, or raise it)"
    )


def _account(sees: str, server: str, site: str, drop_outs: str, unprotected: str) -> dict[str, str]:
    return {
        "who sees what": sees,
        "a dishonest server": server,
        "a dishonest site": site,
        "drop-outs": drop_outs,
        "not protected": unprotected,
    }


def _update(recipe: Recipe) -> str:
    return "change of the state" if recipe.privacy.codec_part.sends_change else "trained state"


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count} sites"


def _push(recipe: Recipe) -> str:
    """The harm to the state of all by a site that writes at will."""
    if recipe.privacy.ring_bits is None:
        return "send any values for its own, and so make the mean what it likes"
    clip = "the clip" if recipe.privacy.clip is None else f"the clip, {recipe.privacy.clip:g},"
    return f"push each value of the state by up to {clip} in a round, or make it void"


def _mean_seen(recipe: Recipe, otherwise: str = "the mean") -> str:
    return "the mean of each group" if recipe.tries_groups else otherwise


def _figures_seen(recipe: Recipe) -> str:
    if not _tells(recipe):
        return " and weights"
    if not recipe.tries_groups:
        return ", weights and training losses"
    return ", weights and losses, also of each group's mean on held-out records"


def _gated(recipe: Recipe) -> str:
    """What becomes of a round in which a site did its worst."""
    if not recipe.tries_groups:
        return ""
    tolerance = recipe.aggregation.settings(GROUP_GATE).tolerance
    return (
        f"; but its group is left out of a round in which the group's mean makes the held-out loss worse than the "
        f"middle group's by more than {tolerance:g}"
    )


def _is_believed(recipe: Recipe, least: int) -> str:
    """A gossip node's power where a state that it alone holds is taken. Of a sum of three, two others hold it."""
    if recipe.privacy.ring_bits is not None and least >= 3:
        return ""
    return "; or say that it is ahead, and put a state of its own making in the place of theirs"


def _signs(recipe: Recipe) -> str:
    if recipe.topology.local_steps != 1 or recipe.training.optim != "adamw_torch":
        return ""
    return (
        "the sign of each site's changes, which can be told in the sum of a few sites: AdamW's first step changes "
        "every value by the learning rate (topology.local_steps 1; take more); "
    )


def _tells(recipe: Recipe) -> bool:
    """Whether sites tell their losses."""
    terms = recipe.privacy.differential_privacy
    return terms is None or terms.tell_losses


def _and_losses(recipe: Recipe) -> str:
    return ", losses" if _tells(recipe) else ""


def _text(recipe: Recipe) -> str:
    private = recipe.privacy.hides_units
    return "what ε leaves of the training text" if private else "training text"


def _and_judge(recipe: Recipe) -> str:
    return ", and have each site's held-out loss of one of them in a run" if _tells(recipe) else ""


def _and_final_loss(recipe: Recipe) -> str:
    return ", and its final loss on held-out records" if _tells(recipe) else ""


def _codec_hides_nothing(recipe: Recipe) -> str:
    codec = recipe.privacy.codec
    return "" if codec == "fp32" else f" (codec {codec} makes them smaller and hides nothing)"
