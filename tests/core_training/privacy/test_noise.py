"""Random numbers of the operating system's: their distribution, and that no two streams are alike."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from core_training.privacy.noise import SecretRandom


def test_normal_numbers_are_normal_to_a_percent() -> None:
    values = SecretRandom(bytes(32)).normal(400_001)
    assert values.std() ** 2 == pytest.approx(1.0, rel=0.01)
    assert abs(values.mean()) < 0.01
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert np.isfinite(values).all()
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_the_stream_is_that_of_aes_in_counter_mode() -> None:
    stream = Cipher(algorithms.AES(bytes(range(32))), modes.CTR(bytes(16))).encryptor().update(bytes(80))
    words = np.frombuffer(stream, dtype="<u8")
    random = SecretRandom(bytes(range(32)))
    np.testing.assert_array_equal(random.uniform(4), ((words[:4] >> 11) + 1) * 2.0**-53)
    np.testing.assert_array_equal(random.uniform(6), ((words[4:] >> 11) + 1) * 2.0**-53)


def test_no_two_streams_are_alike_and_nobody_seeds_them() -> None:
    np.random.seed(0)
    first = SecretRandom().normal(5)
    np.random.seed(0)
    assert not np.intersect1d(first, SecretRandom().normal(5)).size
