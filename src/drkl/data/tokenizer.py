"""Train a tokenizer on the run's own text, for runs without a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from drkl.data.config import TokenizerConfig
from drkl.data.examples import Example
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD, BEGIN, END = "[PAD]", "[CLS]", "[SEP]"
"""The special tokens of a classifier's tokenizer, ids 0, 1 and 2."""


def learn_tokenizer(
    config: TokenizerConfig, texts: Iterable[str], *, classifier: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Every byte is a token, so no text is unknown. ``<|endoftext|>`` (id 0) is bos, eos and padding. The tokenizer of a
    classifier puts ``[CLS]`` and ``[SEP]`` around every text, for the model to pool, and pads with ``[PAD]``.

    Raises:
        DrklError: the texts have no character.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
        special_tokens=[PAD, BEGIN, END] if classifier else [END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise DrklError("The training rows have no text to learn a tokenizer from.")
    special = {name: END_OF_TEXT for name in ("bos_token", "eos_token", "pad_token")}
    if classifier:
        special = {"bos_token": BEGIN, "cls_token": BEGIN, "eos_token": END, "sep_token": END, "pad_token": PAD}
        ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
        tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A {END}", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def texts_of(examples: Iterable[Example]) -> Iterator[str]:
    """Yield the text of every message."""
    for example in examples:
        for message in example.messages:
            yield message["content"]
