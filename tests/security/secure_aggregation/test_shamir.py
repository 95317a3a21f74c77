"""Shamir against published vectors, and all possibilities counted: enough shares tell all, fewer say nothing."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from security.secure_aggregation.shamir import PRIME, evaluate, join


def is_prime(number: int) -> bool:
    """Miller and Rabin's test with the first forty primes as bases."""
    bases = [base for base in range(2, 174) if all(base % divisor for divisor in range(2, base))]
    if any(number % base == 0 for base in bases):
        return number in bases
    twos = (number - 1 & 1 - number).bit_length() - 1
    for base in bases:
        power = pow(base, number >> twos, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def little(text: str) -> int:
    return int.from_bytes(bytes.fromhex(text), "little")


def test_the_field_is_that_of_the_smallest_prime_above_two_to_the_256():
    assert [step for step in range(1, 298) if is_prime(2**256 + step)] == [297]
    assert PRIME == 2**256 + 297


def test_published_shares_of_rfc_9591_over_the_order_of_ed25519():
    # RFC 9591, appendix E.1: FROST(Ed25519, SHA-512), two of three.
    order = 2**252 + 27742317777372353535851937790883648493
    secret = little("7b1c33d3f5291d85de664833beb1ad469f7fb6025a0ec78b3a790c6e13a98304")
    coefficient = little("178199860edd8c62f5212ee91eff1295d0d670ab4ed4506866bae57e7030b204")
    shares = {
        1: little("929dcc590407aae7d388761cddb0c0db6f5627aea8e217f4a033f2ec83d93509"),
        2: little("a91e66e012e4364ac9aaa405fcafd370402d9859f7b6685c07eed76bf409e80d"),
        3: little("d3cb090a075eb154e82fdb4b3cb507f110040905468bb9c46da8bdea643a9a02"),
    }
    assert {x: evaluate([secret, coefficient], x, order) for x in shares} == shares
    for pair in itertools.combinations(shares, 2):
        assert join({x: shares[x] for x in pair}, order) == secret


def test_published_shares_of_rfc_9591_over_the_order_of_p256():
    # RFC 9591, appendix E.4: FROST(P-256, SHA-256), two of three.
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    shares = {
        1: 0x0C9C1A0FE806C184ADD50BBDCAC913DDA73E482DAF95DCB9F35DBB0D8A9F7731,
        2: 0x8D8E787BEF0FF6C2F494CA45F4DAD198C6BEE01212D6C84067159C52E1863AD5,
        3: 0x0E80D6E8F6192C003B5488CE1EEC8F5429587D48CF001541E713B2D53C09D928,
    }
    for pair in itertools.combinations(shares, 2):
        secret = join({x: shares[x] for x in pair}, order)
        assert secret == 0x8BA9BBA2E0FD8C4767154D35A0B7562244A4AAF6F36C8FB8735FA48B301BD8DE


@given(st.data(), st.integers(1, 20))
def test_any_threshold_of_the_shares_give_the_secret(data, threshold):
    polynomial = data.draw(st.lists(st.integers(0, PRIME - 1), min_size=threshold, max_size=threshold))
    holders = data.draw(st.lists(st.integers(1, 100), min_size=threshold, max_size=threshold, unique=True))
    assert join({holder: evaluate(polynomial, holder) for holder in holders}) == polynomial[0]


@pytest.mark.parametrize("threshold", [2, 3, 4])
def test_one_share_fewer_than_the_threshold_fits_every_secret_equally_often(threshold):
    prime = 7
    holders = range(1, threshold)
    views = {
        secret: Counter(
            tuple(evaluate([secret, *drawn], holder, prime) for holder in holders)
            for drawn in itertools.product(range(prime), repeat=threshold - 1)
        )
        for secret in range(prime)
    }
    assert len(views[0]) == prime ** (threshold - 1)
    assert all(views[secret] == views[0] for secret in views)
