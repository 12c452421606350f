"""The ``data`` section of a run's configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from drkl.data.template import check_template

Format = Literal["auto", "prompt_response", "messages", "text_label", "text"]


class TokenizerConfig(BaseModel):
    """A tokenizer made from the run's own training text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: Literal["bpe"] = Field(
        "bpe", description="bpe: byte-level BPE learnt on the training text; for runs without a teacher"
    )
    vocab_size: int = Field(8192, ge=257, description="tokens at most; 256 bytes and the special tokens are always in")


class SourceConfig(BaseModel):
    """One of several sources of training rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(default=None, description="a file, as data.path; exactly one of path and dataset")
    dataset: str | None = Field(default=None, description="a `datasets` id or a local folder, as data.dataset")
    format: Format | None = Field(default=None, description="its format where it is not data.format")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="how often its rows are taken per epoch; of 1.5, every row and half of them (by a hash) again",
    )
    max_rows: int | None = Field(default=None, gt=0, description="use its first so many training rows")

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if (self.path is None) == (self.dataset is None):
            came = "neither" if self.path is None else "both"
            raise ValueError(f"Expected exactly one of path (a file) and dataset (a `datasets` id); got {came}.")
        return self

    @property
    def name(self) -> str:
        """The path or the id."""
        return self.path or self.dataset or ""


class DataConfig(BaseModel):
    """Where the rows come from, and how many tokens of each are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(
        default=None,
        description="Training rows: a file (jsonl, json, csv, parquet, txt), or bundled:dolly and the like (ship with "
        "drkl). Exactly one of path, dataset and sources.",
    )
    dataset: str | None = Field(
        default=None,
        description="Training rows: a `datasets` id or a local folder, 'id' or 'id:config'; its split 'train' is used.",
    )
    sources: tuple[SourceConfig, ...] = Field(default=(), description="Training rows from several places, mixed.")
    eval_path: str | None = Field(
        default=None,
        description="Held-out rows: a file, or bundled:dolly-eval and the like; null holds out 5 % of each source's "
        "training rows (at least 1, at most 100), picked by a hash of their ids; of few plain texts, their ends.",
    )
    eval_max_rows: int | None = Field(
        default=None,
        gt=0,
        description="Of eval_path, use so many rows, picked by a hash of their ids; all where left out.",
    )
    max_rows: int | None = Field(
        default=None, gt=0, description="Use the first so many training rows (texts, for text); all where left out."
    )
    format: Format = Field(
        default="auto",
        description="Fields of a row: prompt and response (and input), messages, text and label (learnt as a "
        "response), or text alone (plain text in blocks of max_tokens); auto takes what a row has.",
    )
    turns: Literal["last", "all"] = Field(
        default="last",
        description="Of a conversation: learn the assistant's last turn, or all of them (each with its end of turn); "
        "an encoder-decoder always learns the last.",
    )
    template: str = Field(
        default="auto",
        description="How a prompt is written: chat (the tokenizer's template), alpaca, minillm, plain (as it is), or "
        "jinja text with prompt or messages; auto is chat where the tokenizer has a template, else alpaca. An "
        "encoder-decoder reads the prompt as it is.",
    )
    max_prompt_tokens: int = Field(
        default=256,
        gt=0,
        description="Rows whose prompt has more tokens than this are dropped (counted, never cut); of a max_tokens of "
        "256 or less the default is half.",
    )
    max_tokens: int = Field(
        default=512,
        gt=1,
        description="Prompt and response together; a longer response is cut at its end (counted). In classification "
        "the text, which is cut likewise.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fit_prompts(cls, values: Any) -> Any:
        """A small ``max_tokens`` alone is no contradiction to the other's default."""
        longest = values.get("max_tokens") if isinstance(values, dict) else None
        if isinstance(longest, int) and 1 < longest <= 256 and "max_prompt_tokens" not in values:
            return {"max_prompt_tokens": longest // 2, **values}
        return values

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
        if self.eval_max_rows is not None and self.eval_path is None:
            raise ValueError("eval_max_rows is set, but eval_path, whose rows it counts, is not.")
        if self.max_tokens <= self.max_prompt_tokens:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be larger than max_prompt_tokens ({self.max_prompt_tokens}): "
                "it counts prompt and response together, and a row without a response teaches nothing."
            )
        return self

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, each with its format; of a lone path or dataset, that one."""
        lone = self.sources or (SourceConfig(path=self.path, dataset=self.dataset, max_rows=self.max_rows),)
        return tuple(source.model_copy(update={"format": source.format or self.format}) for source in lone)

    @property
    def name(self) -> str:
        """What the training rows come from, in a few words."""
        return ", ".join(source.name for source in self.all_sources())

    @property
    def prompt_template(self) -> str:
        """The template of a prompt that a person types: a model of plain text goes on from it as it is."""
        return "plain" if self.template == "auto" and self.format == "text" else self.template

    @property
    def row_settings(self) -> dict[str, Any]:
        """What ``tokenize_examples`` has to know."""
        names = ("max_prompt_tokens", "max_tokens", "turns", "template")
        return {name: getattr(self, name) for name in names}
