from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drkl.data import DataConfig, Example, load_examples
from drkl.data.examples import hold_out, parse_rows, read_examples
from drkl.errors import DrklError


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def messages(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]}


def example(row_id: str, prompt: str) -> Example:
    return Example(row_id, ({"role": "user", "content": prompt}, {"role": "assistant", "content": "x"}))


def test_prompt_and_response(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "response": "r", "id": 7, "category": "ignored"})
    (row,) = read_examples(path)
    assert row.id == "7"
    assert row.messages == ({"role": "user", "content": "p"}, {"role": "assistant", "content": "r"})
    assert (row.prompt_messages, row.response, row.prompt_text) == (row.messages[:1], "r", "p")


def test_messages(tmp_path: Path) -> None:
    (row,) = read_examples(write(tmp_path / "a.jsonl", messages("system", "user", "assistant", "user", "assistant")))
    assert [message["role"] for message in row.prompt_messages] == ["system", "user", "assistant", "user"]
    assert (row.prompt_text, row.response) == ("user 3", "assistant 4")


def test_the_format_says_which_of_two_shapes_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "response": "r", **messages("user", "assistant")})
    with pytest.raises(DrklError, match=r"a\.jsonl:1: the columns fit two shapes: messages \(OpenAI\), and prompt and"):
        read_examples(path)
    assert read_examples(path, "messages")[0].prompt_text == "user 0"
    assert read_examples(path, "prompt_response")[0].prompt_text == "p"


def test_absent_ids_are_row_numbers_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt":"p","response":"r"}\n\n  \n{"prompt":"p","response":"r","id":null}', encoding="utf-8")
    assert [row.id for row in read_examples(str(path))] == ["row-1", "row-2"]


def test_byte_order_mark_crlf_and_odd_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"prompt":"p\u2028q","response":"r\u0085s"}\r\n{"prompt":"p","response":"r"}\r\n'.encode())
    first, second = read_examples(str(path))
    assert (first.prompt_text, first.response, second.response) == ("p\u2028q", "r\u0085s", "r")


GOOD = '{"prompt": "p", "response": "r"}\n'


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ("{", r":2: not valid JSON: .* \(column 2\)"),
        ("[" * 200_000, ":2: not valid JSON"),
        ("[1]", ":2: expected an object with prompt and response, or messages; found a list"),
        ("3", ":2: expected an object .*; found a number"),
        (
            '{"prompt": "p", "answer": "r"}',
            ":2: expected the fields prompt and response, or messages, or text .*; found prompt, answer",
        ),
        ("{}", ":2: expected the fields .*; found no fields"),
        ('{"prompt": "p", "response": null}', ":2: response must be text; found null"),
        ('{"prompt": 3, "response": "r"}', ":2: prompt must be text; found a number"),
        ('{"prompt": "p", "response": "\\ud83d"}', ":2: response has half a surrogate pair at character 0"),
        ('{"prompt": "p", "response": "r", "id": true}', ":2: id must be text or a whole number; found True"),
        (
            '{"prompt": "p", "response": "r", "id": "a"}\n{"prompt": "p", "response": "r", "id": "a"}',
            r":3: the id 'a' was seen before, at .*:2; ids must be unique",
        ),
        ('{"messages": []}', r":2: messages must be a list of \{role, content\} objects; found an empty list"),
        ('{"messages": {"role": "user"}}', ":2: messages must be a list .*; found an object"),
        ('{"messages": ["hi"]}', r":2: messages\[0\] must have role and content; found text"),
        ('{"messages": [{"role": "user"}]}', r":2: messages\[0\] must have role and content; found role"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', r":2: messages\[0\].content must be text; found a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second_line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + second_line + "\n", encoding="utf-8")
    with pytest.raises(DrklError, match="rows.jsonl" + message):
        read_examples(str(path))


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["user"], "the last message has the role 'user'; it must be the assistant's"),
        (["system"], "the last message has the role 'system'; it must be the assistant's"),
        (["user", "assistant", "user"], "the last message has the role 'user'"),
        (["assistant"], r"messages\[0\] has the role 'assistant', expected 'user'"),
        (["system", "assistant"], r"messages\[1\] has the role 'assistant', expected 'user'"),
        (["user", "user", "assistant"], r"messages\[1\] has the role 'user', expected 'assistant'"),
        (["user", "system", "assistant"], r"messages\[1\] has the role 'system', expected 'assistant'"),
        (["human", "gpt"], r"messages\[0\] has the role 'human', expected 'user'"),
    ],
)
def test_roles_take_turns(tmp_path: Path, roles: list[str], message: str) -> None:
    with pytest.raises(DrklError, match="a.jsonl:1: " + message):
        read_examples(write(tmp_path / "a.jsonl", messages(*roles)))


def test_the_format_can_be_demanded(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r":1: expected the field messages; found prompt, response\."):
        read_examples(write(tmp_path / "a.jsonl", {"prompt": "p", "response": "r"}), "messages")
    with pytest.raises(DrklError, match=r":1: expected the fields prompt and response; found messages\."):
        read_examples(write(tmp_path / "b.jsonl", messages("user", "assistant")), "prompt_response")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"There is no file .*none\.jsonl"):
        read_examples(str(tmp_path / "none.jsonl"))
    with pytest.raises(DrklError, match=r"Cannot read .*Is a directory"):
        read_examples(str(tmp_path))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(DrklError, match=r"latin\.jsonl' is not UTF-8 text \(byte 15\)"):
        read_examples(str(tmp_path / "latin.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DrklError, match=r"empty\.jsonl has no rows; expected some, with prompt and response"):
        read_examples(str(tmp_path / "empty.jsonl"))
    with pytest.raises(DrklError, match=r"There is no bundled data 'bundled:doly'.*Did you mean 'bundled:dolly'"):
        read_examples("bundled:doly")


def test_an_eval_path_is_the_held_out_set(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", {"prompt": "p", "response": "r"})
    held_out = write(tmp_path / "eval.jsonl", {"prompt": "q", "response": "r"})
    rows, held = load_examples(DataConfig(path=train, eval_path=held_out))
    assert ([row.prompt_text for row in rows], [row.prompt_text for row in held]) == (["p"], ["q"])


@pytest.mark.parametrize(("count", "held"), [(2, 1), (10, 1), (200, 10), (2500, 100)])
def test_without_one_five_percent_are_held_out(tmp_path: Path, count: int, held: int) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": f"p{i}", "response": "r", "id": f"id{i}"} for i in range(count)))
    train, held_out = load_examples(DataConfig(path=path))
    assert (len(train), len(held_out)) == (count - held, held)
    assert {row.id for row in train} | {row.id for row in held_out} == {f"id{i}" for i in range(count)}
    assert [int(row.id[2:]) for row in train] == sorted(int(row.id[2:]) for row in train)


def test_the_held_out_rows_do_not_depend_on_the_order_of_the_file() -> None:
    rows = [example(f"id{i}", f"p{i}") for i in range(100)]
    assert {e.id for e in hold_out(rows)[1]} == {e.id for e in hold_out(rows[::-1])[1]}


def test_max_rows_takes_the_first_and_leaves_the_held_out_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"id": "r{i}", "prompt": "p{i}", "response": "x"}}\n' for i in range(60)))
    whole, held_out = load_examples(DataConfig(path=str(path)))
    few, same = load_examples(DataConfig(path=str(path), max_rows=7))
    assert few == whole[:7] and same == held_out
    few, same = load_examples(DataConfig(path=str(path), eval_path=str(path), max_rows=7))
    assert [example.id for example in few] == [f"r{i}" for i in range(7)] and len(same) == 60
    assert len(load_examples(DataConfig(path=str(path), max_rows=1000))[0]) == len(whole)


def test_of_an_eval_path_some_rows_can_be_enough(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"id": f"r{i}", "prompt": f"p{i}", "response": "r"} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("\n".join(map(json.dumps, reversed(rows))))

    def ids(file: Path, count: int) -> list[str]:
        config = DataConfig(path=str(path), eval_path=str(file), eval_max_rows=count)
        return [example.id for example in load_examples(config)[1]]

    few = ids(path, 6)
    assert len(few) == 6 and few == sorted(few, key=lambda name: int(name[1:])) and few != [f"r{i}" for i in range(6)]
    assert ids(backwards, 6) == few[::-1] and set(few) < set(ids(path, 12)) and len(ids(path, 99)) == 40


def test_rows_of_one_prompt_stay_on_one_side() -> None:
    rows = [example(f"id{i}", f"p{i % 50}") for i in range(200)]
    train, held_out = hold_out(rows)
    assert 1 <= len(held_out) <= 10
    assert {e.prompt_text for e in train}.isdisjoint(e.prompt_text for e in held_out)
    train, held_out = hold_out([example(f"id{i}", "p" if i < 3 else "q") for i in range(10)])
    assert (len(train), len(held_out)) == (7, 3)


@pytest.mark.parametrize("rows", [[example("a", "p")], [example("a", "p"), example("b", "p")]])
def test_too_little_to_split(rows: list[Example]) -> None:
    with pytest.raises(DrklError, match=r"row\(s\) with 1 different prompt\(s\) cannot be split .* set data.eval_path"):
        hold_out(rows)


def test_empty_prompts_and_responses_are_left_for_the_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "", "response": "r"}, {"prompt": "p", "response": " "})
    assert len(read_examples(path)) == 2


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_cache")
def test_a_local_data_set_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", *({"prompt": f"p{i}", "response": "r"} for i in range(3)))
    train, held_out = load_examples(DataConfig(dataset=str(tmp_path / "folder")))
    assert sorted(row.id for row in train + held_out) == ["row-1", "row-2", "row-3"]


@pytest.mark.usefixtures("no_cache")
def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([messages("user", "assistant"), messages("system", "user", "assistant")])
    rows.save_to_disk(tmp_path / "flat")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "split")
    for name in ("flat", "split"):
        train, held_out = load_examples(DataConfig(dataset=str(tmp_path / name)))
        assert (len(train), len(held_out)) == (1, 1)


@pytest.mark.usefixtures("no_cache")
def test_a_data_set_that_is_nowhere() -> None:
    with pytest.raises(DrklError) as caught:
        load_examples(DataConfig(dataset="nobody/nothing:small"))
    message = str(caught.value)
    assert message.startswith(
        "Cannot load the data set 'nobody/nothing' (config small, split 'train'); looked at: no local folder"
    )
    assert "then the hub" in message and "data.path needs no hub" in message


def test_a_data_set_row_is_named() -> None:
    with pytest.raises(DrklError, match="id, row 2: expected the fields"):
        parse_rows([("id, row 1", {"prompt": "p", "response": "r"}), ("id, row 2", {"prompt": "p", "text": "t"})], "id")
