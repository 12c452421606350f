"""Hostile rows: packed bombs, archives, folders of `datasets`, parquet."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.faults import hostile
from tests.faults.conftest import Injected
from tests.faults.forked import Runner

LITTLE_MEMORY = {"inject": "tests.faults.hostile:limit_memory", "given": [2 * hostile.GIBI], "until": 300}


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="Packed rows of 600 MiB in a small file (`.gz`, `.bz2`, `.xz`), alone, beside good rows, read as a stream",
    does="Stopped once it is 200 times its size, with one message.",
)
def test_packed_bombs(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config = hostile.write_config(tmp_path)
    good = (tmp_path / "data.jsonl").read_bytes()
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_bytes(b"".join(good.splitlines(keepends=True)[:3]).replace(b"w", b"w1"))
    streamed = ("data.streaming=true", f"data.eval_path={heldout}", "training.max_steps=4")
    block = b" " * (1 << 20)
    for suffix, opened in {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.items():
        for kind, (first, fill) in {
            "jsonl": (good, block), "csv": (b"prompt,response\n", b"a" * (1 << 20)), "txt": (b"", b"a" * (1 << 20)),
        }.items():  # fmt: skip
            path = tmp_path / f"bomb.{kind}{suffix}"
            with opened(path, "wb") as file:  # type: ignore[operator]
                file.write(first + (b'{"a": "' if kind == "jsonl" else b""))
                for _ in range(600):
                    file.write(fill)
            for key, changes in {"path": (), "streaming": streamed}.items():
                if key == "streaming" and kind != "jsonl":
                    continue
                with injected(f"{path.name}: {key}"):
                    command = ("data", config, f"data.path={path}", *changes)
                    hostile.assert_refused(runner.call(*command, **LITTLE_MEMORY), path.name)


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="Archives with `../` in their names, folders of `datasets` with scripts, pickles, bombs of yaml, and "
    "parquet with metadata of pandas that name classes, as data",
    does="Nothing runs and nothing is written beside; one message, or the rows.",
)
def test_folders_of_rows(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config = hostile.write_config(tmp_path)
    mark, row = tmp_path / "ran", b'{"prompt": "w1", "response": "w2"}\n'
    script = f"import os\nos.system({f'touch {mark}'!r})\n"

    def folder(name: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        return path

    with zipfile.ZipFile(folder("zip") / "rows.zip", "w") as archive:
        archive.writestr("../../escaped.jsonl", row)
    data = io.BytesIO(row)
    with tarfile.open(folder("tar") / "rows.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("../../escaped.jsonl")
        info.size = len(row)
        tar.addfile(info, data)
    made = folder("script")
    (made / "script.py").write_text(script)
    (made / "dataset.py").write_text(script)
    pickled = folder("pickled")
    (pickled / "data.pkl").write_bytes(hostile.pickled(mark))
    saved = folder("saved")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../data.arrow"}]}))
    (saved / "dataset_info.json").write_bytes(hostile.pickled(mark))
    (saved / "data.arrow").write_bytes(hostile.pickled(mark))
    bomb = folder("bomb")
    (bomb / "rows.jsonl").write_bytes((tmp_path / "data.jsonl").read_bytes())
    lists = "".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 9))
    (bomb / "README.md").write_text(f"---\nx0: &x0 [1,1,1,1,1,1,1,1,1,1]\n{lists}---\n")
    elsewhere = folder("elsewhere")
    (elsewhere / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: file:///etc/passwd\n---\n"
    )
    for name in ("zip", "tar", "script", "pickled", "saved", "bomb", "elsewhere"):
        with injected(name):
            done = runner.call("data", config, "data.path=null", f"data.dataset={tmp_path / name}", **LITTLE_MEMORY)
            assert not mark.exists(), "it ran"
            assert not [path for path in tmp_path.rglob("escaped*")], "written beside"
            assert "root:" not in done.out + done.err
            if done.code != 0:
                hostile.assert_refused(done, name)
    for name in ("rows.zip", "rows.tar.gz", "rows.pkl", "rows.arrow", "rows.npy"):
        path = tmp_path / name
        path.write_bytes(hostile.pickled(mark) if name[-3:] in ("pkl", "npy") else b"PK\x03\x04" + b"\0" * 100)
        with injected(f"data.path: {name}"):
            hostile.assert_refused(runner.call("data", config, f"data.path={path}", **LITTLE_MEMORY), name)
            assert not mark.exists(), "it ran"
    table = pa.table({"prompt": [f"w{i}" for i in range(20)], "response": ["w2"] * 20})
    names = json.dumps({"columns": [{"name": "prompt", "pandas_type": "os.system", "numpy_type": f"touch {mark}"}]})
    info = json.dumps({"info": {"features": {"prompt": {"dtype": "os.system", "_type": "Popen"}}}})
    for key, value in {"pandas": names, "huggingface": info, "ARROW:schema": "AAAA"}.items():
        path = tmp_path / f"{key[:5]}.parquet"
        parquet.write_table(table.replace_schema_metadata({key: value}), path)
        with injected(f"parquet with metadata of {key}"):
            done = runner.call("data", config, f"data.path={path}", **LITTLE_MEMORY)
            assert not mark.exists(), "it ran"
            if done.code != 0:
                hostile.assert_refused(done, path.name)
    broken = tmp_path / "pickled.parquet"
    broken.write_bytes(b"PAR1" + hostile.pickled(mark) + b"PAR1")
    with injected("a pickle called parquet"):
        hostile.assert_refused(runner.call("data", config, f"data.path={broken}", **LITTLE_MEMORY), broken.name)
