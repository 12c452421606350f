from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from drkl.data import DataConfig


def test_defaults() -> None:
    config = DataConfig(path="rows.jsonl")
    assert (config.max_prompt_tokens, config.max_tokens, config.format) == (256, 512, "auto")
    assert config.dataset is None and config.eval_path is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of path .* and dataset .*; got neither"),
        ({"path": "a", "dataset": "b"}, "exactly one of path .* and dataset .*; got both"),
        ({"path": "a", "max_prompt_tokens": 0}, "max_prompt_tokens\n.*greater than 0"),
        (
            {"path": "a", "max_prompt_tokens": 512, "max_tokens": 512},
            r"max_tokens \(512\) must be larger than max_prompt_tokens \(512\)",
        ),
        ({"path": "a", "format": "csv"}, "format\n.*'auto', 'prompt_response', .* 'text_label' or 'text'"),
        ({"path": "a", "eval_max_rows": 5}, "eval_max_rows is set, but eval_path, whose rows it counts, is not"),
        ({"path": "a", "eval_path": "b", "eval_max_rows": 0}, "eval_max_rows\n.*greater than 0"),
        ({"path": "a", "pth": "b"}, "pth\n.*Extra inputs are not permitted"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**values)


def test_values_do_not_change_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        DataConfig(path="a").path = "b"  # type: ignore[misc]


def test_every_key_has_a_one_line_meaning() -> None:
    for field in DataConfig.model_fields.values():
        assert field.description and "\n" not in field.description


def test_a_small_max_tokens_alone_leaves_room_for_a_response() -> None:
    assert [DataConfig(path="a", max_tokens=n).max_prompt_tokens for n in (2, 64, 256, 257)] == [1, 32, 128, 256]
