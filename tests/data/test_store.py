"""Rows from the cache are the rows that are tokenised in memory; whatever may change them makes them anew."""

from __future__ import annotations

import errno
import json
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from drkl.data import DataConfig, making, rows, sources, split, store, workers
from drkl.data.classification import LabelledRow
from drkl.data.ends import ends_of, turn_ends
from drkl.data.examples import Example
from drkl.data.lengths import NO_LIMIT, Room
from drkl.data.rows import make_rows, read_shares, rows_from
from drkl.data.shares import each_training_example, heldout_of, load_shares
from drkl.data.sources import tokenizer_identity
from drkl.data.store import Watch
from drkl.data.stored import (
    NUMBERS,
    JoinedRows,
    NotStorable,
    StoredRows,
    column,
    from_json,
    take,
    to_json,
    to_record,
)
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.runs import cache_dir, locked
from tests.data.tiny_tokenizers import build

LIMITS = {"max_prompt_tokens": 24, "max_tokens": 34}
KIND: dict[str, Any] = {
    "classes": None, "encoder_decoder": False, "ends": (), "room": NO_LIMIT, "needs_responses": True,
    "teacher_tokenizer": None,
}  # fmt: skip
WORDS = ("alpha", "beta", "gamma", "x", "yy", "é", "\u2028z")


@pytest.fixture(autouse=True)
def small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows are many blocks and parts, in one process."""
    monkeypatch.setenv("DRKL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "BLOCK_BYTES", 600)
    monkeypatch.setattr(sources, "BLOCK_ROWS", 7)
    monkeypatch.setattr(making, "PART_ROWS", 9)
    monkeypatch.setattr(making, "CHUNK_ROWS", 4)
    monkeypatch.setattr(making, "CHUNK_BLOCKS", 3)
    one_process(monkeypatch)


def one_process(monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
    for module in (making, split):
        monkeypatch.setattr(module, "num_cores", lambda: count)


def texts(seed: int, count: int, longest: int) -> list[str]:
    choice = random.Random(seed)
    return [" ".join(choice.choices(WORDS, k=choice.randint(0, longest))) for _ in range(count)]


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts and responses, some too long, some empty, some twice; some have ids, one that of a row's number."""
    found: list[dict[str, Any]] = []
    for number, (prompt, response) in enumerate(zip(texts(seed, count, 9), texts(seed + 1, count, 20), strict=True)):
        own = {"id": f"i{number}"} if number % 3 == 0 else {"id": "row-6"} if number == 7 else {}
        found.append({"prompt": prompt, "response": response, **own})
    return found


def chats(count: int) -> list[dict[str, Any]]:
    words = [text or "hi" for text in texts(5, 4 * count, 4)]
    turns = [words[4 * n : 4 * n + 4] for n in range(count)]
    roles = ("user", "assistant", "user", "assistant")
    return [{"messages": [{"role": r, "content": w} for r, w in zip(roles, turn, strict=True)]} for turn in turns]


def plain(count: int) -> list[dict[str, Any]]:
    return [{"text": text + " end"} for text in texts(3, count, 40)]


def labelled(count: int) -> list[dict[str, Any]]:
    return [{"text": text + " .", "label": "abc"[n % 3]} for n, text in enumerate(texts(4, count, 40))]


def write(folder: Path, lines: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def configs(folder: Path) -> dict[str, DataConfig]:
    pair, chat = write(folder, pairs(60)), write(folder, chats(24), "chats.jsonl")
    text, few = write(folder, plain(40), "texts.jsonl"), write(folder, plain(5), "few.jsonl")
    same = write(folder, [{"prompt": "ab"[n % 2], "response": "c d"} for n in range(30)], "same.jsonl")
    mixed = write(folder, [*plain(12), *pairs(12)], "mixed.jsonl")
    several = [{"path": pair, "weight": 1.5}, {"path": same, "weight": 0.5, "max_rows": 9}, {"path": text, "weight": 2}]
    packed = write(folder, pairs(40, 8), "other.json")
    return {
        "pairs": DataConfig(path=pair, **LIMITS),
        "few rows": DataConfig(path=pair, max_rows=8, **LIMITS),
        "held out of a file": DataConfig(path=pair, eval_path=packed, eval_max_rows=9, **LIMITS),
        "nothing held out": DataConfig(path=pair, eval_path="none", **LIMITS),
        "few prompts": DataConfig(path=same, **LIMITS),
        "texts": DataConfig(path=text, **LIMITS),
        "ends of texts": DataConfig(path=few, **LIMITS),
        "texts and pairs": DataConfig(path=mixed, **LIMITS),
        "all turns": DataConfig(path=chat, turns="all", **LIMITS),
        "sources": DataConfig(sources=several, **LIMITS),
    }


NAMES = (
    "pairs", "few rows", "held out of a file", "nothing held out", "few prompts", "texts", "ends of texts",
    "texts and pairs", "all turns", "sources",
)  # fmt: skip


def check_shares(config: DataConfig, **kind: Any) -> None:
    """Compare with the rows that are made in memory, and with those that the next start reads."""
    kind = KIND | kind
    train, held = read_shares(config, classifier=kind["classes"] is not None)
    expected = make_rows(train, config, build(), **kind)
    heldout = ([], None) if config.eval_path == "none" else make_rows(held, config, build(), **kind)
    for _ in range(2):
        found = load_shares(config, build(), **kind)
        assert (list(found.train), found.report) == (list(expected[0]), expected[1])
        assert (list(found.heldout), found.heldout_report) == (list(heldout[0]), heldout[1])
    classifies = kind["classes"] is not None
    assert list(each_training_example(config, classifier=classifies)) == train
    for _ in range(2):  # made, and kept
        assert heldout_of(config, classifier=classifies) == held


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [name if name == "sources" else pytest.param(name, marks=SLOW) for name in NAMES])
def test_rows_are_those_made_in_memory(tmp_path: Path, name: str) -> None:
    check_shares(configs(tmp_path)[name])


@pytest.mark.slow
def test_rows_of_a_classifier_are_those_made_in_memory(tmp_path: Path) -> None:
    config = DataConfig(path=write(tmp_path, labelled(40)), **LIMITS)
    check_shares(config, classes=("a", "b", "c"))
    found = load_shares(config, build(), **(KIND | {"classes": ("a", "b", "c")}))
    assert isinstance(found.train[0], LabelledRow) and found.cached
    assert column(found.train, "label").tolist() == [row.label for row in found.train]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "labels"])
def test_rows_made_by_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    one_process(monkeypatch, 2)
    if name == "labels":
        check_shares(DataConfig(path=write(tmp_path, labelled(40)), **LIMITS), classes=("a", "b", "c"))
    else:
        check_shares(configs(tmp_path)[name])


def test_a_block_of_a_book_reads_its_own_tokens_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    part = making._Texts._part

    def spy(self: making._Texts, text: int, start: int, end: int) -> list[int]:
        found = part(self, text, start, end)
        read.append(len(found))
        return found

    monkeypatch.setattr(making._Texts, "_part", spy)
    path = tmp_path / "book.txt"
    path.write_text("alpha beta gamma x yy é " * 400, encoding="utf-8")
    config = DataConfig(path=str(path), format="text", eval_path="none", **LIMITS)
    check_shares(config)
    assert len(read) > 100 and max(read) == LIMITS["max_tokens"]


# what makes rows anew ---------------------------------------------------------------------------------------------


def with_template(tokenizer: Any) -> Any:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    return tokenizer


def with_token(tokenizer: Any) -> Any:
    tokenizer.add_tokens(["alpha"])
    return tokenizer


def with_eos(tokenizer: Any) -> Any:
    tokenizer.eos_token = "x"
    return tokenizer


CHANGES: dict[str, Callable[[DataConfig], tuple[DataConfig, Any, dict[str, Any]]]] = {
    "template": lambda c: (c.model_copy(update={"template": "plain"}), build(), {}),
    "turns": lambda c: (c.model_copy(update={"turns": "all"}), build(), {}),
    "max_tokens": lambda c: (c.model_copy(update={"max_tokens": 33}), build(), {}),
    "max_prompt_tokens": lambda c: (c.model_copy(update={"max_prompt_tokens": 23}), build(), {}),
    "max_rows": lambda c: (c.model_copy(update={"max_rows": 9}), build(), {}),
    "eval_path": lambda c: (c.model_copy(update={"eval_path": "none"}), build(), {}),
    "format": lambda c: (c.model_copy(update={"format": "prompt_response"}), build(), {}),
    "chat template": lambda c: (c, with_template(build()), {}),
    "another token": lambda c: (c, with_token(build()), {}),
    "another eos": lambda c: (c, with_eos(build()), {}),
    "ends": lambda c: (c, build(), {"ends": (3,)}),
    "room": lambda c: (c, build(), {"room": Room(40, 40)}),
    "prompts alone": lambda c: (c, build(), {"needs_responses": False}),
    "the teacher's reading": lambda c: (c, build(), {"teacher_tokenizer": with_template(build())}),
}


@pytest.mark.parametrize("name", [name if name == "turns" else pytest.param(name, marks=SLOW) for name in CHANGES])
def test_what_may_change_rows_makes_them_anew(tmp_path: Path, name: str) -> None:
    config = DataConfig(path=write(tmp_path, pairs(30)), **LIMITS)
    assert not load_shares(config, build(), **KIND).cached and load_shares(config, build(), **KIND).cached
    changed, tokenizer, kind = CHANGES[name](config)
    assert not load_shares(changed, tokenizer, **(KIND | kind)).cached
    assert load_shares(config, build(), **KIND).cached


@pytest.mark.slow
def test_the_same_bytes_elsewhere_are_the_same_rows_and_others_are_not(tmp_path: Path) -> None:
    first = load_shares(DataConfig(path=write(tmp_path, pairs(30)), **LIMITS), build(), **KIND)
    (tmp_path / "copy").mkdir()
    copy = DataConfig(path=write(tmp_path / "copy", pairs(30)), **LIMITS)
    again = load_shares(copy, build(), **KIND)
    assert again.cached and again.train == first.train
    write(tmp_path / "copy", [{**row, "response": row["response"] + " x"} for row in pairs(30)])
    assert not load_shares(copy, build(), **KIND).cached


def test_other_code_makes_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.key_of({"a": 1})
    assert key == store.key_of({"a": 1}) != store.key_of({"a": 2})
    monkeypatch.setattr(store, "_code", lambda: ["other"])
    assert store.key_of({"a": 1}) != key


def test_what_a_tokenizer_did_last_is_no_part_of_it() -> None:
    tokenizer = build()
    before = tokenizer_identity(tokenizer)
    tokenizer("alpha beta", truncation=True, max_length=1, padding="max_length")
    assert tokenizer_identity(tokenizer) == before == tokenizer_identity(build())
    own = type("Own", (type(tokenizer),), {"__module__": "mine"})
    tokenizer.__class__ = own
    assert tokenizer_identity(tokenizer) is None


@pytest.mark.slow
def test_rows_of_an_unknown_tokenizer_are_not_kept(tmp_path: Path) -> None:
    config = DataConfig(path=write(tmp_path, pairs(30)), **LIMITS)
    tokenizer = build()
    expected = load_shares(config, tokenizer, **KIND)
    tokenizer.__class__ = type("Own", (type(tokenizer),), {"__module__": "mine"})
    for _ in range(2):
        found = load_shares(config, tokenizer, **KIND)
        assert not found.cached and found.train == expected.train


# what goes wrong --------------------------------------------------------------------------------------------------


def kept() -> list[Path]:
    return [path for path in (cache_dir() / "rows").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "damage",
    ["byte", *(pytest.param(n, marks=SLOW) for n in ("cut", "gone", "manifest", "a number of the manifest", "none"))],
)
def test_damaged_rows_are_made_anew(tmp_path: Path, damage: str) -> None:
    config = DataConfig(path=write(tmp_path, pairs(30)), **LIMITS)
    expected = list(load_shares(config, build(), **KIND).train)
    (folder,) = kept()
    file = max(folder.glob("rows-*.arrow"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "byte":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text('{"files": {')
    elif damage == "a number of the manifest":
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"documents": 0', '"documents": 1'))
        assert (folder / "manifest.json").read_text() != text
    said: list[str] = []
    found = load_shares(config, build(), watch=Watch(said.append), **KIND)
    assert list(found.train) == expected and found.cached == (damage == "none")
    assert said == ([] if damage == "none" else [f"The tokenised rows in {folder} are damaged: they are made anew."])
    assert load_shares(config, build(), **KIND).cached


def test_a_start_after_a_kill_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=write(tmp_path, pairs(60)), **LIMITS)
    tokenised: list[str] = []
    tokenize = making._Part.batches

    def counted(part: Any) -> Any:
        tokenised.append(part._task.name)
        return tokenize(part)

    monkeypatch.setattr(making._Part, "batches", counted)

    def kill(what: str, done: int, of: int) -> None:
        if what.startswith("Tokenising") and done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_shares(config, build(), watch=Watch(on_rows=kill), **KIND)
    before = len(tokenised)
    assert before >= 2 and not any(path.name[0] != "." for path in kept())
    (making_folder,) = kept()
    broken = making_folder / "rows-00000.arrow"
    broken.write_bytes(broken.read_bytes()[:-1])  # a part that is not whole is made again
    seen: list[tuple[str, int, int]] = []
    found = load_shares(config, build(), watch=Watch(on_rows=lambda *state: seen.append(state)), **KIND)
    assert tokenised[before] == "00000" and tokenised[before + 1] == f"{before:05d}"
    assert seen[-1][1] == seen[-1][2] == 57 and not found.cached
    monkeypatch.setenv("DRKL_CACHE", str(tmp_path / "another"))
    assert load_shares(config, build(), **KIND).train == found.train


@pytest.mark.slow
def test_while_one_process_makes_rows_another_waits(tmp_path: Path) -> None:
    config = DataConfig(path=write(tmp_path, pairs(30)), **LIMITS)
    load_shares(config, build(), **KIND)
    (folder,) = kept()
    folder.rename(tmp_path / "aside")
    said, shown = threading.Event(), threading.Event()
    found: list[Any] = []

    watch = Watch(lambda text: said.set(), lambda what, done, of: shown.set() if (done, of) == (0, 27) else None)

    def ask() -> None:
        found.append(load_shares(config, build(), watch=watch, **KIND))

    with locked(folder.with_name(f".{folder.name}.lock")):
        asking = threading.Thread(target=ask)
        asking.start()
        assert said.wait(60)
        parts = store.Parts(folder.with_name(f".making-{folder.name}"))
        parts.expect(27)
        assert shown.wait(60)
        (tmp_path / "aside").rename(folder)
    asking.join()
    assert len(found[0].train) and not found[0].report.dropped.get("x")


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=write(tmp_path, pairs(30)), **LIMITS)
    expected = list(load_shares(config, build(), **KIND).train)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DRKL_CACHE", str(tmp_path / "file"))
    messages: list[str] = []
    found = load_shares(config, build(), watch=Watch(messages.append), **KIND)
    assert list(found.train) == expected
    assert "Cannot write '" in messages[0] and "Set DRKL_CACHE" in messages[0]


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=write(tmp_path, pairs(30, 77)), **LIMITS)
    open_file, places = pa.OSFile, ["cache/rows"]

    def full(path: str, mode: str) -> Any:
        if any(f"/{place}" in path for place in places):
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_file(path, mode)

    monkeypatch.setattr(pa, "OSFile", full)
    monkeypatch.setenv("DRKL_CACHE", str(tmp_path / "cache"))
    places.append("drkl-rows")
    with pytest.raises(DrklError, match=r"Cannot write the tokenised rows .*No space left.* Make room on its disk"):
        load_shares(config, build(), **KIND)
    places.pop()
    messages: list[str] = []
    found = load_shares(config, build(), watch=Watch(messages.append), **KIND)
    assert "No space left on device. Make room" in messages[0] and "Until this run ends" in messages[0]
    places.clear()
    assert list(load_shares(config, build(), **KIND).train) == list(found.train)


@pytest.mark.slow
def test_the_rows_used_longest_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = DataConfig(path=write(tmp_path, pairs(30)), **LIMITS)
    shown = load_shares(first, build(), **KIND).train
    expected = list(shown)
    monkeypatch.setattr(store, "CACHE_BYTES", 1)
    second = first.model_copy(update={"max_tokens": 33})
    load_shares(second, build(), **KIND)
    assert len(kept()) == 1 and list(shown) == expected, "what is open stays readable"
    assert load_shares(second, build(), **KIND).cached and not load_shares(first, build(), **KIND).cached


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a", "response": "b"}'] * 30 + ['{"prompt": "a"'], r"rows.jsonl:31: not valid JSON"),
        (['{"prompt": "a", "response": "b"}'] * 30 + ['{"prompt": 1, "response": "b"}'], r"rows.jsonl:31: prompt"),
        (['{"prompt": "a", "response": "b"}'] * 30 + ["[1]"], r"rows.jsonl:31: expected an object"),
        (
            ['{"id": "x", "prompt": "a", "response": "b"}', *['{"prompt": "a", "response": "b"}'] * 30,
             '{"id": "x", "prompt": "c", "response": "d"}'],
            r"rows.jsonl:32: the id 'x' was seen before, at .*rows.jsonl:1; ids must be unique",
        ),
        (['{"prompt": "a", "response": "b"}'] * 30, r"30 row\(s\) with 1 different prompt\(s\) cannot be split"),
        (['{"prompt": "", "response": "b"}', '{"prompt": "b", "response": ""}'] * 15, "None of the 15 rows can be"),
    ],
)  # fmt: skip
def test_errors_name_the_row(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    config = DataConfig(path=str(path), **LIMITS)
    with pytest.raises(DrklError, match=message):
        load_shares(config, build(), **KIND)
    assert kept() == []


@pytest.mark.slow
def test_values_over_several_lines_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, indent=2) for row in pairs(30)))
    check_shares(DataConfig(path=str(path), **LIMITS))


@pytest.mark.slow
def test_what_json_cannot_hold_is_tokenised_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ({1: 2}, (1,), float("nan"), b"bytes"):
        with pytest.raises(NotStorable):
            to_json(Example("a", ({"role": "assistant", "content": ""},), template_kwargs={"k": value}))
    with pytest.raises(NotStorable, match="no Unicode"):
        to_record([Row("\ud800", (1,), (2,), Example("\ud800", ({"role": "assistant", "content": ""},)))])
    config = DataConfig(path=write(tmp_path, pairs(30)), **LIMITS)
    expected = list(load_shares(config, build(), **KIND).train)

    def refuse(rows: Any) -> None:
        raise NotStorable

    monkeypatch.setattr(making, "to_record", refuse)
    monkeypatch.setenv("DRKL_CACHE", str(tmp_path / "another"))
    found = load_shares(config, build(), **KIND).train
    assert found == expected and isinstance(found, list)


# the rows themselves ----------------------------------------------------------------------------------------------


def stored(folder: Path, name: str = "all turns") -> StoredRows:
    found = load_shares(configs(folder)[name], build(), **KIND).train
    assert isinstance(found, StoredRows)
    return found


@pytest.mark.parametrize("name", [pytest.param("all turns", marks=SLOW), "sources"])
def test_columns_are_of_the_rows(tmp_path: Path, name: str) -> None:
    found = stored(tmp_path, name)
    listed = list(found)
    for number in NUMBERS.keys() - {"label"}:
        expected = [NUMBERS[number](row) for row in listed]
        assert column(found, number).tolist() == column(listed, number).tolist() == expected
        assert column(JoinedRows(found, listed[:2]), number).tolist() == expected + expected[:2]
    assert turn_ends(found).tolist() == [token for row in listed for token in ends_of(row)]
    assert turn_ends(JoinedRows(found, listed)).tolist() == 2 * turn_ends(found).tolist()


@pytest.mark.slow
def test_parts_of_rows_are_rows(tmp_path: Path) -> None:
    found = stored(tmp_path, "sources")
    listed = list(found)
    assert found[3:20:4] == listed[3:20:4] and found[::-1][2] == listed[-3] and found[-1] == listed[-1]
    assert found[5:][1:] == listed[6:] and take(found, [4, 1]) == take(listed, [4, 1]) == [listed[4], listed[1]]
    assert pickle.loads(pickle.dumps(found)) == found and found != listed[1:] and found[:0] == []
    joined = JoinedRows(found, listed)
    assert joined[len(found)] == listed[0] and joined[-1] == listed[-1] and joined[1:3] == listed[1:3]
    with pytest.raises(IndexError):
        found[len(found)]
    with pytest.raises(IndexError):
        joined[len(joined)]


@pytest.mark.slow
def test_repeated_rows_have_ids_of_their_own(tmp_path: Path) -> None:
    lines = [{"id": name, "prompt": name, "response": "x"} for name in ("a", "a#2", "b", "c", "d", "e")]
    config = DataConfig(
        sources=[{"path": write(tmp_path, lines), "weight": 2}], eval_path=write(tmp_path, lines, "e.json"), **LIMITS
    )
    ids = [row.id for row in load_shares(config, build(), **KIND).train]
    assert ids == ["a", "a#2", "b", "c", "d", "e", "a#2'", "a#2#2", "b#2", "c#2", "d#2", "e#2"]


@pytest.mark.parametrize(
    "example",
    [
        Example("a", ({"role": "user", "content": "é\u2028"}, {"role": "assistant", "content": "b"}), shape="s"),
        Example("a", ({"role": "assistant", "content": "\ud800"},), weight=0.5, unlearnt=(0,)),
        Example(
            "a",
            ({"role": "assistant", "content": ""},),
            "l",
            3,
            2.0,
            ("r",),
            ({"type": "f", "n": [1, None, 2.5]},),
            {"k": {"v": True}},
        ),
    ],
)
def test_examples_are_the_same_from_json(example: Example) -> None:
    again = from_json("a", to_json(example))
    assert again == example and again.shape == example.shape


# what is given in Python ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_paths_and_data_sets_are_read_as_lists_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"prompt": f"p {n}", "response": text + " a"} for n, text in enumerate(texts(1, 30, 9))]
    expected, report = rows_from(lines, build(), **LIMITS)
    assert isinstance(expected, list)
    data = datasets.Dataset.from_list(lines)
    data.to_parquet(tmp_path / "rows.parquet", batch_size=8)
    data.to_csv(tmp_path / "rows.csv")
    data.save_to_disk(tmp_path / "folder")
    with_numbers = data.with_format("numpy")
    several = [write(tmp_path, lines), str(tmp_path / "rows.parquet"), tmp_path / "rows.csv", tmp_path / "folder"]
    for given in (*several, data, with_numbers):
        found, told = rows_from(given, build(), **LIMITS)
        assert isinstance(found, StoredRows) and found == expected and told == report
    monkeypatch.setattr(rows, "IN_MEMORY_ROWS", 20)
    for given in (lines, tuple(lines)):
        found, told = rows_from(given, build(), **LIMITS)
        assert isinstance(found, StoredRows) and found == expected and told == report
    ready, _ = rows_from(expected, build(), **LIMITS)
    assert ready == expected and isinstance(ready, list)


@pytest.mark.slow
def test_another_data_set_is_no_old_one(tmp_path: Path) -> None:
    first = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])
    second = datasets.Dataset.from_list([{"prompt": "a", "response": "c"}])
    assert rows_from(first, build(), **LIMITS)[0] != rows_from(second, build(), **LIMITS)[0]
    shouted = first.with_transform(lambda batch: {**batch, "response": ["c"]})
    assert rows_from(shouted, build(), **LIMITS)[0] == rows_from(second, build(), **LIMITS)[0]


# processes --------------------------------------------------------------------------------------------------------


def test_results_are_in_order_and_errors_too() -> None:
    assert list(workers.in_order(lambda n: n * n, range(5), 1)) == [0, 1, 4, 9, 16]


@pytest.mark.slow
def test_several_processes() -> None:
    def work(number: int) -> int:
        if number == 7:
            raise DrklError("seven")
        if number == 99:
            import os

            os._exit(9)
        return number * number

    assert list(workers.in_order(work, range(7), 2)) == [n * n for n in range(7)]
    found: list[int] = []
    with pytest.raises(DrklError, match="seven"):
        found.extend(workers.in_order(work, range(12), 2))
    with pytest.raises(workers.WorkerEnded, match=r"ended from outside, most often because memory ran out"):
        list(workers.in_order(work, [1, 99, 2], 2))

    def tasks() -> Any:
        yield from range(3)
        raise DrklError("the source")

    results = workers.in_order(work, tasks(), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(DrklError, match="the source"):
        next(results)
