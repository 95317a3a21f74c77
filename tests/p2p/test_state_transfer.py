"""Fetching a state from peers that fail under way, and what a node keeps on disk."""

import asyncio

import numpy as np
import pytest

from core_training.foundation.errors import ProtocolError, RunError
from core_training.foundation.state import Manifest, TrainableState
from core_training.runs.run_folder import RunFolder
from p2p.calls import PeerCalls
from p2p.commits import Commit, CommitStore
from p2p.plan import RunPlan
from p2p.progress import Progress
from p2p.site_orders import SiteOrders
from p2p.transport import CHUNK_BYTES, PeerUnreachable
from tests.p2p.linear_site import LinearSite, recipe_of

SITE = LinearSite(4, width=1_200_000)
STATE = TrainableState(SITE.manifest, np.random.default_rng(5).standard_normal(SITE.manifest.size).astype(np.float32))
BYTES = STATE.to_bytes()
ROSTER = ("alpha", "beta", "gamma", "delta")


class Donors:
    """A transport on which each donor holds some bytes, and breaks off after so many chunks."""

    def __init__(self, **donors):
        self.donors = donors
        self.offsets = {}

    async def fetch(self, peer, request):
        data, chunks = self.donors[peer]
        self.offsets[peer] = request.offset
        for start in range(request.offset, len(data), CHUNK_BYTES):
            if chunks == 0:
                raise PeerUnreachable("connection lost")
            chunks -= 1
            yield data[start : start + CHUNK_BYTES]


def fetch(tmp_path, donors):
    async def scenario():
        folder = RunFolder(tmp_path)
        plan = RunPlan("alpha", ROSTER, "run", recipe_of(), "secret")
        joined = await SiteOrders(plan, SITE.ask).join()
        progress = Progress(plan, joined, CommitStore(folder.checkpoints), folder.event, SITE.initial())
        offers = [
            progress.hello().model_copy(update={"sender": name, "committed": 3, "state_digest": STATE.digest})
            for name in donors.donors
        ]
        return await PeerCalls(donors, progress).fetch(offers)

    return asyncio.run(scenario())


def test_a_transfer_that_breaks_off_goes_on_where_it_stopped_with_the_next_donor(tmp_path):
    donors = Donors(beta=(BYTES, 2), gamma=(BYTES, 1), delta=(BYTES, 99))
    assert fetch(tmp_path, donors)[0].digest == STATE.digest
    assert donors.offsets == {"beta": 0, "gamma": 2 * CHUNK_BYTES, "delta": 3 * CHUNK_BYTES}


def test_a_donor_with_another_state_is_refused_by_name_and_the_next_one_asked_from_the_start(tmp_path):
    other = TrainableState(STATE.manifest, STATE.buffer + 1).to_bytes()
    donors = Donors(beta=(other, 99), gamma=(b"garbage", 99), delta=(BYTES, 99))
    assert fetch(tmp_path, donors)[0].digest == STATE.digest
    assert [event["peer"] for event in RunFolder(tmp_path).lines("refused")] == ["beta", "gamma"]
    assert donors.offsets["delta"] == 0


def test_a_donor_that_never_stops_sending_is_cut_off(tmp_path):
    donors = Donors(beta=(bytes(3 * len(BYTES)), 99))
    assert fetch(tmp_path, donors) is None
    assert "longer than" in next(RunFolder(tmp_path).lines("refused"))["reason"]


def test_without_an_intact_donor_there_is_no_state(tmp_path):
    assert fetch(tmp_path, Donors(beta=(BYTES, 1), gamma=(BYTES, 0))) is None


def small_state(value):
    manifest = Manifest.of({"weight": (4,)})
    return TrainableState(manifest, np.full(4, value, dtype=np.float32))


def test_the_last_two_commits_are_kept_and_the_newest_intact_one_is_loaded(tmp_path):
    store = CommitStore(tmp_path)
    for number in range(1, 5):
        store.write(Commit(number, small_state(number), contributors=("alpha",)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-000003", "epoch-000004"]
    manifest = small_state(0).manifest
    assert store.load_last(manifest).round == 4
    damaged = tmp_path / "epoch-000004" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    assert store.load_last(manifest).round == 3
    with pytest.raises(ProtocolError, match="round 1 is not kept"):
        list(store.read(1, 0))


def test_a_full_disk_during_a_commit_leaves_the_one_before(tmp_path, monkeypatch):
    store = CommitStore(tmp_path)
    store.write(Commit(1, small_state(1), contributors=("alpha",)))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TrainableState, "write", full)
    with pytest.raises(RunError, match="No space left"):
        store.write(Commit(2, small_state(2), contributors=("alpha",)))
    assert store.load_last(small_state(0).manifest).round == 1
