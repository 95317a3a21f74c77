"""Secure groups of real processes over mutual TLS: the sum of a server, and survivors of a kill in the middle."""

import json
import os
import signal
import time

import pytest
import yaml

from client.enrolment import rounding_secret
from p2p.commits import CommitStore
from tests.p2p.linear_node import site_named
from tests.p2p.linear_site import recipe_of, ring_average

pytestmark = pytest.mark.slow
PRIVACY = {"secure_aggregation": True, "clip": 16.0}
MASKED = ("--privacy", json.dumps(PRIVACY), "--learning-rate", 1.0)


def contributors(federation, name):
    """Whose updates went into each round's mean, as a node has written down; none of a void one."""
    kinds = ("epoch", "epoch_void")
    return {e["round"]: e["contributors"] for kind in kinds for e in federation.events(name, kind)}


def expected(federation, name, rounds, width=6):
    """The state by a server's arithmetic on these members' updates; void rounds come on top of the run's."""
    sites = {one: site_named(one, width) for one in federation.names}
    recipe = recipe_of(rounds, privacy=PRIVACY, learning_rate=1.0)
    members = contributors(federation, name)
    secrets = {one: rounding_secret(federation.folder / one) for one in federation.names}
    numbers = range(1, max(members) + 1)
    assert sum(bool(members[number]) for number in numbers) == rounds
    return ring_average(sites, len(numbers), recipe, [members[number] for number in numbers], secrets)


def test_three_processes_average_securely_and_get_a_servers_bits(federation):
    """With chunks of more than one gRPC message."""
    for name in federation.names:
        federation.start(name, "--rounds", 2, "--width", 2_000_000, *MASKED)
    federation.finish(seconds=120)
    assert contributors(federation, "alpha") == {number: ["alpha", "beta", "gamma"] for number in (1, 2)}
    assert federation.digests() == {expected(federation, "alpha", 2, width=2_000_000).digest}
    assert all(event["masked"] for event in federation.events("beta", "group_sum"))
    assert [event for name in federation.names for event in federation.events(name, "refused")] == []
    assert federation.run_folder("alpha").summary()["bytes_up"] <= 2 * 2 * (2 / 3) * 2.05 * 2_000_000


@pytest.mark.parametrize("federation", [("alpha", "beta", "gamma", "delta")], indirect=True)
def test_a_member_that_hangs_in_an_attempt_leaves_the_others_with_one_state(federation):
    options = ("--rounds", 3, "--seconds", 0.5, "--linger", 2, "--width", 1_000_000, *MASKED)
    for name in federation.names:
        federation.start(name, *options)
    federation.wait_for("delta", "group_formed", 2)
    federation.processes["delta"].send_signal(signal.SIGSTOP)
    survivors = ("alpha", "beta", "gamma")
    federation.finish(*survivors, seconds=120)
    assert len({federation.run_folder(name).summary()["state_digest"] for name in survivors}) == 1
    members = contributors(federation, "alpha")
    assert members[max(members)] == list(survivors)


@pytest.mark.parametrize("federation", [("alpha", "beta", "gamma", "delta")], indirect=True)
def test_a_killed_member_takes_part_again_after_a_restart(federation):
    options = ("--rounds", 14, "--seconds", 0.7, "--linger", 60, *MASKED)
    for name in federation.names:
        federation.start(name, *options)
    federation.wait_for("gamma", "group_formed", 2)
    federation.processes["gamma"].kill()
    federation.processes["gamma"].wait()
    deadline = time.monotonic() + 60
    while ["alpha", "beta", "delta"] not in contributors(federation, "alpha").values():
        assert time.monotonic() < deadline, "the others do not go on without gamma"
        time.sleep(0.05)
    federation.start("gamma", *options)
    federation.finish(seconds=120)
    assert len(federation.digests() - {None}) == 1
    members = contributors(federation, "alpha")
    last = max(members)  # 14, and one more for each void round
    assert members[last] == ["alpha", "beta", "delta", "gamma"]
    whole = CommitStore(federation.run_folder("alpha").checkpoints).load_last(site_named("alpha").manifest)
    assert whole.state.digest == expected(federation, "alpha", 14).digest
    opened = json.loads((federation.run_folder("gamma").checkpoints / "opened.json").read_text())
    assert (opened["epoch"], opened["members"]) == (last, ["alpha", "beta", "delta", "gamma"])


def test_a_node_whose_own_minimum_is_higher_does_not_start(federation):
    path = federation.folder / "alpha" / "site.yaml"
    site = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**site, "secure_aggregation": {"minimum_sites": 5}}))
    assert federation.start("alpha", *MASKED).wait(30) == 2
    assert "minimum_sites 3: this site takes part from 5 up" in federation.log("alpha")
    path.write_text(yaml.safe_dump({**site, "secure_aggregation": {"required": True}}))
    assert federation.start("alpha").wait(30) == 2
    assert "secure_aggregation.required" in federation.log("alpha")
    assert os.listdir(federation.folder / "alpha").count("runs") == 0
