"""The watch over a port: strangers are let go by age and number, who has proven itself stays."""

import resource
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import pytest

from security import connection_watch
from security.connection_watch import ConnectionLimits, ConnectionWatch, _unwanted


@contextmanager
def watched(limits, count):
    """A listener under watch, and both ends of so many connections to it, in the order in which they were made."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        watch = ConnectionWatch(listener.getsockname()[1], limits)
        watch.start()
        stack.callback(watch.stop)
        ends = []
        for _ in range(count):
            far = stack.enter_context(socket.create_connection(listener.getsockname()))
            near = stack.enter_context(listener.accept()[0])
            ends.append((far, near))
            if count <= 4:
                time.sleep(2 * connection_watch._LOOKS_EVERY)  # each is seen before the next one
        yield watch, ends


def ended(far):
    """Whether the watch has shut the connection down."""
    far.settimeout(0.01)
    try:
        return far.recv(1) == b""
    except TimeoutError:
        return False


def test_who_proves_nothing_in_time_is_let_go_and_who_does_stays():
    with watched(ConnectionLimits(proves_within=1.5), 2) as (watch, [(silent, _), (known, near)]):
        watch.prove(known.getsockname(), "beta")
        assert not ended(silent)
        time.sleep(2.0)
        assert ended(silent)
        assert not ended(known)
        near.sendall(b"x")
        assert known.recv(1) == b"x"
        assert watch.is_proven(known.getsockname())


def test_the_proof_of_a_connection_ends_with_it():
    with watched(ConnectionLimits(), 1) as (watch, [(known, near)]):
        watch.prove(known.getsockname(), "beta")
        address = known.getsockname()
        near.close()
        time.sleep(3 * connection_watch._LOOKS_EVERY)
        assert not watch.is_proven(address)


def test_of_too_many_the_oldest_are_let_go():
    with watched(ConnectionLimits(unproven_by_host=2), 4) as (_, ends):
        time.sleep(3 * connection_watch._LOOKS_EVERY)
        assert [ended(far) for far, _ in ends] == [True, True, False, False]


def test_a_burst_is_cut_down_to_the_limit_at_once():
    with watched(ConnectionLimits(unproven_by_host=5), 200) as (_, ends):
        time.sleep(3 * connection_watch._LOOKS_EVERY)
        assert sum(not ended(far) for far, _ in ends) == 5


def let_go(hosts, names, limits, now=0.0):
    since = {(host, number): number / 1000 for number, host in enumerate(hosts)}
    named = {address: names[address[0]] for address in since if address[0] in names}
    return set(_unwanted(since, named, limits, now))


@pytest.mark.parametrize(
    ("hosts", "names", "gone"),
    [
        (["10.0.0.1"] * 3 + ["10.0.0.2"] * 2, {}, 1),
        (["2001:db8::1", "2001:db8::2", "2001:db8::3"], {}, 1),  # one subscriber's network
        (["2001:db8:0:1::1", "2001:db8:0:2::1", "fe80::1%eth0"], {}, 0),
        ([f"10.0.0.{number}" for number in range(9)], {}, 3),  # more than 6 in all
        (["10.0.0.1"] * 9, {"10.0.0.1": "beta"}, 5),
        (["10.0.0.1"] * 9, {"10.0.0.1": None}, 0),  # of this machine's own programs
    ],
)
def test_strangers_are_counted_by_origin_and_in_all_and_members_by_name(hosts, names, gone):
    limits = ConnectionLimits(unproven_by_host=2, unproven=6, by_name=4)
    assert len(let_go(hosts, names, limits)) == gone


def test_what_one_origin_has_too_many_costs_no_other_its_place():
    limits = ConnectionLimits(unproven_by_host=2, unproven=6)
    gone = let_go(["10.0.0.1"] + ["10.0.0.2"] * 160, {}, limits)
    assert ("10.0.0.1", 0) not in gone
    assert len(gone) == 158


def test_a_proof_that_is_made_during_a_look_is_kept(monkeypatch):
    watch, newcomer, gone = ConnectionWatch(1), ("10.0.0.1", 7), ("10.0.0.2", 8)
    watch.prove(gone, "gamma")

    def connections(port):
        watch.prove(newcomer, "beta")  # it came after the list was made
        return []

    monkeypatch.setattr(connection_watch, "_connections", connections)
    watch._look(time.monotonic())
    assert watch.is_proven(newcomer)
    assert not watch.is_proven(gone)


def test_the_descriptor_limit_is_raised_to_what_the_system_allows():
    program = (
        "import resource; from security.connection_watch import raise_descriptor_limit\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))\n"
        "raise_descriptor_limit(); print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    soft, hard = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert soft == hard == str(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def test_a_process_without_a_descriptor_left_still_lets_strangers_go():
    program = """
import os, resource, socket, time
from security.connection_watch import ConnectionLimits, ConnectionWatch
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
listener = socket.create_server(("127.0.0.1", 0))
far = socket.create_connection(listener.getsockname())
near = listener.accept()[0]
while True:
    try:
        os.dup(0)
    except OSError:
        break
watch = ConnectionWatch(listener.getsockname()[1], ConnectionLimits(proves_within=0.5))
watch.start()
far.settimeout(5)
print(far.recv(1), flush=True)
os._exit(0)  # without a descriptor no thread ends in order
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "b''"
