"""Json objects that tell whether they are still what was written: the checksum of everything else stands in each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "checksum"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object of json with its checksum."""
    read_again = json.loads(json.dumps(value))  # keys that are numbers are text then
    return {**value, CHECKSUM: _checksum(read_again)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `sealed` was given; an object without a checksum is returned as it is.

    Raises:
        ValueError: the checksum is another.
    """
    rest = {name: entry for name, entry in value.items() if name != CHECKSUM}
    if CHECKSUM in value and value[CHECKSUM] != _checksum(rest):
        raise ValueError(f"it has another content than was written (its {CHECKSUM} says so)")
    return rest


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
