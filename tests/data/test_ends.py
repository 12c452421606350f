"""What ends a turn, for templates in the published form of their families, against tokens written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from drkl.data import Example
from drkl.data.ends import as_ids, end_positions, opening_tag, special_tokens, taught_ends
from drkl.data.template import encode_prompt, encode_response, encode_turns, stop_token_ids
from drkl.data.tokenize import Row, tokenize_examples
from tests.data.tiny_tokenizers import CHATML, LLAMA2, build

ROLE = "message['role']"
LOOP = "{% for message in messages %}"


def template(turn: str, prompt: str, last: str = "") -> str:
    """A template that writes ``turn`` for each message, then ``prompt`` where an answer is asked for, else ``last``."""
    return f"{LOOP}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% else %}}{last}{{% endif %}}"


PHI3 = template("<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n", "<|assistant|>\n", "{{ eos_token }}")
PHI4_MINI = template("<|{{ message['role'] }}|>{{ message['content'] }}<|end|>", "<|assistant|>", "{{ eos_token }}")
GLM4 = "<sop>" + template("<|{{ message['role'] }}|>\n{{ message['content'] }}", "<|assistant|>")
MINITRON = template("<|{{ message['role'] }}|>\n{{ message['content'] }}\n", "<|assistant|>\n")
GEMMA = "{{ bos_token }}" + template(
    "<start_of_turn>{{ message['role'] }}\n{{ message['content'] | trim }}<end_of_turn>\n", "<start_of_turn>assistant\n"
)
COMMAND_R = "{{ bos_token }}" + template(
    "<start_of_turn><|{{ message['role'] }}|>{{ message['content'] }}<end_of_turn>", "<start_of_turn><|assistant|>"
)
COMMAND_R7B = (
    f"{LOOP}<start_of_turn><|{{{{ {ROLE} }}}}|>{{% if {ROLE} == 'assistant' %}}<start>{{{{ message['content'] }}}}<end>"
    "{% else %}{{ message['content'] }}{% endif %}<end_of_turn>{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn><|assistant|>{% endif %}"
)
DEEPSEEK = (
    f"{LOOP}{{% if {ROLE} == 'user' %}}<|user|>{{{{ message['content'] }}}}"
    "{% else %}<|assistant|>{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GPT_OSS = (
    f"{LOOP}<start>{{{{ {ROLE} }}}}{{% if {ROLE} == 'assistant' %}}<channel>{{% endif %}}<|message|>"
    f"{{{{ message['content'] }}}}{{% if {ROLE} == 'assistant' and loop.last %}}<|return|>{{% else %}}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<start>assistant{% endif %}"
)
EOS_BETWEEN = (
    f"{LOOP}<|{{{{ {ROLE} }}}}|>{{{{ message['content'] }}}}"
    f"{{% if {ROLE} == 'assistant' and not loop.last %}}{{{{ eos_token }}}}{{% endif %}}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EOS_OF_THE_WHOLE = template("<|{{ message['role'] }}|>{{ message['content'] }}\n", "<|assistant|>", "{{ eos_token }}")
MORE = (
    "<|user|>", "<|assistant|>", "<|observation|>", "<|end|>", "<|return|>", "<|message|>", "<start_of_turn>",
    "<end_of_turn>", "<start>", "<end>", "<channel>", "<sop>",
)  # fmt: skip
LISTED = ("<|user|>", "<|observation|>")  # as GLM-4's generation_config has them

# Template, eos, what the settings list, what ends a reply, and the tokens of that end.
KINDS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "chatml": (CHATML, "<|im_end|>", (), "<|im_end|>"),
    "chatml, another eos": (CHATML, "</s>", (), "<|im_end|>"),
    "llama 2": (LLAMA2, "</s>", (), " ·</s>"),
    "phi 3": (PHI3, "</s>", (), "<|end|>"),
    "phi 4 mini": (PHI4_MINI, "</s>", (), "<|end|>"),
    "gemma": (GEMMA, "</s>", (), "<end_of_turn>"),
    "command r": (COMMAND_R, "<end_of_turn>", (), "<end_of_turn>"),
    "command r7b": (COMMAND_R7B, "<end_of_turn>", (), "<end>·<end_of_turn>"),
    "deepseek": (DEEPSEEK, "</s>", (), "</s>"),
    "gpt-oss": (GPT_OSS, "<|return|>", (), "<|return|>"),
    "glm 4": (GLM4, "</s>", LISTED, "<|user|>"),
    "glm 4, unlisted": (GLM4, "</s>", (), "</s>"),
    "minitron": (MINITRON, "</s>", ("<|user|>",), "\n·<|user|>"),
    "minitron, unlisted": (MINITRON, "</s>", (), "</s>"),
    "eos between turns": (EOS_BETWEEN, "</s>", LISTED, "</s>"),
    "eos after the whole": (EOS_OF_THE_WHOLE, "</s>", LISTED, "\n·</s>"),
}
BEGIN = {
    "llama 2": [" "], "command r7b": ["<start>"], "gpt-oss": ["<channel>", "<|message|>"], "glm 4": ["\n"],
    "glm 4, unlisted": ["\n"],
}  # fmt: skip
"""What a template writes between its prompt and the reply: the model's to write."""
TURNS = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
)


def made(name: str) -> tuple[Any, list[int]]:
    """The tokenizer of a kind, and the ids that its settings list."""
    chat, eos, listed, _ = KINDS[name]
    tokenizer = build(chat, eos=eos if eos in ("</s>", "<|im_end|>") else "</s>")
    tokenizer.add_tokens(list(MORE), special_tokens=True)
    tokenizer.eos_token = eos
    return tokenizer, tokenizer.convert_tokens_to_ids(list(listed))


@pytest.mark.parametrize("name", KINDS)
def test_a_reply_ends_as_the_template_ends_it(name: str) -> None:
    tokenizer, listed = made(name)
    end = KINDS[name][3].split("·")
    ids = encode_response(tokenizer, TURNS, ends=listed)
    assert tokenizer.convert_ids_to_tokens(ids) == [*BEGIN.get(name, []), "b", *end]
    # The ids are the beginning of what the template writes, or of what it writes before a next turn.
    ours = encode_prompt(tokenizer, TURNS[:3]) + ids
    whole = [tokenizer.apply_chat_template([*TURNS, *more])["input_ids"] for more in ([], [dict(TURNS[0])])]
    assert ours in [ids[: len(ours)] for ids in whole] or name.endswith("unlisted")


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_stops_there_at_eos_and_at_what_is_listed(name: str) -> None:
    tokenizer, listed = made(name)
    _, eos, also, end = KINDS[name]
    found = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer, ends=listed))
    assert found[0] == eos and len(found) == len(set(found))
    assert set(found) == {eos, end.split("·")[-1], *also}


@pytest.mark.parametrize("name", [kind for kind in KINDS if kind not in ("gpt-oss", "eos after the whole")])
def test_every_turn_of_a_conversation_ends_so(name: str) -> None:
    tokenizer, listed = made(name)
    ids, spans, _ = encode_turns(tokenizer, TURNS, ends=listed)
    end = KINDS[name][3].split("·")
    replies = [tokenizer.convert_ids_to_tokens(ids[start:stop]) for start, stop in spans]
    assert [reply[-len(end) :] for reply in replies] == [end, end]
    for count, (start, stop) in zip((2, 4), spans, strict=True):
        assert ids[start:stop] == encode_response(tokenizer, TURNS[:count], ends=listed)
    text = tokenizer.apply_chat_template([*TURNS, dict(TURNS[0])])["input_ids"]
    assert ids == text[: len(ids)] or name.endswith("unlisted")


def test_phi_3_with_all_turns_by_hand() -> None:
    tokenizer, _ = made("phi 3")
    (row,), _ = tokenize_examples([Example("x", TURNS)], tokenizer, max_prompt_tokens=20, max_tokens=40, turns="all")
    trained = tokenizer.convert_ids_to_tokens(list(row.trained_ids))
    assert trained == ["hello", "<|end|>", "b", "<|end|>"]
    assert end_positions(row) == [1, 3] and taught_ends([row], tokenizer) == [row.response_ids[-1]]


@pytest.mark.parametrize("template", ["alpaca", "minillm", "plain", "{{ prompt }}:"])
def test_templates_that_are_no_chat_template_teach_eos(template: str) -> None:
    tokenizer = build(CHATML, eos="</s>")
    eos = tokenizer.eos_token_id
    assert encode_response(tokenizer, TURNS[:2], template)[-1] == eos
    # An instruct model may end as in its chat all the same.
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer, template)) == ["</s>", "<|im_end|>"]
    assert stop_token_ids(build(None, eos="</s>"), template, [3]) == [eos, 3]


def test_a_chat_template_that_fails_is_nothing_to_the_others() -> None:
    tokenizer = build("{{ raise_exception('no') }}", eos="</s>")
    assert stop_token_ids(tokenizer, "plain") == [tokenizer.eos_token_id]


def test_a_template_that_wants_a_system_message_first_has_stops() -> None:
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML
    tokenizer = build(strict, eos="</s>")
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == ["</s>", "<|im_end|>"]


def test_an_added_token_that_is_not_special_ends_a_turn_where_no_special_one_does() -> None:
    tokenizer = build(CHATML.replace("<|im_end|>", "<stop>"), eos="</s>")
    tokenizer.add_tokens(["<stop>"])
    assert tokenizer.convert_ids_to_tokens(encode_response(tokenizer, TURNS[:2])) == ["hello", "<stop>"]


def test_ids_of_a_setting() -> None:
    assert [as_ids(value) for value in (None, 0, [2, -1, 5], -1)] == [[], [0], [2, 5], []]
    tokenizer = build(CHATML, eos=None)
    assert special_tokens(tokenizer)["<|im_end|>"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "hi" not in special_tokens(tokenizer)
    assert opening_tag(tokenizer, "\n</s>a", [2]) == "\n</s>" and opening_tag(tokenizer, "a</s>", [2]) == ""


def test_ends_that_are_taught_are_those_of_whole_turns() -> None:
    tokenizer = build(CHATML, eos="</s>")
    eos, stop, word = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "a"])
    example = Example("x", TURNS)

    def row(*ids: int, trained: tuple[bool, ...] | None = None) -> Row:
        return Row("x", (word,), ids, example, trained)

    assert taught_ends([row(word, stop), row(word, word)], tokenizer) == [stop]  # the second was cut
    assert taught_ends([row(word, word)], tokenizer) == []
    assert taught_ends([*[row(word, stop)] * 3, row(word, eos)], tokenizer) == [stop, eos]
    assert taught_ends([*[row(word, stop)] * 30, row(word, eos)], tokenizer) == [stop]  # cut at a token in the text
    marks = (True, True, False, True, True)
    assert end_positions(row(word, stop, word, word, eos, trained=marks)) == [1, 3]
    assert taught_ends([row(word, stop, word, word, eos, trained=marks)], tokenizer) == [stop, eos]
