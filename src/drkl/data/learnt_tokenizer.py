"""A tokenizer made from the run's own text, where there is no teacher that brings one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from drkl.data.config import TokenizerConfig
from drkl.data.examples import Example
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def learn_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE on texts; the same texts give the same tokenizer.

    Every byte is a token, so that no text is unknown; ``<|endoftext|>`` (id 0) begins, ends and pads.

    Raises:
        DrklError: texts without a character.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise DrklError("The training rows have no text to learn a tokenizer from.")
    special = {name: END_OF_TEXT for name in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def texts_of(examples: Iterable[Example]) -> Iterator[str]:
    """Every message's text."""
    for example in examples:
        for message in example.messages:
            yield message["content"]
