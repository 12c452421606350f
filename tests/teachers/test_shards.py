"""The files of a teacher cache: what is written is read, whoever wrote it, and what is broken is named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from drkl.errors import DrklError
from drkl.teachers import shards
from drkl.teachers.shards import (
    MADE_WITH,
    MANIFEST,
    OPEN_FILES,
    CacheRow,
    ShardFiller,
    ShardReader,
    ShardWriter,
    filling,
    save_whole,
)

ABOUT = {"kind": "hidden", "width": 3, "data": [{"turns": "last"}]}


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def plan(shards: int = 3, rows: int = 2) -> list[list[CacheRow]]:
    """Rows of 1, 2, … positions."""
    numbers = [[shard * rows + row for row in range(rows)] for shard in range(shards)]
    return [[CacheRow(digest(f"row {number}"), kept(number)) for number in shard] for shard in numbers]


def kept(number: int) -> tuple[int, ...]:
    return tuple(range(3, 3 + 2 * (number + 1), 2))


def states(number: int) -> torch.Tensor:
    """Those of a row: every value says whose it is."""
    count = 1 + number
    return (100 * number + torch.arange(count * 3).reshape(count, 3)).to(torch.bfloat16)


def fill(
    folder: Path, part: int = 0, parts: int = 1, *, shards: int = 3, rows: int = 2, stop: int | None = None
) -> bool:
    with ShardWriter(folder, ABOUT, plan(shards, rows), part=part, parts=parts) as writer:
        for number in writer.missing[:stop]:
            values = torch.cat([states(number * rows + row) for row in range(rows)])
            writer.write(number, {"states": values})
        return writer.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert fill(tmp_path / "c")
    reader = ShardReader(tmp_path / "c")
    assert len(reader) == 6
    for number in (4, 0, 5, 3, 1, 2):
        [place] = reader.find(digest(f"row {number}"))
        assert place.count == 1 + number
        found = reader.read(place)
        assert reader.positions(place).tolist() == [*kept(number)]
        assert found.keys() == {"states"} and found["states"].dtype == torch.bfloat16
        assert torch.equal(found["states"], states(number))
    assert reader.find(digest("row 6")) == []
    assert reader.manifest["rows"] == 6 and reader.manifest["positions"] == 21
    assert [*reader.verify()] == sorted(name for name in contents(tmp_path / "c") if name != MANIFEST)


def test_digests_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    keys = [bytes(8) + bytes([number]) + bytes(7) for number in range(4)]
    with ShardWriter(tmp_path, ABOUT, [[CacheRow(key, (0,)) for key in keys]]) as writer:
        writer.write(0, {"states": torch.arange(4.0)[:, None]})
        writer.finish()
    reader = ShardReader(tmp_path)
    places = [reader.find(key) for key in keys]
    assert [reader.read(place)["states"].item() for [place] in places] == [0, 1, 2, 3]
    assert reader.find(bytes(8) + bytes([9]) + bytes(7)) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_folder_is_the_same_whatever_the_number_of_parts(tmp_path: Path, order: tuple[int, ...]) -> None:
    fill(tmp_path / "one")
    done = [fill(tmp_path / "three", part, 3) for part in order]
    assert done == [False, False, True]
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_part_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    fill(tmp_path / "one")
    assert not fill(tmp_path / "two", stop=1)
    (tmp_path / "two" / ".part-values-00001.safetensors-77").write_bytes(b"half")  # of a killed process
    with pytest.raises(DrklError, match=r"is not finished: it has 1 of 3 shards. The command that began it goes on"):
        ShardReader(tmp_path / "two")
    before = (tmp_path / "two" / "values-00000.safetensors").stat().st_mtime_ns
    assert fill(tmp_path / "two")
    assert (tmp_path / "two" / "values-00000.safetensors").stat().st_mtime_ns == before
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_more_shards_than_files_that_may_be_open(tmp_path: Path) -> None:
    fill(tmp_path, shards=OPEN_FILES + 40, rows=1)
    reader = ShardReader(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, OPEN_FILES + 60), hard))
    try:
        for number in range(OPEN_FILES + 40):
            [place] = reader.find(digest(f"row {number}"))
            assert torch.equal(reader.read(place)["states"], states(number))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_unfinished_shard_is_no_shard(tmp_path: Path) -> None:
    fill(tmp_path, stop=2)
    (tmp_path / "rows-00001.safetensors").unlink()
    with ShardWriter(tmp_path, ABOUT, plan()) as writer:
        assert writer.missing == [1, 2] and not writer.finish()


def test_a_row_has_as_many_entries_as_positions(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path, ABOUT, plan()) as writer,
        pytest.raises(DrklError, match="Shard 1 of the cache has 7 positions, and 'states' 6 entries; expected one"),
    ):
        writer.write(1, {"states": torch.zeros(6, 3)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    values = torch.zeros(7, 3, dtype=torch.bfloat16)
    values[4, 1] = value
    with (
        ShardWriter(tmp_path, ABOUT, plan()) as writer,
        pytest.raises(DrklError, match="gives states that are not finite, first at position 1 of row 1 of shard 1"),
    ):
        writer.write(1, {"states": values})
    assert not (tmp_path / "values-00001.safetensors").exists()


def damage(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[:-5]
    else:
        data[-1] ^= 1
    path.write_bytes(data)


SAYS = {"gone": "misses its file '{}'",
        "cut": r"{}' is not the file that manifest.json lists: it has [\d,]+ of [\d,]+ bytes",
        "flipped": "{}' is not the file that manifest.json lists: it has a wrong checksum"}  # fmt: skip


@pytest.mark.parametrize("how", SAYS)
def test_a_broken_file_is_named_before_a_value_of_it_is_used(tmp_path: Path, how: str) -> None:
    fill(tmp_path)
    damage(tmp_path / "values-00001.safetensors", how)
    reader = ShardReader(tmp_path)
    [first], [other] = reader.find(digest("row 0")), reader.find(digest("row 2"))
    assert torch.equal(reader.read(first)["states"], states(0))
    with pytest.raises(DrklError, match=SAYS[how].format("values-00001.safetensors")):
        reader.read(other)
    with pytest.raises(DrklError, match=SAYS[how].format("values-00001.safetensors")):
        [*ShardReader(tmp_path).verify()]


@pytest.mark.parametrize("how", SAYS)
def test_a_broken_list_of_rows_is_named_at_once(tmp_path: Path, how: str) -> None:
    fill(tmp_path)
    damage(tmp_path / "rows-00002.safetensors", how)
    with pytest.raises(DrklError, match=SAYS[how].format("rows-00002.safetensors")):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2}', "has the format 2; this version of drkl reads 1. Make the cache again"),
        ("[]", "has the format None"),
        ('{"format": 1}', "does not list the files of a cache"),
        ('{"format": 1, "shards": 1, "finished": true, "files": 3}', "does not list the files of a cache"),
        ("{", "not valid json"),
    ],
)
def test_a_manifest_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DrklError, match=message):
        ShardReader(tmp_path)


def test_a_folder_that_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"is no teacher cache: it has no manifest.json. `drkl cache` makes one."):
        ShardReader(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DrklError, match=r"holds 'notes.txt' and no manifest.json; expected an empty folder or a cache"):
        ShardWriter(tmp_path, ABOUT, plan())
    with pytest.raises(DrklError, match=r"notes.txt' is a file where a folder is expected"):
        ShardWriter(tmp_path / "notes.txt" / "c", ABOUT, plan())


@pytest.mark.parametrize(
    ("about", "shards", "message"),
    [
        (ABOUT | {"width": 4}, plan(), "is a cache of something else: width is 3, not 4. Choose another folder"),
        (ABOUT, plan(2), "shards is 3, not 2; rows is 6, not 4"),
    ],
)
def test_a_cache_of_something_else_is_not_written_over(
    tmp_path: Path, about: dict[str, Any], shards: Any, message: str
) -> None:
    fill(tmp_path, stop=1)
    with pytest.raises(DrklError, match=message):
        ShardWriter(tmp_path, about, shards)


def hold(folder: Path, ready: Any, leave: Any) -> None:
    with ShardWriter(folder, ABOUT, plan()):
        ready.set()
        leave.wait()


def test_two_writers_of_one_part(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, leave))
    other.start()
    assert ready.wait(60)
    with pytest.raises(DrklError, match="Another process is writing part 1 of 1 of the cache"):
        ShardWriter(tmp_path, ABOUT, plan())
    other.kill()  # whoever held it is dead, and its part is free
    other.join()
    assert fill(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_manifest_says_what_is_in_the_folder(tmp_path: Path) -> None:
    fill(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["kind"] == "hidden" and manifest["format"] == 1
    for name, facts in manifest["files"].items():
        data = (tmp_path / name).read_bytes()
        assert facts == {"bytes": len(data), "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}


@pytest.mark.parametrize("how", SAYS)
@pytest.mark.parametrize("name", ["rows-00001.safetensors", "values-00001.safetensors", "note.txt"])
def test_a_pass_over_a_finished_cache_mends_what_is_broken_and_nothing_else(
    tmp_path: Path, name: str, how: str
) -> None:
    def finish(part: int = 0) -> bool:
        with ShardWriter(tmp_path, ABOUT, plan(), part=part) as writer:
            for number in writer.missing:
                writer.write(number, {"states": torch.cat([states(number * 2 + row) for row in range(2)])})
            return writer.finish(lambda: [(tmp_path / "note.txt").write_text("made by its writer") and "note.txt"])

    assert finish()
    whole, times = contents(tmp_path), {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert finish() and times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    damage(tmp_path / name, how)
    assert finish() and contents(tmp_path) == whole


def test_a_folder_in_the_place_of_a_file_is_left(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "values-00001.safetensors").unlink()
    (tmp_path / "values-00001.safetensors").mkdir()
    with pytest.raises(DrklError, match=r"values-00001.safetensors' is a folder; expected a file of the cache. Remove"):
        fill(tmp_path)
    assert not [*tmp_path.glob(".*")]


def test_a_shard_that_is_cut_short_before_the_cache_is_finished_is_written_again(tmp_path: Path) -> None:
    fill(tmp_path / "one")
    for name in ("values-00001.safetensors", "rows-00000.safetensors"):
        fill(tmp_path / "two", stop=2)
        damage(tmp_path / "two" / name, "cut")
    assert fill(tmp_path / "two") and contents(tmp_path / "one") == contents(tmp_path / "two")


def test_other_rows_of_the_same_number_are_another_cache(tmp_path: Path) -> None:
    fill(tmp_path, stop=1)
    other = [[CacheRow(digest(f"other {row.digest!r}"), row.positions) for row in shard] for shard in plan()]
    with pytest.raises(DrklError, match="is a cache of something else: rows_digest is"):
        ShardWriter(tmp_path, ABOUT, other)


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path) -> None:
    fill(tmp_path / "one")
    fill(tmp_path / "two", stop=1)
    for name in (
        ".part-rows-00001.safetensors-7",
        ".part-head.safetensors-7",
        ".manifest.json.abc",
        ".part-finish.lock",
    ):
        (tmp_path / "two" / name).write_text("half")
    (tmp_path / "two" / ".part-files-abc").mkdir()
    (tmp_path / "two" / ".part-files-abc" / "config.json").write_text("half")
    assert fill(tmp_path / "two") and contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    "change", [{"shards": 2}, {"rows": 5}, {"width": 4}, {"files": {}}, {"finished": 1}, {"kind": None}, {"new": 1}]
)
def test_a_manifest_that_was_edited(tmp_path: Path, change: dict[str, Any]) -> None:
    fill(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for use in (ShardReader, lambda folder: ShardWriter(folder, ABOUT, plan())):
        with pytest.raises(
            DrklError, match=r"manifest.json' (is not the file that was written|does not list the files)"
        ):
            use(tmp_path)


def test_files_can_be_read_by_whoever_may_read_new_ones(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    message = r"Cannot write '.*x': No space left on device\. Make room on its disk, then go on with the same command"
    with pytest.raises(DrklError, match=message):
        save_whole(tmp_path / "x", {})


def add(folder: Path, count: int = 2, *, stop: int | None = None, settings: Any = ()) -> bool:
    """Add rows 6, 7, ... to the cache of `fill`, two to a shard."""
    with ShardFiller(ShardReader(folder), plan(3 + count)[3:], settings) as writer:
        for number in writer.missing[:stop]:
            writer.write(number, {"states": torch.cat([states(6 + 2 * number + row) for row in range(2)])})
        return writer.finish()


def test_added_rows_lie_behind_the_others(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill(tmp_path / name)
    assert add(tmp_path / "one", settings=[{"turns": "last"}, {"turns": "all"}])
    reader = ShardReader(tmp_path / "one")
    assert (len(reader), reader.manifest["rows"], reader.manifest["shards"]) == (10, 10, 5)
    assert reader.manifest["data"] == [{"turns": "last"}, {"turns": "all"}]
    assert reader.manifest["positions"] == sum(range(1, 11)) and reader.manifest[MADE_WITH]["positions"] == 21
    for number in range(10):
        [place] = reader.find(digest(f"row {number}"))
        assert torch.equal(reader.read(place)["states"], states(number))
    assert len([*reader.verify()]) == 10
    before = contents(tmp_path / "two")
    assert not add(tmp_path / "two", stop=1)  # killed
    assert contents(tmp_path / "two").items() >= before.items() and len(ShardReader(tmp_path / "two")) == 6
    add(tmp_path / "two", settings=[{"turns": "all"}])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_rows_are_added_more_than_once(tmp_path: Path) -> None:
    fill(tmp_path)
    for first in (3, 4):
        with ShardFiller(ShardReader(tmp_path), plan(first + 1)[first:]) as writer:
            writer.write(0, {"states": torch.cat([states(2 * first), states(2 * first + 1)])})
            assert writer.finish()
    reader = ShardReader(tmp_path)
    assert len(reader) == 10 and reader.manifest[MADE_WITH]["rows"] == 6
    [place] = reader.find(digest("row 9"))
    assert torch.equal(reader.read(place)["states"], states(9))


def test_a_cache_that_changes_under_a_filler(tmp_path: Path) -> None:
    fill(tmp_path)
    reader = ShardReader(tmp_path)
    add(tmp_path)
    with (
        ShardFiller(reader, plan(4)[3:]) as writer,
        pytest.raises(DrklError, match="was changed while rows were added to it; the same command goes on"),
    ):
        writer.write(0, {"states": torch.cat([states(6), states(7)])})
        writer.finish()


def hold_and_add(folder: Path, ready: Any, leave: Any) -> None:
    with filling(folder):
        ready.set()
        leave.wait()
        add(folder)


def test_a_filler_waits_for_another(tmp_path: Path) -> None:
    fill(tmp_path)
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=hold_and_add, args=(tmp_path, ready, leave))
    other.start()
    assert ready.wait(60)
    waited: list[int] = []

    def on_wait() -> None:
        waited.append(len(ShardReader(tmp_path)))
        leave.set()

    with filling(tmp_path, on_wait):
        assert waited == [6] and len(ShardReader(tmp_path)) == 10
    other.join()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_there_is_nothing_to_fill(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"There is no folder '.*none'"), filling(tmp_path / "none"):
        pass
