from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from drkl.errors import DrklError
from drkl.evaluation.store import Store, fingerprint
from drkl.models.fingerprint import model_fingerprint
from tests.evaluation import tiny


def test_parts_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path / "parts")
    tensors = {"a": torch.randn(3, 2).T, "b": torch.tensor([1, 2])}
    lines = [{"text": "a\u2028b \ud800 \x00", "n": 1}]
    assert store.read_tensors("x") is None and store.read_lines("x") is None
    store.write_tensors("x", tensors)
    store.write_lines("x", lines)
    found = store.read_tensors("x")
    assert found is not None and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert store.read_lines("x") == lines
    assert sorted(path.name for path in store.folder.iterdir()) == ["x.jsonl", "x.safetensors"]
    store.remove()
    assert not store.folder.exists()


def test_a_broken_part_is_as_good_as_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    assert store.read_tensors("x") is None and store.read_lines("x") is None


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DrklError, match="Cannot write"):
        Store(tmp_path / "file").write_tensors("x", {"a": torch.zeros(1)})


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file", limit=1000)
    store.write_tensors("x", {"a": torch.zeros(1)})
    store.write_lines("x", [{"a": 1}])
    assert store.read_tensors("x") is None
    (said,) = [record.getMessage() for record in caplog.records]
    assert "is a file where a folder is expected. Move it away. The evaluation goes on without this cache." in said


def test_the_parts_used_longest_ago_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=1200)
    for number, name in enumerate("abc"):
        store.write_lines(name, [{"text": "x" * 300}])
        os.utime(tmp_path / f"{name}.jsonl", (number, number))
    assert store.read_lines("a") is not None  # now the newest
    store.write_lines("d", [{"text": "x" * 300}])
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]
    store.write_lines("e", [{"text": "x" * 5000}])
    assert [path.stem for path in tmp_path.iterdir()] == ["e"], "the newest stays whatever its size"


def test_fingerprints_tell_facts_apart() -> None:
    assert fingerprint(a=1, b=[2]) == fingerprint(b=[2], a=1)
    assert len({fingerprint(a=1), fingerprint(a=2), fingerprint(b=1), fingerprint(a="1"), fingerprint(a=1.5)}) == 5


def test_a_models_fingerprint_is_its_weights_and_config() -> None:
    model = tiny.llama()
    printed = model_fingerprint(model)
    assert printed == model_fingerprint(tiny.llama())
    model.config._name_or_path = "elsewhere"
    assert model_fingerprint(model) == printed
    changed = tiny.llama()
    with torch.no_grad():
        next(iter(changed.parameters()))[0, 0] += 1e-9
    others = [tiny.llama(1), tiny.llama().float(), tiny.llama(rms_norm_eps=1e-3), changed, tiny.gpt2()]
    assert len({printed, *map(model_fingerprint, others)}) == 6
