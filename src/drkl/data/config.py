"""The ``data`` section of a run's configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from drkl.data.lengths import MAX_PROMPT_TOKENS, MAX_TOKENS, NO_LIMIT, Lengths, Room, fit_lengths
from drkl.data.rendering import check_template

NO_ROWS = "none"
"""What ``eval_path`` says where nothing is held out."""
SHUFFLE_BUFFER = 10_000
Format = Literal[
    "auto", "prompt_response", "prompt_completion", "instruction", "messages", "conversations", "text_label", "text"
]


class TokenizerConfig(BaseModel):
    """A tokenizer trained on the run's own training text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: Literal["bpe"] = Field(
        "bpe", description="Tokenizer to train: bpe (byte-level BPE on the training text). For runs without a teacher."
    )
    vocab_size: int = Field(
        8192, ge=257, description="Largest vocabulary. The 256 bytes and the special tokens are always part of it."
    )


class SourceConfig(BaseModel):
    """One of several sources of training rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(default=None, description="A file, as data.path. Give exactly one of path and dataset.")
    dataset: str | None = Field(default=None, description="A `datasets` id or a local folder, as data.dataset.")
    format: Format | None = Field(default=None, description="Format of the rows (default: data.format).")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="How often an epoch takes the rows. With 1.5 an epoch has every row once and half of the rows, "
        "selected by a hash of the row id, twice. With data.streaming: the share of the rows that come from here is "
        "this weight in the sum of all.",
    )
    max_rows: int | None = Field(
        default=None, gt=0, description="Number of training rows to use, from the start (default: all)."
    )

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if (self.path is None) == (self.dataset is None):
            came = "neither" if self.path is None else "both"
            raise ValueError(f"Expected exactly one of path (a file) and dataset (a `datasets` id); got {came}.")
        return self

    @property
    def name(self) -> str:
        """The path or the id of the source."""
        return self.path or self.dataset or ""


class DataConfig(BaseModel):
    """The sources of the rows, and their tokenisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(
        default=None,
        description="Training rows: a file (jsonl, json, csv, tsv, parquet, txt), or data that ships with drkl, such "
        "as bundled:dolly. Give exactly one of path, dataset and sources.",
    )
    dataset: str | None = Field(
        default=None,
        description="Training rows: a `datasets` id ('id' or 'id:config') or a local folder. Split: train.",
    )
    sources: tuple[SourceConfig, ...] = Field(default=(), description="Training rows from several sources, mixed.")
    eval_path: str | None = Field(
        default=None,
        description="Held-out rows: a file, or data that ships with drkl, such as bundled:dolly-eval. Default: 5 % of "
        "each source's training rows (1 to 100), selected by a hash of the row id; with fewer than 20 plain texts, the "
        "end of each. none: no held-out rows, so every row is trained on and the last weights are kept.",
    )
    eval_max_rows: int | None = Field(
        default=None,
        gt=0,
        description="Number of held-out rows to use (default: all). Selected by a hash of the row id.",
    )
    max_rows: int | None = Field(
        default=None,
        gt=0,
        description="Number of training rows (of texts, for plain text) to use, from the start (default: all).",
    )
    streaming: bool = Field(
        default=False,
        description="Read and tokenise the training rows while training goes on, for what has no end or is too large "
        "to tokenise first. Needs training.max_steps and eval_path.",
    )
    shuffle_buffer: int = Field(
        default=SHUFFLE_BUFFER,
        ge=1,
        description="Number of rows of a stream that are shuffled among each other, and held in memory.",
    )
    format: Format = Field(
        default="auto",
        description="Fields of a row: prompt_response (and optional input), prompt_completion (TRL), instruction (with "
        "output: Alpaca), messages (OpenAI), conversations (ShareGPT), text_label (the label is learnt as a response) "
        "or text (plain text, in blocks of max_tokens). auto takes the one that fits the row; needed where two fit.",
    )
    turns: Literal["last", "all"] = Field(
        default="last",
        description="Turns of the assistant to learn in a conversation: the last, or all of them, each with its end of "
        "turn. An encoder-decoder always learns the last.",
    )
    template: str = Field(
        default="auto",
        description="Prompt template: chat (the tokenizer's own), chat:NAME (one of several), alpaca, minillm, plain "
        "(the prompt unchanged), or jinja text that uses prompt or messages. auto is chat if the tokenizer has a "
        "template, else alpaca. An encoder-decoder reads the prompt unchanged.",
    )
    src_lang: str | None = Field(
        default=None,
        description="Source language of a translation model, as its tokenizer spells it: en_XX (mBART), eng_Latn "
        "(NLLB), en (M2M-100). Default: the tokenizer's own.",
    )
    tgt_lang: str | None = Field(default=None, description="Target language of a translation model, likewise.")
    max_prompt_tokens: int = Field(
        default=MAX_PROMPT_TOKENS,
        gt=0,
        description="Longest prompt in tokens. Rows with a longer prompt are dropped and counted, never cut. Where it "
        "is left out it fits the models: half of a given max_tokens of 256 or less, else what leaves room to respond.",
    )
    max_tokens: int = Field(
        default=MAX_TOKENS,
        gt=1,
        description="Longest row in tokens, prompt and response together. A longer response is cut at its end and "
        "counted; so is a longer text in classification. Where it is left out it fits the models: their context where "
        "that is shorter.",
    )

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        check_template(template)
        return template

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        given = [name for name in ("path", "dataset", "sources") if getattr(self, name)]
        if len(given) != 1:
            came = {0: "neither", 2: "both" if not self.sources else " and ".join(given)}.get(len(given), "all three")
            raise ValueError(
                "Expected exactly one of path (a file) and dataset (a `datasets` id), or a list of sources; got "
                f"{came}."
            )
        if self.sources and self.max_rows is not None:
            raise ValueError("max_rows is set beside sources; each source has a max_rows of its own.")
        if self.streaming and self.eval_path is None:
            raise ValueError(
                "streaming is true and eval_path is not set: from a stream no share can be held out. Set eval_path to "
                "a file of held-out rows, or to none."
            )
        if self.shuffle_buffer != SHUFFLE_BUFFER and not self.streaming:
            raise ValueError(
                "shuffle_buffer is set, but streaming is not: rows that are all read first are shuffled all together."
            )
        if self.eval_max_rows is not None and self.eval_path in (None, NO_ROWS):
            raise ValueError("eval_max_rows is set, but eval_path, whose rows it counts, is not.")
        # Not through the fields' setters: what the user did not give stays known as such.
        self.__dict__ |= self._fitting(NO_LIMIT)._asdict()
        if self.max_tokens <= self.max_prompt_tokens:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be larger than max_prompt_tokens ({self.max_prompt_tokens}): "
                "it counts prompt and response together, and a row without a response teaches nothing."
            )
        return self

    @property
    def given_lengths(self) -> dict[str, int]:
        """The limits of length that the user gave; whatever else there is fits the models."""
        return {name: getattr(self, name) for name in Lengths._fields if name in self.model_fields_set}

    def fitted(self, room: Room, max_new_tokens: int | None = None) -> DataConfig:
        """The section with the limits of length that the user did not give, as they fit the models.

        Args:
            room: the models' context.
            max_new_tokens: of answers that are sampled after the prompts, where that is given.

        Raises:
            DrklError: the given length of a prompt leaves no room for a response.
        """
        return self.model_copy(update=self._fitting(room, max_new_tokens)._asdict())

    def _fitting(self, room: Room, max_new_tokens: int | None = None) -> Lengths:
        given = self.given_lengths
        return fit_lengths(given.get("max_prompt_tokens"), given.get("max_tokens"), room, max_new_tokens=max_new_tokens)

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Return the sources, each with its format; a single path or dataset is one source."""
        sources = self.sources or (SourceConfig(path=self.path, dataset=self.dataset, max_rows=self.max_rows),)
        return tuple(source.model_copy(update={"format": source.format or self.format}) for source in sources)

    @property
    def name(self) -> str:
        """The training sources in a few words."""
        return ", ".join(source.name for source in self.all_sources())

    @property
    def prompt_template(self) -> str:
        """The template for a prompt that a person types; a model of plain text continues the prompt unchanged."""
        return "plain" if self.template == "auto" and self.format == "text" else self.template

    @property
    def row_settings(self) -> dict[str, Any]:
        """The arguments of `rows_from` and ``tokenize_examples`` that this section sets."""
        names = ("max_prompt_tokens", "max_tokens", "turns", "template")
        return {name: getattr(self, name) for name in names}
