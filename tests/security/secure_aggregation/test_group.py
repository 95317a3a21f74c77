"""One attempt of a group, as state machines that a test lets talk: exact sums, or an end that names a member."""

import hashlib
import random
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from security.secure_aggregation.group import MOST_PROPOSAL_BYTES, Group, GroupAttempt, GroupFault, Phase, RingForm

NAMES = tuple(f"site{number}" for number in range(16))
DTYPES = {16: np.uint16, 24: np.uint32, 32: np.uint32}


def form_of(bits, length):
    """The ring of so many bits, written by hand: little endian, 24 bits as three bytes."""

    def pack(vector):
        plain = np.ascontiguousarray(vector).astype(vector.dtype.newbyteorder("<")).view(np.uint8)
        return (plain if bits != 24 else plain.reshape(-1, 4)[:, :3]).tobytes()

    def unpack(data):
        if bits != 24:
            return np.frombuffer(data, DTYPES[bits])
        return np.array([int.from_bytes(data[at : at + 3], "little") for at in range(0, len(data), 3)], np.uint32)

    return RingForm(length, bits // 8, pack, unpack)


def members_of(count, length=29, bits=16, masked=True, attempt=1, random_of=lambda name: {}):
    names = NAMES[:count]
    form = form_of(bits, length)
    group = Group("run", 1, attempt, names)
    return {name: GroupAttempt(name, group, b"alike", form, masked=masked, **random_of(name)) for name in names}


def vectors_of(count, length=29, bits=16, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 2**bits, length).astype(DTYPES[bits]) for name in NAMES[:count]}


def messages_of(members):
    """What each member sends to each in its phase."""
    return {(one, other): members[one].message_to(other) for one, other in permutations(members, 2)}


def step(members, vectors, change=lambda phase, messages: messages):
    """One phase at all members; returns what was sent in it."""
    phase = next(iter(members.values())).phase
    messages = change(phase, messages_of(members))
    for (one, other), message in messages.items():
        members[other].take(one, phase, message)
    for name, member in members.items():
        if phase is Phase.KEYS:
            member.scatter(vectors[name].copy())
        else:
            member.advance()
    return messages


def carry_out(members, vectors, change=lambda phase, messages: messages):
    while any(member.phase is not None for member in members.values()):
        step(members, vectors, change)
    return members


def sum_of(vectors, bits=16):
    return sum(vector.astype(np.uint64) for vector in vectors.values()) % 2**bits


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
def test_all_members_get_the_exact_sum(count, bits, masked):
    members, vectors = members_of(count, 37, bits, masked), vectors_of(count, 37, bits)
    for member in carry_out(members, vectors).values():
        assert np.array_equal(member.total, sum_of(vectors, bits))


def test_a_vector_shorter_than_the_group_is_summed_all_the_same():
    vectors = vectors_of(8, 3)
    assert np.array_equal(carry_out(members_of(8, 3), vectors)["site7"].total, sum_of(vectors))


def test_each_member_sends_two_parts_in_three_of_a_vector_and_little_else():
    count, length = 3, 300_000
    members, vectors = members_of(count, length), vectors_of(count, length)
    sent = 0
    while members["site0"].phase is not None:
        sent += sum(len(message) for (one, _), message in step(members, vectors).items() if one == "site0")
    assert sent <= 2 * (count - 1) / count * 2.01 * length


def scattered(attempt, values, length=40_000):
    """What site1 gets of site0's vector."""
    members = members_of(3, length, attempt=attempt)
    vectors = {name: np.full(length, value, np.uint16) for name, value in zip(NAMES, values, strict=False)}
    step(members, vectors)
    return np.frombuffer(members["site0"].message_to("site1")[4 * 32 :], np.uint16)


def test_what_a_member_gets_of_another_before_the_sum_is_uniform_whatever_the_vector_is():
    for value in (0, 12345):
        counts = np.bincount(scattered(1, [value] * 3) >> 8, minlength=256)
        expected = counts.sum() / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 255 + 6 * np.sqrt(2 * 255)


def test_even_after_opening_a_chunk_stays_hidden_behind_the_pair_mask_of_the_third():
    members = members_of(3, 40_000)
    vectors = {name: np.zeros(40_000, np.uint16) for name in NAMES[:3]}
    step(members, vectors)
    chunk = np.frombuffer(members["site0"].message_to("site1")[4 * 32 :], np.uint16).copy()
    step(members, vectors)
    step(members, vectors)
    seed = members["site0"].message_to("site1")
    from security.secure_aggregation.masks import add_masks

    add_masks(chunk, (), [seed], start=40_000 // 3)
    counts = np.bincount(chunk >> 8, minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 255 + 6 * np.sqrt(2 * 255)


def test_the_next_attempt_has_other_keys_and_other_masks():
    one, other = scattered(1, [7] * 3), scattered(2, [7] * 3)
    assert (one == other).mean() < 0.01


def test_with_the_same_randomness_another_attempt_still_has_other_masks():
    """Keys are bound to run, round, attempt and members: even a broken generator repeats no mask between pairs."""

    def chunk(attempt):
        broken = {name: {"random": lambda count, name=name: name.encode()[-1:] * count} for name in NAMES[:3]}
        members = members_of(3, 3000, attempt=attempt, random_of=broken.get)
        step(members, {name: np.zeros(3000, np.uint16) for name in NAMES[:3]})
        return np.frombuffer(members["site0"].message_to("site1")[4 * 32 :], np.uint16)

    assert (chunk(1) == chunk(2)).mean() < 0.01


def proof_between_two(group, proposal=b"alike"):
    """What site0 proves to site1 that it holds its key by, where the randomness of all is fixed."""
    members = {}
    for place, name in enumerate(group.members):
        shown = b"alike" if place < 2 else proposal
        draw = (place + 1).to_bytes(1)
        members[name] = GroupAttempt(
            name, group, shown, form_of(16, 9), masked=True, random=lambda count, draw=draw: draw * count
        )
    step(members, {name: np.zeros(9, np.uint16) for name in members})
    return members["site0"].message_to("site1")[3 * 32 : 4 * 32]


def test_the_keys_of_a_pair_are_of_one_attempt_among_members_who_were_shown_the_same():
    """Even where every key comes again."""
    groups = [
        Group("run", 1, 1, NAMES[:3]),
        Group("another", 1, 1, NAMES[:3]),
        Group("run", 2, 1, NAMES[:3]),
        Group("run", 1, 2, NAMES[:3]),
        Group("run", 1, 1, ("site0", "site1", "site9")),
    ]
    proofs = {proof_between_two(group) for group in groups} | {proof_between_two(groups[0], b"another")}
    assert len(proofs) == 6
    assert proof_between_two(groups[0]) in proofs


def test_what_the_others_see_of_one_with_another_input_differs_only_in_its_sum():
    """site2's whole view, with the randomness of the others fixed: two inputs with one sum look alike but for noise
    that nobody can tell, and the sums are equal."""
    totals = []
    for shift in (0, 1000):
        vectors = vectors_of(3)
        vectors["site0"] = vectors["site0"] + np.uint16(shift)
        vectors["site1"] = vectors["site1"] - np.uint16(shift)
        totals.append(carry_out(members_of(3), vectors)["site2"].total)
    assert np.array_equal(*totals)


def test_no_seed_is_told_before_all_are_ready():
    members, vectors = members_of(3), vectors_of(3)
    step(members, vectors)
    step(members, vectors)
    assert members["site0"].phase is Phase.READY
    members["site0"].take("site1", Phase.READY, b"")
    assert members["site0"].missing == ["site2"]
    assert members["site0"].message_to("site1") == b""


def only(one, other, false, phase_of):
    """A change of one message: what `one` sends to `other` (None: to all) in a phase."""

    def change(phase, messages):
        if phase is not phase_of:
            return messages
        return {
            pair: false(message) if pair[0] == one and other in (None, pair[1]) else message
            for pair, message in messages.items()
        }

    return change


def flip(message):
    return bytes([message[0] ^ 1]) + message[1:]


FAULTS = {
    "another key to one member": only("site1", "site0", lambda m: bytes(31) + b"\x09" + m[32:], Phase.KEYS),
    "a key that it does not hold, to all": only("site1", None, lambda m: bytes(31) + b"\x09" + m[32:], Phase.KEYS),
    "a key of small order": only("site1", None, lambda m: bytes(32) + m[32:], Phase.KEYS),
    "keys that are cut off": only("site1", None, lambda m: m[:40], Phase.KEYS),
    "another commitment to one member": only("site1", "site0", lambda m: m[:32] + flip(m[32:]), Phase.KEYS),
    "a false proof": only("site1", "site2", lambda m: m[:128] + flip(m[128:]), Phase.SCATTER),
    "half a chunk": only("site1", "site2", lambda m: m[:-1], Phase.SCATTER),
    "something in `ready`": only("site1", "site2", lambda m: b"x", Phase.READY),
    "another seed to one member": only("site1", "site2", flip, Phase.OPEN),
    "another seed to all": only("site1", None, flip, Phase.OPEN),
    "another sum to one member": only("site1", "site2", flip, Phase.GATHER),
    "a sum that is too long": only("site1", "site2", lambda m: m + b"xy", Phase.GATHER),
    "another confirmation": only("site1", "site2", flip, Phase.CONFIRM),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_member_that_lies_ends_the_attempt_by_its_name(fault):
    members, vectors, verdicts = members_of(4), vectors_of(4), set()
    while not verdicts:
        phase = members["site0"].phase
        assert phase is not None, "nobody noticed"
        for (one, other), message in FAULTS[fault](phase, messages_of(members)).items():
            try:
                members[other].take(one, phase, message)
            except GroupFault as caught:
                verdicts |= {caught.member} if other != "site1" else set()
        for name, member in members.items():
            try:
                if verdicts:
                    break
                if phase is Phase.KEYS:
                    member.scatter(vectors[name].copy())
                else:
                    member.advance()
            except GroupFault as caught:
                verdicts |= {caught.member} if name != "site1" else set()
    # Of two who say different things about a third, the third is taken to have shown them.
    assert verdicts == {"site0" if fault == "another confirmation" else "site1"}


def test_who_sends_back_the_proof_that_it_was_shown_proves_nothing():
    """It shows all members a key that it does not hold, so it can make no proof of its own."""
    members, vectors = members_of(3), vectors_of(3)
    liar = members["site1"]
    liar._own_keys = bytes(31) + b"\x09" + liar._own_keys[32:]
    liar._digests[Phase.KEYS, "site1"] = hashlib.sha256(liar._own_keys).digest()
    step(members, vectors)
    views = 3 * 32
    own, shown = liar.message_to("site0"), members["site0"].message_to("site1")
    returned = own[:views] + shown[views : views + 32] + own[views + 32 :]
    with pytest.raises(GroupFault, match="does not hold the key") as caught:
        members["site0"].take("site1", Phase.SCATTER, returned)
    assert caught.value.member == "site1"


def test_keys_that_are_too_long_end_the_attempt():
    longest = 2 * 32 + MOST_PROPOSAL_BYTES
    members_of(3)["site0"].take("site1", Phase.KEYS, bytes(longest))
    with pytest.raises(GroupFault, match=f"{longest + 1} bytes in phase 'keys' where {longest} are right"):
        members_of(3)["site0"].take("site1", Phase.KEYS, bytes(longest + 1))


def test_two_different_messages_of_one_phase_end_the_attempt_and_the_same_twice_does_not():
    members, vectors = members_of(3), vectors_of(3)
    step(members, vectors)
    message = members["site1"].message_to("site0")
    members["site0"].take("site1", Phase.SCATTER, message)
    members["site0"].take("site1", Phase.SCATTER, message)
    with pytest.raises(GroupFault, match="two different") as caught:
        members["site0"].take("site1", Phase.SCATTER, flip(message))
    assert caught.value.member == "site1"


@pytest.mark.parametrize("phase", [Phase.READY, Phase.CONFIRM])
def test_a_message_that_is_two_phases_ahead_or_from_a_stranger_is_refused(phase):
    with pytest.raises(GroupFault, match=f"phase '{phase}' in phase 'keys'"):
        members_of(3)["site0"].take("site1", phase, b"")
    with pytest.raises(GroupFault):
        members_of(3)["site0"].take("site9", Phase.KEYS, bytes(64))


def test_a_member_ahead_is_heard_and_no_memory_is_taken_beyond_its_next_message():
    members = members_of(3)
    attempt = members["site0"]
    assert attempt.most_bytes(Phase.SCATTER, "site1") == 3 * 32 + 32 + 2 * 9
    assert attempt.most_bytes(Phase.GATHER, "site2") == 2 * 10
    assert attempt.most_bytes(Phase.READY, "site1") == 0


def test_the_sum_stands_without_the_word_of_one_who_left_when_more_than_half_have_confirmed_it():
    members, vectors = members_of(3), vectors_of(3)
    while members["site0"].phase is not Phase.CONFIRM:
        step(members, vectors)
    attempt = members["site0"]
    with pytest.raises(GroupFault, match="down"):
        attempt.do_without("site2", "down")
    attempt.take("site1", Phase.CONFIRM, members["site1"].message_to("site0"))
    attempt.do_without("site2", "down")
    attempt.take("site2", Phase.CONFIRM, members["site2"].message_to("site0"))
    attempt.advance()
    assert np.array_equal(attempt.total, sum_of(vectors))


def test_half_of_the_members_are_not_enough_to_take_a_sum_for_whole():
    members, vectors = members_of(4), vectors_of(4)
    while members["site0"].phase is not Phase.CONFIRM:
        step(members, vectors)
    attempt = members["site0"]
    attempt.take("site1", Phase.CONFIRM, members["site1"].message_to("site0"))
    with pytest.raises(GroupFault, match="down"):
        attempt.do_without("site2", "down")
    attempt.take("site3", Phase.CONFIRM, members["site3"].message_to("site0"))
    attempt.do_without("site2", "down")
    assert attempt.missing == []


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.CONFIRM])
def test_before_the_last_phase_nobody_can_be_done_without(phase):
    members, vectors = members_of(3), vectors_of(3)
    while members["site0"].phase is not phase:
        step(members, vectors)
    with pytest.raises(GroupFault, match="down"):
        members["site0"].do_without("site2", "down")


class Members:
    """Members that advance as soon as they can, while messages come in any order, doubled or damaged."""

    def __init__(self, count, masked):
        self.members = members_of(count, masked=masked)
        self.vectors = vectors_of(count)
        self.ended = {}
        self.mail = []
        for name in self.members:
            self.post(name)

    def post(self, name):
        member = self.members[name]
        others = [other for other in self.members if other != name]
        self.mail += [(name, other, member.phase, member.message_to(other)) for other in others]

    def deliver(self, sender, receiver, phase, message):
        member = self.members[receiver]
        if receiver in self.ended or member.phase is None:
            return
        try:
            member.take(sender, phase, message)
            while member.phase is not None and not member.missing:
                if member.phase is Phase.KEYS:
                    member.scatter(self.vectors[receiver].copy())
                else:
                    member.advance()
                if member.phase is not None:
                    self.post(receiver)
        except GroupFault as fault:
            self.ended[receiver] = fault.member


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(2, 5),
    masked=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    doubled=st.floats(0, 0.5),
    damaged=st.one_of(st.none(), st.integers(0, 60)),
)
def test_any_order_doubling_and_one_damaged_message_give_the_exact_sum_or_an_end(count, masked, seed, doubled, damaged):
    chance, world, delivered = random.Random(seed), Members(count, masked), 0
    while world.mail:
        sender, receiver, phase, message = world.mail.pop(chance.randrange(len(world.mail)))
        if delivered == damaged:
            # The values of a chunk are the sender's own affair; on the wire they are under TLS and a digest.
            head = len(message) + 1 if phase is not Phase.SCATTER else 32 * (count + masked)
            position = chance.randrange(head)
            message = message[:position] + bytes([chance.randrange(256)]) + message[position + 1 :]
        delivered += 1
        world.deliver(sender, receiver, phase, message)
        if chance.random() < doubled:
            world.deliver(sender, receiver, phase, message)
    exact = sum_of(world.vectors)
    for name, member in world.members.items():
        if member.phase is None and name not in world.ended:
            assert np.array_equal(member.total, exact)
    if damaged is None:
        assert all(member.phase is None for member in world.members.values())
        assert not world.ended


def test_one_member_alone_is_the_sum_of_itself():
    attempt = members_of(1)["site0"]
    vector = vectors_of(1)["site0"]
    attempt.scatter(vector.copy())
    while attempt.phase is not None:
        attempt.advance()
    assert hashlib.sha256(attempt.total).digest() == hashlib.sha256(vector).digest()
