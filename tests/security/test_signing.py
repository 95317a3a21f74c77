"""Signed documents: whoever changes a byte, or signs with another key, is found out."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.errors import InputError
from security.signing import (
    canonical_json,
    create_signing_key,
    load_signing_key,
    open_signed_document,
    public_key_text,
    sign_document,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values)
def test_canonical_form_survives_any_json_reader_and_key_order(value):
    again = json.loads(canonical_json(value))
    assert again == value
    assert canonical_json(again) == canonical_json(value)


def test_a_signed_document_opens_with_its_key_after_a_trip_through_a_file(tmp_path):
    key = create_signing_key(tmp_path / "founder.key")
    signed = sign_document({"b": 1, "a": "Zürich"}, load_signing_key(tmp_path / "founder.key"))
    carried = json.loads(json.dumps(signed, indent=2))
    assert open_signed_document(carried, public_key_text(key), "roster") == {"a": "Zürich", "b": 1}


def test_every_changed_value_breaks_the_signature(tmp_path):
    key = create_signing_key(tmp_path / "founder.key")
    signed = sign_document({"name": "alpha", "port": 4711}, key)
    for change in ({"name": "alpha", "port": 4712}, {"name": "alphb", "port": 4711}, {"name": "alpha"}):
        with pytest.raises(InputError, match="signature does not match"):
            open_signed_document({**signed, "document": change}, public_key_text(key), "roster")


def test_another_founder_and_a_malformed_key_are_refused(tmp_path):
    signed = sign_document({"a": 1}, create_signing_key(tmp_path / "one.key"))
    other = public_key_text(create_signing_key(tmp_path / "two.key"))
    with pytest.raises(InputError, match="another founder"):
        open_signed_document(signed, other, "roster")
    with pytest.raises(InputError, match="a public key is"):
        open_signed_document(signed, "ed25519:abc", "roster")


@pytest.mark.parametrize(
    "form", [None, [], {"document": {}}, {"document": [], "signature": ""}, {"document": {}, "signature": 3}]
)
def test_a_file_of_another_form_is_refused(tmp_path, form):
    key = public_key_text(create_signing_key(tmp_path / "founder.key"))
    with pytest.raises(InputError, match="roster"):
        open_signed_document(form, key, "roster")
