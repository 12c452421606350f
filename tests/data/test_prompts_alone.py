"""Prompts without responses: rows where a model answers every one of them, refused by name anywhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from drkl.data import DataConfig
from drkl.data.examples import hold_out, load_examples, parse_rows
from drkl.data.rows import rows_from
from drkl.data.survey import survey
from drkl.data.template import encode_prompt
from drkl.data.tokenize import Row, tokenize_examples
from drkl.errors import DrklError
from tests.data.test_seq2seq import like_t5
from tests.data.tiny_tokenizers import CHATML, build

ASK: dict[str, Any] = {"role": "user", "content": "a"}
SAY: dict[str, Any] = {"role": "assistant", "content": "b"}
SYSTEM: dict[str, Any] = {"role": "system", "content": "c"}
CALL: dict[str, Any] = {"function": {"name": "f", "arguments": {}}}
LIMITS: dict[str, int] = {"max_prompt_tokens": 60, "max_tokens": 90}


def said(row: dict[str, Any], row_format: str = "auto") -> list[tuple[str, str]]:
    """Roles and texts of a row that needs no response."""
    (example,) = parse_rows([("rows, row 1", row)], "rows", row_format, needs_responses=False)
    return [(message["role"], message["content"]) for message in example.messages]


ALONE = [("user", "a"), ("assistant", "")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a"},
        {"prompt": [ASK]},
        {"prompt": json.dumps([ASK])},
        {"prompt": json.dumps([ASK]), "response": ""},
        {"prompt": "a", "response": None},
        {"prompt": "a", "completion": ""},
        {"prompt": [ASK], "completion": None},
        {"prompt": [ASK], "completion": []},
        {"prompt": "a", "answer": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "reasoning": "b"},
        {"messages": [ASK]},
        {"messages": [ASK, {**SAY, "content": ""}]},
        {"messages": [ASK, {**SAY, "content": None}]},
        {"messages": [ASK, {"role": "assistant", "content": None, "reasoning_content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]},
        {"instruction": "a"},
        {"instruction": "a", "input": "", "output": None},
        {"question": "a"},
        {"query": "a"},
        {"problem": "a"},
        {"document": "a", "summary": None},
        {"dialogue": "a"},
        {"input": "a"},
    ],
)
def test_a_prompt_alone_is_a_row_in_every_shape(row: dict[str, Any]) -> None:
    assert said(row) == ALONE
    tokenizer = build()
    (made,), report = rows_from([row], tokenizer, needs_responses=False, **LIMITS)
    assert isinstance(made, Row) and made.response_ids == () and made.num_trained == 0 and report.prompts_alone == 1
    assert made.prompt_ids == made.sampling_ids == tuple(encode_prompt(tokenizer, [ASK]))
    with pytest.raises(
        DrklError, match=r"prompt alone|last message|null|empty response|preference|expected the fields"
    ):
        rows_from([row], tokenizer, **LIMITS)


def test_what_stands_beside_a_prompt_alone_is_read() -> None:
    assert said({"instruction": "a", "input": "b"})[0] == ("user", "a\n\nb")
    assert said({"instruction": "a", "context": "b", "response": ""})[0] == ("user", "a\n\nb")
    assert said({"prompt": "a", "system": "c"}) == [("system", "c"), *ALONE]
    assert said({"prompt": "a", "history": [["h", "r"]]}) == [("user", "h"), ("assistant", "r"), *ALONE]
    assert said({"messages": [ASK, SAY, ASK]}) == [("user", "a"), ("assistant", "b"), *ALONE]
    tool = {"role": "tool", "content": "t"}
    assert said({"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}, tool]})[2:] == [("tool", "t"), ALONE[1]]
    (example,) = parse_rows([("", {"prompt": "a", "references": ["b"]})], "", needs_responses=False)
    assert example.all_references == ("b",)


def test_a_response_that_is_there_is_kept() -> None:
    whole = [("user", "a"), ("assistant", "b")]
    for row in (
        {"prompt": "a", "response": "b"},
        {"messages": [ASK, SAY]},
        {"question": "a", "answer": "b"},
        {"problem": "a", "solution": "b"},
        {"instruction": "a", "output": "b"},
        {"text": "a", "label": "b"},
    ):
        assert said(row) == whole
    (example,) = parse_rows(
        [("", {"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}]})], "", needs_responses=False
    )
    assert not example.is_prompt_alone


@pytest.mark.parametrize("row_format", ["prompt_response", "prompt_completion", "instruction"])
def test_a_format_may_be_demanded(row_format: str) -> None:
    assert said({"prompt": "a", "text": "b"}, row_format) == ALONE
    assert said({"prompt": "a", "completion": None, "messages": [SAY]}, row_format) == ALONE
    assert said({"prompt": [ASK]}, "messages") == said({"messages": [ASK], "prompt": "b"}, "messages") == ALONE


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "context": "b"}, "row 1: question may be the prompt, or a part of it beside context. Write"),
        ({"question": "a", "choices": ["b"]}, "a part of it beside choices"),
        ({"question": "a", "document": "b"}, "question may be the prompt, or a part of it beside document"),
        ({"instruction": "a", "prompt": "b"}, "two shapes: prompt alone, and instruction alone"),
        ({"prompt": [ASK, SAY]}, "the prompt ends with a message of the assistant's; it must end with the user's"),
        ({"prompt": [ASK, SAY], "completion": None}, "the prompt ends with a message of the assistant's"),
        ({"messages": [SYSTEM]}, "role 'system'; it must be .* or the user's .*, which the student answers"),
        ({"messages": [SAY]}, "has the role 'assistant', expected 'user'"),
        ({"prompt": None}, "prompt must be text; found null"),
        ({"prompt": None, "response": "b"}, "prompt must be text; found null"),
        ({"prompt": 5}, "prompt must be text; found a number"),
        ({"answer": "b"}, r"or conversations \(the prompt alone is enough\); found answer\."),
        ({"Prompt": "a"}, "Column names are read as they are written"),
        ({"chosen": "a", "rejected": "b"}, "preference training"),
        ({"prompt": "a", "image": b"x"}, "the column 'image' is not supported"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        said(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"data.jsonl:2: .* found prompt. A prompt alone is enough only .* rollouts.share: 1 \(in "
         r"Python rollout_share=1\)\. Else add a column response"),
        ({"messages": [ASK]}, r"data.jsonl:2: the last message has the role 'user'.* rollouts.share: 1"),
        ({"prompt": "a", "response": None}, "data.jsonl:2: response must be text; found null.* rollouts.share: 1"),
    ],
)  # fmt: skip
def test_where_responses_are_needed_the_row_and_the_way_out_are_named(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"prompt": "a", "response": "b"}, row)))
    with pytest.raises(DrklError, match=message):
        load_examples(DataConfig(path=str(path), eval_path="none"))


def test_all_responses_empty_names_the_way_out() -> None:
    with pytest.raises(DrklError, match=r"2 empty response. .* none is needed: rollouts.share: 1"):
        rows_from([{"prompt": "a", "response": ""}] * 2, build(), **LIMITS)


def test_some_rows_may_have_a_response() -> None:
    rows, report = rows_from(
        [{"prompt": "a", "response": "b"}, {"prompt": "c"}, {"prompt": "d", "response": ""}, {"prompt": " "}],
        build(), needs_responses=False, **LIMITS,
    )  # fmt: skip
    assert [len(row.response_ids) > 0 for row in rows if isinstance(row, Row)] == [True, False, False]
    assert (report.kept, report.prompts_alone, report.dropped) == (3, 2, {"empty_prompt": 1})
    assert report.summary() == "3 of 4 rows kept, 2 of them without a response, 1 dropped (empty prompt)."


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": word, "response": "b" if word == "d" else None} for word in "acd"]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind in ("csv", "tsv"):
        mark = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text(
            "\n".join(
                mark.join(row[name] or "" for name in row) for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]
            )
        )
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    config = DataConfig(path=str(path), eval_path="none")
    train, _ = load_examples(config, needs_responses=False)
    assert [(example.prompt_text, example.response) for example in train] == [("a", ""), ("c", ""), ("d", "b")]


def test_data_sets_in_memory() -> None:
    data = datasets.Dataset.from_list([{"prompt": [ASK]}, {"prompt": [SYSTEM, ASK]}])
    rows, _ = rows_from(data, build(), needs_responses=False, **LIMITS)
    assert [len(row.all_ids) > 0 and not row.response_ids for row in rows if isinstance(row, Row)] == [True, True]


def test_the_whole_prompt_is_written_whatever_the_turns() -> None:
    tokenizer = build()
    row = {"messages": [SYSTEM, ASK, SAY, ASK]}
    for turns in ("last", "all"):
        (made,), _ = rows_from([row], tokenizer, needs_responses=False, turns=turns, **LIMITS)
        assert isinstance(made, Row)
        assert made.prompt_ids == tuple(encode_prompt(tokenizer, row["messages"]))
        assert made.response_ids == () and made.trained is None
    (plain,), _ = rows_from([{"prompt": "a b"}], tokenizer, needs_responses=False, template="plain", **LIMITS)
    assert isinstance(plain, Row)
    assert plain.prompt_ids == tuple(encode_prompt(tokenizer, [{"role": "user", "content": "a b"}], "plain"))


def test_a_template_that_writes_no_empty_answer_is_not_asked_for_one() -> None:
    strict = CHATML.replace(
        "{{ '<|im_start|>'",
        "{% if not message['content'] %}{{ raise_exception('empty') }}{% endif %}{{ '<|im_start|>'", 1,
    )  # fmt: skip
    (made,), _ = rows_from([{"messages": [SYSTEM, ASK]}], build(strict), needs_responses=False, **LIMITS)
    assert isinstance(made, Row) and made.response_ids == ()
    deaf = CHATML.replace("message['content']", "('x' if message['role'] == 'system' else message['content'])")
    with pytest.raises(DrklError, match="leaves out messages of the role 'system'"):
        rows_from([{"messages": [SYSTEM, ASK]}], build(deaf), needs_responses=False, **LIMITS)
    silent = CHATML.replace("message['content']", "('x' if message['role'] == 'user' else message['content'])")
    with pytest.raises(DrklError, match="leaves out what the user says"):
        rows_from([{"prompt": "hello"}], build(silent), needs_responses=False, **LIMITS)


def test_long_prompts_are_dropped_and_counted() -> None:
    rows = [{"prompt": "a"}, {"prompt": " ".join("abcd" * 20)}]
    kept, report = rows_from(rows, build(), needs_responses=False, **LIMITS)
    assert len(kept) == 1 and report.dropped == {"prompt_too_long": 1}
    with pytest.raises(DrklError, match="The shortest prompt has 167 tokens"):
        rows_from(rows[1:], build(), needs_responses=False, **LIMITS)


def test_an_encoder_reads_a_prompt_alone() -> None:
    tokenizer = like_t5()
    (made,), _ = rows_from([{"prompt": "a b"}], tokenizer, needs_responses=False, encoder_decoder=True, **LIMITS)
    assert isinstance(made, Row) and made.encoder_decoder and made.response_ids == ()
    assert made.prompt_ids == tuple(tokenizer("a b")["input_ids"]) and made.length == len(made.prompt_ids)


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_tokenised_prompts(encoder_decoder: bool) -> None:
    kind: dict[str, Any] = {"encoder_decoder": encoder_decoder, **LIMITS}
    labels = [12, 2] if encoder_decoder else [-100, 12, 2]
    data = [
        {"input_ids": [10, 11]},
        {"input_ids": np.array([0, 10]), "attention_mask": [0, 1], "labels": None},
        {"input_ids": [10] if encoder_decoder else [10, 12, 2], "labels": labels},
        {"input_ids": []},
    ]
    rows, report = rows_from(data, build(), needs_responses=False, **kind)
    found = [(row.prompt_ids, row.response_ids) for row in rows if isinstance(row, Row)]
    assert found == [((10, 11), ()), ((10,), ()), ((10,), (12, 2))]
    assert report.dropped == {"empty_prompt": 1} and report.prompts_alone == 2
    with pytest.raises(DrklError, match=r"row 1: expected input_ids and labels; .* none is needed: rollouts.share: 1"):
        rows_from(data, build(), **kind)


def test_rows_that_are_ready() -> None:
    ready = [Row("x", (10,), (), parse_rows([("", {"prompt": "a"})], "", needs_responses=False)[0])]
    assert rows_from(ready, build(), needs_responses=False)[0] == ready
    with pytest.raises(DrklError, match=r"train_dataset: the row 'x' has no response. .* rollouts.share: 1"):
        rows_from(ready, build())


def test_prompts_alone_are_held_out_by_their_prompt() -> None:
    rows = [{"prompt": f"{word} {number // 2}"} for number, word in enumerate("ab" * 30)]
    train, held = hold_out(parse_rows([(str(i), row) for i, row in enumerate(rows)], "", needs_responses=False))
    assert len(held) == 3 and len(train) == 57
    assert not {example.prompt_text for example in train} & {example.prompt_text for example in held}


def test_the_survey_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"a {word}"} for word in "abcd"] + [{"prompt": "b", "response": "c"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(path=str(path), eval_path="none", **LIMITS)
    (part,) = survey(config, build(), needs_responses=False)
    facts = dict(part.facts)
    assert facts["rows without a response"] == "4" and part.lengths["trained"] == [2]
    assert [name for name, _ in part.facts].count("format") == 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    (part,) = survey(config, build(), needs_responses=False)
    assert part.lengths.keys() == {"prompt"}
    with pytest.raises(DrklError, match=r"data.jsonl:1: .* rollouts.share: 1"):
        survey(config, build())


def test_a_reply_that_is_not_learnt_may_be_missing() -> None:
    (example,) = parse_rows([("", {"prompt": [ASK, SAY, ASK]})], "", needs_responses=False)
    assert example.unlearnt == (1,)
    (row,), _ = tokenize_examples([example], build(), needs_responses=False, **LIMITS)
    assert row.response_ids == ()
