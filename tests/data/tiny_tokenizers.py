"""Tiny tokenizers, built here: a word is a token, and so is a space or a newline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "\n", " ", "user", "assistant", "system", "[", "]", "INST", "/", "hi", "hello", "there", "a", "b", "c", "d", "#",
    ":", "Instruction", "Response", "\n ", "User", "Assistant", ".",
)  # fmt: skip


def build(
    template: str | None = CHATML,
    *,
    eos: str | None = "<|im_end|>",
    pad: str = "<pad>",
    extra: Iterable[str] = (),
    **kw: Any,
) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer; "\n " is one token, so that a prompt's newline can merge with what follows."""
    vocab = {token: index for index, token in enumerate(dict.fromkeys((*SPECIAL, "<unk>", *WORDS, *extra)))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n |\n| |\w+|[^\w\s]"), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        bos_token="<s>",
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL),
        **kw,
    )
