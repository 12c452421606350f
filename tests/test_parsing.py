"""Yaml and json that anybody may have written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from drkl.errors import DrklError
from drkl.parsing import DEEPEST, check_ends, parse_json, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: 1\nb: [x, 1.5, null, true]\n", {"a": 1, "b": ["x", 1.5, None, True]}),
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}\n", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
        (f"a: {'x' * 5_000}", {"a": "x" * 5_000}),
        ("[" * DEEPEST + "]" * DEEPEST, json.loads("[" * DEEPEST + "]" * DEEPEST)),
        ("a: 2024-07-26", {"a": __import__("datetime").date(2024, 7, 26)}),
    ],
)
def test_yaml_as_it_is_written(text: str, value: object) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "more than 100 lists and mappings in one another"),
        ("a: &a [*a]", "an alias inside of what it stands for"),
        ("a: 1\nb: 2\na: 3", "two keys 'a'"),
        (f"a: {'9' * 5_000}", "a value of 5000 characters that is no text"),
        ("a: 9999-99-99", "month must be in 1..12"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        (
            "x0: &x0 [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 8)),
            "more than 1,000,000 values",
        ),
    ],
)
def test_yaml_that_is_refused(text: str, words: str) -> None:
    with pytest.raises(yaml.YAMLError) as raised:
        parse_yaml(text)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[" * 10**5, "nested too deeply"), ("9" * 5_000, "too many digits"), ("{", "Expecting property name")],
)
def test_json_that_is_refused(text: str, words: str) -> None:
    with pytest.raises(json.JSONDecodeError, match=words):
        parse_json(text)


def test_what_may_have_no_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(DrklError, match="is a device, a pipe or a socket; expected a file"):
            check_ends(path)
    for path in (tmp_path, tmp_path / "none", "/dev/stdin", "/dev/fd/0", "a\0b"):
        check_ends(path)
