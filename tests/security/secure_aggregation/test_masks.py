"""Masks against the published vectors of their parts, and against a reference that shares no code with them."""

import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation import masks
from security.secure_aggregation.masks import add_masks, cut, derive_key, pair_key, zeros

KEY = bytes(range(32))
BASE_POINT = (9).to_bytes(32, "little")


def x25519(scalar: bytes, point: bytes) -> bytes:
    """The ladder of RFC 7748, section 5."""
    p, a24 = 2**255 - 19, 121665
    k = int.from_bytes(scalar, "little") & ~7 & (2**255 - 1) | 2**254
    x1 = int.from_bytes(point, "little") & (2**255 - 1)
    x2, z2, x3, z3 = 1, 0, x1, 1
    for bit in reversed(range(255)):
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        x3, z3 = pow(d * a + c * b, 2, p), x1 * pow(d * a - c * b, 2, p) % p
        e = a * a - b * b
        x2, z2 = a * a * b * b % p, e * (a * a + a24 * e) % p
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, -1, p) % p).to_bytes(32, "little")


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """RFC 5869."""
    extracted = hmac.digest(salt, secret, "sha256")
    output, block = b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([number]), "sha256")
        output += block
    return output[:length]


def stream(key: bytes, length: int) -> bytes:
    """AES of the numbers 0, 1, 2, …"""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return b"".join(block.update(number.to_bytes(16, "big")) for number in range(-(-length // 16)))[:length]


def test_the_reference_gives_the_published_vectors():
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    shared = bytes.fromhex("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552")
    assert x25519(scalar, point) == shared  # RFC 7748, 5.2
    okm = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42).hex() == okm  # RFC 5869, A.1
    aes = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    plain = bytes.fromhex("00112233445566778899aabbccddeeff")
    assert aes.update(plain).hex() == "8ea2b7ca516745bfeafc49904b496089"  # FIPS 197, C.3


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.binary(), st.binary())
def test_pair_keys_are_those_of_the_reference_on_both_sides(one, other, salt, info):
    first, second = X25519PrivateKey.from_private_bytes(one), X25519PrivateKey.from_private_bytes(other)
    wanted = hkdf(x25519(one, x25519(other, BASE_POINT)), salt, info)
    assert pair_key(first, x25519(other, BASE_POINT), salt, info) == wanted
    assert pair_key(second, x25519(one, BASE_POINT), salt, info) == wanted


def test_derived_keys_are_those_of_the_reference():
    for length in (1, 32, 33, 6400):
        assert derive_key(b"secret", b"salt", b"info", length) == hkdf(b"secret", b"salt", b"info", length)


@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little"), b"\x01" * 31, b""])
def test_a_public_key_that_gives_everybody_the_same_secret_is_refused(point):
    with pytest.raises(ProtocolError, match="X25519 public key"):
        pair_key(X25519PrivateKey.from_private_bytes(KEY), point, b"", b"")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("length", [1, 7, 1000, 300_001])
def test_a_mask_is_the_reference_stream_added_modulo_the_ring(dtype, length):
    vector = np.random.default_rng(length).integers(0, 1 << 16, length).astype(dtype)
    masked = vector.copy()
    add_masks(masked, [KEY])
    size = np.dtype(dtype).itemsize
    values = np.frombuffer(stream(KEY, length * size), f"<u{size}").astype(np.uint64)
    np.testing.assert_array_equal(masked, (values + vector) % (1 << 8 * size))
    add_masks(masked, (), [KEY])
    np.testing.assert_array_equal(masked, vector)


@given(
    st.integers(0, 400), st.integers(0, 400), st.sampled_from([np.uint16, np.uint32]), st.sampled_from([32, 48, 4096])
)
def test_a_part_takes_the_stream_from_its_place_in_the_whole(start, length, dtype, chunk):
    whole = np.zeros(start + length, dtype)
    add_masks(whole, [KEY])
    part = np.zeros(length, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_CHUNK", chunk)
        add_masks(part, [KEY], start=start)
    np.testing.assert_array_equal(part, whole[start:])


def test_a_ring_of_24_bits_is_the_low_bits_of_one_of_32():
    assert zeros(3, 16).dtype == np.uint16
    total = zeros(3, 24)
    assert total.dtype == np.uint32
    total -= 1
    cut(total, 24)
    assert total.tolist() == [2**24 - 1] * 3
    full = np.full(3, 2**32 - 1, np.uint32)
    cut(full, 32)
    assert full.tolist() == [2**32 - 1] * 3
