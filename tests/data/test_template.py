from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drkl.data.template import encode_prompt, encode_response, stop_token_ids
from drkl.errors import DrklError
from tests.data.tiny_tokenizers import CHATML, LLAMA2, build


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def full_ids(tokenizer, messages) -> list[int]:  # type: ignore[no-untyped-def]
    return tokenizer.apply_chat_template(messages)["input_ids"]


def tokens(tokenizer, ids: list[int]) -> list[str]:  # type: ignore[no-untyped-def]
    return tokenizer.convert_ids_to_tokens(ids)


def test_chatml_by_hand() -> None:
    tokenizer = build(CHATML)
    messages = turns("hi there", "hello")
    assert tokens(tokenizer, encode_prompt(tokenizer, messages[:1])) == [
        *("<|im_start|>", "user", "\n", "hi", " ", "there", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")
    ]
    # The newline after <|im_end|> is not the assistant's to write.
    assert tokens(tokenizer, encode_response(tokenizer, messages)) == ["hello", "<|im_end|>"]


def test_llama2_by_hand() -> None:
    tokenizer = build(LLAMA2, eos="</s>")
    messages = turns("hi", "hello")
    prompt, response = encode_prompt(tokenizer, messages[:1]), encode_response(tokenizer, messages)
    assert tokens(tokenizer, prompt) == ["<s>", "[", "INST", "]", " ", "hi", " ", "[", "/", "INST", "]"]
    assert tokens(tokenizer, response) == [" ", "hello", " ", "</s>"]
    assert prompt + response == full_ids(tokenizer, messages)


@given(
    texts=st.lists(st.text("abc. #\n", min_size=1).map(lambda text: f"a{text}"), min_size=1, max_size=3),
    answer=st.text("abc. #\n").map(lambda text: f"b{text}"),
    system=st.none() | st.just("a b"),
)
def test_ids_are_those_of_the_whole_conversation(texts: list[str], answer: str, system: str | None) -> None:
    texts = texts if len(texts) % 2 else texts[1:]
    tokenizer = build(CHATML)
    messages = turns(*texts, answer, system=system)
    ours = encode_prompt(tokenizer, messages[:-1]) + encode_response(tokenizer, messages)
    assert [*ours, tokenizer.convert_tokens_to_ids("\n")] == full_ids(tokenizer, messages)


def test_a_response_that_would_merge_into_the_prompt_is_encoded_apart() -> None:
    tokenizer = build(CHATML)
    messages = turns("hi", " hello")
    prompt = encode_prompt(tokenizer, messages[:1])
    merged = tokens(tokenizer, full_ids(tokenizer, messages))
    assert merged[-4:] == ["\n ", "hello", "<|im_end|>", "\n"]
    assert tokens(tokenizer, prompt)[-1] == "\n"
    assert tokens(tokenizer, encode_response(tokenizer, messages)) == [" ", "hello", "<|im_end|>"]


def test_special_tokens_within_a_response_do_not_end_it() -> None:
    tokenizer = build(CHATML)
    messages = turns("hi", "a<|im_end|>\nb")
    assert tokens(tokenizer, encode_response(tokenizer, messages)) == ["a", "<|im_end|>", "\n", "b", "<|im_end|>"]


def test_end_of_turn_that_is_not_eos() -> None:
    tokenizer = build(CHATML, eos="</s>")
    ids = encode_response(tokenizer, turns("hi", "hello"))
    assert tokens(tokenizer, ids) == ["hello", "<|im_end|>"]
    assert tokens(tokenizer, stop_token_ids(tokenizer)) == ["</s>", "<|im_end|>"]
    assert tokens(tokenizer, stop_token_ids(build(CHATML))) == ["<|im_end|>"]


def test_eos_after_the_end_of_turn_is_no_part_of_the_turn() -> None:
    template = CHATML.replace("{% if add_generation_prompt %}", "{% if not add_generation_prompt %}</s>{% else %}")
    tokenizer = build(template, eos="</s>")
    assert tokens(tokenizer, encode_response(tokenizer, turns("hi", "hello"))) == ["hello", "<|im_end|>"]
    assert tokens(tokenizer, stop_token_ids(tokenizer)) == ["</s>", "<|im_end|>"]


def test_a_template_that_ends_no_turn_gets_eos() -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = build(template, eos="</s>")
    messages = turns("hi", "hello")
    assert tokens(tokenizer, encode_prompt(tokenizer, messages[:1])) == ["user", ":", "hi", "\n", "assistant", ":"]
    assert tokens(tokenizer, encode_response(tokenizer, messages)) == ["hello", "</s>"]
    with pytest.raises(DrklError, match=r"no eos token .* could never learn to stop"):
        encode_response(build(template, eos=None), messages)


def test_text_that_the_template_writes_before_the_answer_is_the_response() -> None:
    template = CHATML.replace(
        "+ message['content'] +", "+ ('. ' if message['role'] == 'assistant' else '') + message['content'] +"
    )
    tokenizer = build(template)
    messages = turns("hi", "hello")
    ours = encode_prompt(tokenizer, messages[:1]) + encode_response(tokenizer, messages)
    assert ours == full_ids(tokenizer, messages)[:-1]
    assert tokens(tokenizer, encode_response(tokenizer, messages)) == [".", " ", "hello", "<|im_end|>"]


def test_templates_that_refuse_or_contradict_themselves() -> None:
    with pytest.raises(DrklError, match="chat template refuses the roles system, user: Only user and assistant"):
        encode_prompt(build(LLAMA2), turns("hi", system="a"))
    reminder = "{% if m['role'] == 'user' and loop.last %} a{% endif %}"
    changing = "{% for m in messages %}{{ m['content'] }}" + reminder + "<|im_end|>{% endfor %}"
    with pytest.raises(DrklError, match="a whole conversation does not go on from there"):
        encode_response(build(changing), turns("hi", "hello"))
    deaf = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DrklError, match="leaves the assistant's last message out"):
        encode_response(build(deaf), turns("hi", "hello"))


ALPACA_HI = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nhi\n\n### Response:\n"
)


def alpaca_tokenizer(**kw):  # type: ignore[no-untyped-def]
    return build(None, eos="</s>", extra=[w for w in ALPACA_HI.replace(".", "").split()], **kw)


def test_alpaca_without_a_chat_template() -> None:
    tokenizer = alpaca_tokenizer()
    messages = turns("hi", "hello there")
    prompt = encode_prompt(tokenizer, messages[:1])
    assert "".join(tokens(tokenizer, prompt)) == ALPACA_HI
    assert tokens(tokenizer, encode_response(tokenizer, messages)) == ["hello", " ", "there", "</s>"]
    assert tokens(tokenizer, encode_response(tokenizer, turns("hi", " hello"))) == [" ", "hello", "</s>"]


def test_alpaca_joins_longer_conversations() -> None:
    tokenizer = alpaca_tokenizer()
    text = "".join(tokens(tokenizer, encode_prompt(tokenizer, turns("hi", "hello", "a b", system="c d"))))
    assert text == ALPACA_HI.replace("hi\n", "c d\n\nUser: hi\n\nAssistant: hello\n\nUser: a b\n")


def test_braces_in_an_instruction_stay() -> None:
    tokenizer = build(None, eos="</s>", extra=["{", "}", "instruction"])
    text = "".join(tokens(tokenizer, encode_prompt(tokenizer, turns("{instruction}"))))
    assert "{instruction}" in text


def test_alpaca_has_a_bos_where_the_tokenizer_adds_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = alpaca_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    messages = turns("hi", "hello")
    prompt, response = encode_prompt(tokenizer, messages[:1]), encode_response(tokenizer, messages)
    assert "".join(tokens(tokenizer, prompt)) == "<s>" + ALPACA_HI
    assert tokens(tokenizer, response) == ["hello", "</s>"]


def test_alpaca_needs_eos() -> None:
    with pytest.raises(DrklError, match="no eos token"):
        encode_response(build(None, eos=None), turns("hi", "hello"))


def test_ids_are_plain_integers() -> None:
    tokenizer = build(CHATML)
    for value in encode_prompt(tokenizer, turns("hi")) + encode_response(tokenizer, turns("hi", "hello")):
        assert type(value) is int and not isinstance(value, np.integer)
