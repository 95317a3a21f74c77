"""Early stopping and the best state in gossip: nodes that judge by their own records, and groups that judge alike."""

from types import SimpleNamespace

import pytest

from core_training.runs.run_folder import RunFolder
from p2p.catch_up import CatchUp
from p2p.judgement import Judgement
from p2p.plan import RunPlan
from simulations.gossip import simulate_gossip
from simulations.network import Partition, SimulatedNetwork
from tests.p2p.linear_site import LinearSite, recipe_of

NAMES = ("alpha", "beta", "gamma")
CODECS = {"group": {}, "in sums": {"codec": "ring32"}, "masked": {"secure_aggregation": {"ring_bits": 32}}}


class ScriptedSite(LinearSite):
    """Trains as a linear site; the held-out loss of the state after each round is what `losses` say, then the last.

    `states` are those that were evaluated, by round.
    """

    def __init__(self, seed, losses, **options):
        super().__init__(seed, **options)
        self.losses = losses
        self.states = {}
        self.kept = None

    def _report(self, state):
        number = next(number for number, digest in self.states.items() if digest == state.digest)
        loss = self.losses[min(number, len(self.losses) - 1)]
        return type(super()._report(state))(loss * self.tokens, self.tokens, self.tokens)

    def _train(self, order):
        self.states.setdefault(order.round - 1, self._incoming(order).digest)
        return super()._train(order)

    def _evaluate(self, order):
        state = self._incoming(order)
        if state.digest not in self.states.values():
            self.states[order.round] = state.digest
        if order.final:
            self.kept = state.digest
        return super()._evaluate(order)


def judged(recipe, patience=None, best=False):
    topology = recipe.topology.model_copy(update={"early_stopping_patience": patience})
    training = recipe.training.model_copy(update={"load_best_model_at_end": best})
    return recipe.model_copy(update={"topology": topology, "training": training})


def run(sites, recipe, folder, network=None):
    return simulate_gossip(recipe, {name: site.ask for name, site in sites.items()}, RunFolder(folder), network)


def lines(folder, name, kind):
    return list(RunFolder(folder / "sites" / name).lines(kind))


def sites_with(*losses):
    return {name: ScriptedSite(seed, own) for seed, (name, own) in enumerate(zip(NAMES, losses, strict=True))}


@pytest.mark.parametrize("mixing", ["group", "metropolis"])
def test_the_nodes_stop_after_the_round_in_which_all_of_its_mean_want_to(tmp_path, mixing):
    """Patience 2: alpha has lost it in round 4, beta in 5, gamma in 6."""
    sites = sites_with([3, 1, 2], [3, 2, 1, 2], [3, 3, 2, 1, 2])
    summary = run(sites, judged(recipe_of(rounds=12, mixing=mixing), patience=2), tmp_path)
    assert (summary.rounds, summary.status) == (6, "completed")
    for name in NAMES:
        assert [event["round"] for event in lines(tmp_path, name, "stopped_early")] == [6]
        assert [event["round"] for event in lines(tmp_path, name, "epoch")] == [1, 2, 3, 4, 5, 6]
    assert [row["round"] for row in RunFolder(tmp_path).curve()] == [0, 1, 2, 3, 4, 5, 6]


def test_each_node_keeps_the_state_that_is_best_on_its_own_records(tmp_path):
    sites = sites_with([3, 1, 2], [1, 2, 3, 2], [9, 8, 7, 6, 5, 4])
    summary = run(sites, judged(recipe_of(rounds=5), best=True), tmp_path)
    assert {name: site.states[best] for (name, site), best in zip(sites.items(), (1, 0, 5), strict=True)} == {
        name: site.kept for name, site in sites.items()
    }
    assert summary.state_digest is None, "they are different states"
    assert {name: site.eval_loss for name, site in summary.sites.items()} == {"alpha": 1, "beta": 1, "gamma": 4}
    assert [[e["round"] for e in lines(tmp_path, name, "best_chosen")] for name in NAMES] == [[1], [0], []]


@pytest.mark.parametrize("privacy", ["in sums", "masked"])
def test_a_group_judges_by_the_loss_in_its_sum_and_ends_with_one_state(tmp_path, privacy):
    """The group's loss falls until the state after round 2; alpha's own is another matter."""
    sites = sites_with([1, 2, 3], [9, 6, 1, 5, 6], [9, 6, 1, 5, 6])
    recipe = recipe_of(rounds=12, minimum_sites=3, privacy=CODECS[privacy])
    summary = run(sites, judged(recipe, patience=2, best=True), tmp_path)
    assert summary.rounds == 5
    best = {site.states[2] for site in sites.values()}
    assert {site.kept for site in sites.values()} == best == {summary.state_digest}
    assert all([event["round"] for event in lines(tmp_path, name, "stopped_early")] == [5] for name in NAMES)


def test_a_node_that_was_cut_off_when_the_others_agreed_takes_their_state_and_ends(tmp_path):
    """Without gamma, whose loss falls on and on, the others agree in round 4."""
    sites = sites_with([3, 1, 2], [3, 1, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1])
    network = SimulatedNetwork(seed=1, latency=0.1, partitions=[Partition(110.0, 140.0, frozenset({"gamma"}))])
    summary = run(sites, judged(recipe_of(rounds=40), patience=2), tmp_path, network)
    assert [event["round"] for event in lines(tmp_path, "alpha", "stopped_early")] == [4]
    assert not lines(tmp_path, "gamma", "stopped_early")
    assert [event["epoch"] for event in lines(tmp_path, "gamma", "epoch")] == [1, 2, 3, 4, 5]
    assert summary.state_digest == sites["gamma"].kept == sites["alpha"].kept is not None


@pytest.mark.parametrize("privacy", ["group", "in sums"])
def test_a_node_that_is_killed_goes_on_with_its_judgement(tmp_path, privacy):
    class PowerCut(Exception):
        pass

    losses = ([3, 1, 2], [3, 1, 2], [3, 1, 2])
    recipe = judged(recipe_of(rounds=9, minimum_sites=3, privacy=CODECS[privacy]), patience=2, best=True)
    whole = run(sites_with(*losses), recipe, tmp_path / "whole")
    sites = sites_with(*losses)

    async def dies(order, ask=sites["beta"].ask):
        if order.kind == "train" and order.fields["round"] == 3:
            raise PowerCut
        return await ask(order)

    asks = {name: site.ask for name, site in sites.items()}
    with pytest.RaisesGroup(PowerCut):
        simulate_gossip(recipe, {**asks, "beta": dies}, RunFolder(tmp_path / "cut"))
    resumed = simulate_gossip(recipe, asks, RunFolder(tmp_path / "cut"))
    assert (resumed.rounds, resumed.state_digest) == (whole.rounds, whole.state_digest) == (4, whole.state_digest)
    assert isinstance(whole.state_digest, str)


# One who lies about having stopped


def a_node(monkeypatch, claims, patience=3, last=(8, 3, "good"), **privacy):
    """A node's judgement and catching up among four, of whom the others claim (committed, digest, finished)."""
    names = ("alpha", "beta", "gamma", "delta")
    recipe = judged(recipe_of(rounds=9, minimum_sites=3, privacy=privacy or None), patience=patience)
    plan = RunPlan("alpha", names, "run", recipe, "secret")
    hellos = [
        SimpleNamespace(sender=name, committed=round_, finished=finished, offer=(round_, 3, digest))
        for name, (round_, digest, finished) in zip(names[1:], claims, strict=False)
    ]
    state = SimpleNamespace(round=last[0], offer=last, state=None if last[0] == 0 else object())
    ledger = SimpleNamespace(agreed_to_stop=False)
    members = SimpleNamespace(hellos=lambda: hellos, live=names[1:])
    progress = SimpleNamespace(plan=plan, last=state, members=members, ledger=ledger)
    catch_up = CatchUp(progress, None)
    monkeypatch.setattr(catch_up, "_hellos", lambda: hellos)
    return Judgement(progress, None), catch_up


@pytest.mark.parametrize("privacy", [{}, {"codec": "ring32"}])
def test_one_peer_that_says_it_has_stopped_is_not_believed_alone(monkeypatch, privacy):
    alone = [(7, "evil", True), (8, "good", False), (8, "good", False)]
    _, catch_up = a_node(monkeypatch, alone, **privacy)
    assert catch_up._wanted(at_the_end=True) is None
    judgement, _ = a_node(monkeypatch, [(7, "evil", True)], **privacy)
    assert not judgement.has_ended()


def test_peers_that_have_stopped_are_believed_together(monkeypatch):
    together = [(7, "agreed", True)] * 3
    judgement, catch_up = a_node(monkeypatch, together)
    assert judgement.has_ended()
    assert catch_up._wanted(at_the_end=True) == (7, 3, "agreed")
    _, without = a_node(monkeypatch, together, patience=None)
    assert without._wanted(at_the_end=True) is None
