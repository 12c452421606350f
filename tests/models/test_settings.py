"""Settings that come with a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from drkl.errors import DrklError
from drkl.models.settings import check_config, making, read_generation_config
from drkl.models.weights import check_index


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**8}, r"'m' says num_hidden_layers: 100000000; expected at most 10,000"),
        ({"attn_implementation": "a/b"}, r"'m' has the attn_implementation 'a/b', code on the hub"),
        ({"text_config": {}}, r"'m' has a part that transformers does not read, a dict"),
    ],
)
def test_a_config_that_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        check_config(LlamaConfig(**changes), "m")


def test_a_config_that_makes_no_model_is_named() -> None:
    config = LlamaConfig()
    check_config(config, "m")
    with (
        pytest.raises(DrklError, match=r"The config of 'LlamaConfig' makes no model: KeyError: 'x'\. Mend"),
        making(config),
    ):
        raise KeyError("x")
    with pytest.raises(DrklError, match="our own"), making(config):
        raise DrklError("our own")


def test_generation_settings_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        read_generation_config(str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(DrklError, match=r"generation_config\.json of '.*' cannot be read: RecursionError"):
        read_generation_config(str(tmp_path))


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors"])
def test_an_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    check_index(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "part/model-2.safetensors"}}')
    check_index(tmp_path)
    path.write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    with pytest.raises(DrklError, match=r"names a file outside of that folder: '.*x\.safetensors'"):
        check_index(tmp_path)
