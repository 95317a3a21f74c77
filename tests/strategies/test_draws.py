"""The shared pseudo-random numbers against their published algorithm, and the keys that tell purposes apart."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from strategies.draws import draws, key_of, rounding_key

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
BUMPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
WORD = 2**64


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as in the paper (Salmon et al. 2011, section 4.3)."""
    for _ in range(10):
        first, second = MULTIPLIERS[0] * counter[0], MULTIPLIERS[1] * counter[2]
        mixed = (second // WORD ^ counter[1] ^ key[0], first // WORD ^ counter[3] ^ key[1])
        counter = [mixed[0], second % WORD, mixed[1], first % WORD]
        key = [(word + bump) % WORD for word, bump in zip(key, BUMPS, strict=True)]
    return counter


def test_the_reference_gives_the_published_answer() -> None:
    """The first line of Random123's kat_vectors for philox4x64."""
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox([0, 0, 0, 0], [0, 0]) == expected


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**40), st.integers(0, 40))
def test_draws_are_philox_numbers_cut_in_four(key: bytes, place: int, count: int) -> None:
    words = [int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")]
    blocks = [philox([block, place, 0, 0], words) for block in range(1, 2 + count // 16)]
    expected = [word >> shift & 0xFFFF for block in blocks for word in block for shift in (0, 16, 32, 48)]
    assert draws(key, place, count).tolist() == expected[:count]


def test_draws_are_uniform() -> None:
    counts = np.bincount(draws(key_of("test", 1), 0, 1 << 18) >> 8, minlength=256)
    chi_square = float(((counts - 1024.0) ** 2 / 1024).sum())
    assert 175 < chi_square < 350  # 255 degrees of freedom: within 4.3 standard deviations


def test_each_site_round_and_seed_has_a_key_of_its_own() -> None:
    keys = {rounding_key(seed, site, number) for seed in (0, 1) for site in ("a", "a1") for number in (1, 11)}
    assert len(keys) == 8
    assert key_of("selection", 0, 1) != key_of("rounding", 0, 1)
