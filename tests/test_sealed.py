"""What is written with its checksum is read back, and nothing else is."""

from __future__ import annotations

import json

import pytest

from drkl.sealed import sealed, unsealed

VALUE = {"b": [1, 2.5, None, "ä"], "a": {2: "two", 10: "ten"}, "t": (1, 2)}


def test_a_sealed_object_survives_json_and_a_change_does_not() -> None:
    text = json.dumps(sealed(VALUE))
    assert unsealed(json.loads(text)) == json.loads(json.dumps(VALUE))
    with pytest.raises(ValueError, match="has another content than was written"):
        unsealed(json.loads(text.replace("2.5", "2.4")))
    with pytest.raises(ValueError, match="has another content"):
        unsealed(json.loads(text) | {"more": 1})


def test_an_object_without_a_checksum_is_taken_as_it_is() -> None:
    assert unsealed({"a": 1}) == {"a": 1}
