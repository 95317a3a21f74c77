"""Nodes as real processes over mutual TLS on loopback: they finish alike, whoever is killed, and whenever."""

import signal

import numpy as np
import pytest

from p2p.commits import CommitStore
from tests.p2p.linear_node import site_named
from tests.p2p.linear_site import federated_average

pytestmark = pytest.mark.slow


def test_three_nodes_finish_with_the_federated_average_and_one_digest(federation):
    for name in federation.names:
        federation.start(name, "--rounds", 4)
    federation.finish()
    assert len(federation.digests() - {None}) == 1
    sites = {name: site_named(name) for name in federation.names}
    store = CommitStore(federation.run_folder("alpha").checkpoints)
    state = store.load_last(sites["alpha"].manifest).state
    assert np.abs(state.buffer - federated_average(sites, 4).buffer).max() <= 1e-6
    assert federation.events("alpha", "refused") == []


def test_updates_larger_than_a_grpc_message_are_streamed(federation):
    for name in federation.names:
        federation.start(name, "--rounds", 2, "--width", 3_000_000)
    federation.finish(seconds=120)
    assert len(federation.digests() - {None}) == 1
    assert federation.run_folder("alpha").summary()["bytes_up"] > 2 * 2 * 12_000_000


def test_a_killed_node_stops_nobody_and_started_again_it_catches_up(federation):
    options = ("--rounds", 14, "--seconds", 0.7, "--linger", 60)
    for name in federation.names:
        federation.start(name, *options)
    federation.wait_for("gamma", "epoch", 2)
    federation.processes["gamma"].send_signal(signal.SIGKILL)
    federation.processes["gamma"].wait()
    before = len(federation.events("alpha", "epoch"))
    federation.wait_for("alpha", "peer_down")
    federation.wait_for("alpha", "epoch", before + 3)
    assert federation.events("alpha", "epoch")[-1]["contributors"] == ["alpha", "beta"]
    federation.start("gamma", *options)
    federation.finish()
    assert len(federation.digests() - {None}) == 1
    assert federation.events("gamma", "adopted")
    assert federation.events("gamma", "epoch")[-1]["contributors"] == ["alpha", "beta", "gamma"]


def test_the_others_finish_without_a_node_that_stays_away(federation):
    for name in federation.names:
        federation.start(name, "--rounds", 4, "--seconds", 0.5, "--linger", 2)
    federation.wait_for("beta", "epoch", 1)
    federation.processes["beta"].send_signal(signal.SIGKILL)
    federation.finish("alpha", "gamma")
    summaries = [federation.run_folder(name).summary()["state_digest"] for name in ("alpha", "gamma")]
    assert summaries[0] == summaries[1]


def test_a_node_that_nobody_joins_ends_with_the_names_and_without_a_result(federation):
    assert federation.start("alpha", "--rounds", 2, "--minimum", 2, "--deadline", 2).wait(60) == 1
    said = "error: 'alpha': 3 rounds in a row were void: it takes 2 nodes; missing: beta, gamma"
    assert said in federation.log("alpha")
    assert [event["contributors"] for event in federation.events("alpha", "epoch_void")] == [[]] * 3
    assert [event["reason"] for event in federation.events("alpha", "failed")]
    summary = federation.run_folder("alpha").summary()
    assert (summary["status"], summary["rounds_done"], summary["void_rounds"]) == ("failed", 0, 3)


@pytest.mark.parametrize("late", [(), ("--fetch-within", 30)], ids=["start", "fetch"])
def test_who_comes_when_all_is_over_gets_the_finished_state(federation, late):
    options = ("--rounds", 2, "--minimum", 2, "--deadline", 4, "--linger", 120)
    for name in ("alpha", "beta"):
        federation.start(name, *options)
    for name in ("alpha", "beta"):
        federation.wait_for(name, "run_completed")
    federation.start("gamma", *options, *late)
    federation.finish()  # long before the two have stayed as long as they may
    assert len(federation.digests() - {None}) == 1
    assert federation.events("gamma", "adopted")
    assert federation.events("gamma", "epoch") == federation.events("gamma", "trained") == []


def test_fetching_what_nobody_has_says_how_far_the_others_are(federation):
    federation.start("alpha", "--rounds", 2, "--minimum", 2, "--deadline", 60)
    assert federation.start("gamma", "--rounds", 2, "--minimum", 2, "--deadline", 60, "--fetch-within", 3).wait(60) == 1
    assert "no result was to be had within 3 s: alpha " in federation.log("gamma")
    assert "beta does not answer" in federation.log("gamma")


def test_a_node_that_was_stopped_goes_on_where_it_was(federation):
    for name in federation.names:
        federation.start(name, "--rounds", 6, "--seconds", 0.5, "--linger", 60)
    federation.wait_for("alpha", "epoch", 2)
    federation.processes["alpha"].send_signal(signal.SIGTERM)
    assert federation.processes["alpha"].wait(20) == 128 + signal.SIGTERM
    assert "the last round is committed" in federation.log("alpha")
    federation.start("alpha", "--rounds", 6, "--seconds", 0.5, "--linger", 60)
    federation.finish()
    assert len(federation.digests() - {None}) == 1


def test_a_node_with_another_recipe_is_refused_by_name_and_stops_itself(federation):
    federation.start("alpha", "--rounds", 3, "--seconds", 0.2, "--linger", 1)
    federation.start("beta", "--rounds", 3, "--seconds", 0.2, "--linger", 1)
    federation.start("gamma", "--rounds", 3, "--learning-rate", 0.5)
    assert federation.processes["gamma"].wait(60) == 2
    assert "another recipe" in federation.log("gamma")
    assert federation.wait_for("alpha", "peer_refused")[0]["peer"] == "gamma"
    federation.finish("alpha", "beta")


def test_a_port_in_use_is_named_and_nothing_is_started(federation):
    import socket

    port = int(federation.roster.member("alpha").address.rpartition(":")[2])
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert federation.start("alpha").wait(30) == 2
    assert f"127.0.0.1:{port}: the port is in use" in federation.log("alpha")
    assert federation.run_folder("alpha") is None
