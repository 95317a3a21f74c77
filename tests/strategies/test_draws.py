"""The pseudo-random numbers against AES itself, and the keys that tell purposes apart."""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from strategies.draws import draws, key_of, rounding_key


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**40), st.integers(0, 40))
def test_draws_are_the_blocks_that_aes_makes_of_place_and_number(key: bytes, place: int, count: int) -> None:
    """Block by block (ECB), where the code under test has a stream (CTR)."""
    aes = Cipher(algorithms.AES128(key), modes.ECB()).encryptor()
    blocks = [aes.update(place.to_bytes(8, "big") + number.to_bytes(8, "big")) for number in range(1 + count // 8)]
    expected = [int.from_bytes(block[at : at + 2], "little") for block in blocks for at in range(0, 16, 2)]
    assert draws(key, place, count).tolist() == expected[:count]


def test_draws_are_uniform() -> None:
    counts = np.bincount(draws(key_of("test", 1), 0, 1 << 18) >> 8, minlength=256)
    chi_square = float(((counts - 1024.0) ** 2 / 1024).sum())
    assert 175 < chi_square < 350  # 255 degrees of freedom: within 4.3 standard deviations


def test_each_site_round_and_seed_has_a_key_of_its_own() -> None:
    keys = {rounding_key(seed, site, number) for seed in (0, 1) for site in ("a", "a1") for number in (1, 11)}
    assert len(keys) == 8
    assert key_of("selection", 0, 1) != key_of("rounding", 0, 1)
