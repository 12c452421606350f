"""The rows of a data section, tokenised: those that are trained on and those that are held out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drkl.data.config import NO_ROWS, DataConfig, SourceConfig
from drkl.data.examples import Example, check_readable
from drkl.data.lengths import Lengths
from drkl.data.loading import Wanted, load, reader
from drkl.data.making import heldout_examples
from drkl.data.rows import Rows, make_rows, read_shares
from drkl.data.seq2seq import set_languages
from drkl.data.sources import Source, source_at, source_of_dataset
from drkl.data.split import Scan, scan
from drkl.data.store import Made, Watch, key_of, rows_folder
from drkl.data.stored import NotStorable, to_json
from drkl.data.tokenize import DropReport
from drkl.errors import DrklError
from drkl.runs import read_sealed, write_json
from drkl.sealed import sealed


@dataclass
class Shares:
    """The rows of a data section, and the accounts of those that were dropped.

    ``heldout_report`` is None where nothing is held out; ``cached`` says whether the training rows were tokenised
    before.
    """

    train: Rows
    report: DropReport
    heldout: Rows
    heldout_report: DropReport | None
    cached: bool = False


def load_shares(
    config: DataConfig, tokenizer: Any, *, classes: Sequence[str] | None, watch: Watch | None = None, **kind: Any
) -> Shares:
    """Return the rows of a data section, which are tokenised once and kept in drkl's cache.

    Args:
        config: the section.
        tokenizer: the one that both models share; the section's languages are set on it.
        classes: a classifier's classes, by number; None for a language model.
        watch: hooks for a front end.
        **kind: the model, as `drkl.data.rows.rows_from` takes it.

    Raises:
        DrklError: whatever `drkl.data.rows.rows_from` refuses.
    """
    _set_languages(config, tokenizer, kind)
    kind["classes"] = classes
    try:
        found = _train(config, tokenizer, watch, kind)
        rows: Any = found.rows
        train, report, examples, cached = rows, found.report, heldout_examples(found.about), found.cached
    except NotStorable:
        cached = False
        shares = read_shares(config, classifier=classes is not None, needs_responses=kind["needs_responses"])
        train, report = make_rows(shares[0], config, tokenizer, **kind)
        examples = shares[1]
    heldout, heldout_report = _heldout(config, tokenizer, watch, kind, examples)
    return Shares(train, report, heldout, heldout_report, cached)


def load_heldout(
    config: DataConfig, tokenizer: Any, *, classes: Sequence[str] | None, watch: Watch | None = None, **kind: Any
) -> tuple[Rows, DropReport | None]:
    """Return the held-out rows of a data section whose training rows are streamed, and the account of the others.

    The arguments are those of `load_shares`; the account is None where nothing is held out.

    Raises:
        DrklError: see `load_shares`.
    """
    _set_languages(config, tokenizer, kind)
    return _heldout(config, tokenizer, watch, kind | {"classes": classes}, [])


def _set_languages(config: DataConfig, tokenizer: Any, kind: dict[str, Any]) -> None:
    for one in (tokenizer, kind.get("teacher_tokenizer")):
        if one is not None:
            set_languages(one, config.src_lang, config.tgt_lang)


def _train(config: DataConfig, tokenizer: Any, watch: Watch | None, kind: dict[str, Any]) -> Made:
    """The training rows, and in what is said of them the examples that are held out of the same sources."""
    wanted = _training_sources(_section(config, kind))
    return load(wanted, tokenizer, _lengths(config), watch, **_settings(config), **kind)


def _training_sources(section: DataConfig) -> list[Wanted]:
    sources, splits, wanted = section.all_sources(), section.eval_path is None, []
    for number, source in enumerate(sources, start=1):
        prefix = f"{number}:" if len(sources) > 1 else ""  # rows of two files may have the same ids
        choose = _Choice(splits, source.max_rows)
        facts = [splits, source.max_rows]
        wanted.append(Wanted(_source(source), source.format or "auto", choose, facts, prefix, source.weight))
    return wanted


def _eval_source(section: DataConfig) -> Wanted:
    source = _source(SourceConfig(path=section.eval_path))
    return Wanted(source, section.format, _first_by_hash(section.eval_max_rows), ["eval", section.eval_max_rows])


def _heldout(
    config: DataConfig, tokenizer: Any, watch: Watch | None, kind: dict[str, Any], examples: list[Example]
) -> tuple[Rows, DropReport | None]:
    if config.eval_path == NO_ROWS:
        return [], None
    try:
        return _tokenized(config, tokenizer, watch, kind, examples)
    except DrklError as error:
        raise DrklError(f"Held-out rows: {error}") from error


def _tokenized(
    config: DataConfig, tokenizer: Any, watch: Watch | None, kind: dict[str, Any], examples: list[Example]
) -> tuple[Rows, DropReport]:
    if config.eval_path is not None:
        try:
            found = load(
                [_eval_source(_section(config, kind))], tokenizer, _lengths(config), watch, **_settings(config), **kind
            )
        except NotStorable:
            classifies = kind["classes"] is not None
            examples = heldout_of(config, classifier=classifies, needs_responses=kind["needs_responses"])
        else:
            rows: Any = found.rows
            return rows, found.report
    return make_rows(examples, config, tokenizer, **kind)


def each_training_example(config: DataConfig, *, classifier: bool = False) -> Iterator[Example]:
    """Yield the training examples of a data section, which are never in memory all at once.

    Raises:
        DrklError: see `drkl.data.examples.load_examples`.
    """
    kind = {"classes": () if classifier else None}
    section = _section(config, kind)
    for wanted in _training_sources(section):
        found = _scanned(wanted)
        try:
            train, _ = wanted.choose(found)
        except NotStorable:  # few texts
            yield from read_shares(config, classifier=classifier)[0]
            return
        assert train is not None
        yield from (replace(example, weight=wanted.weight) for example in _chosen(found, wanted, train))


def heldout_of(config: DataConfig, *, classifier: bool = False, needs_responses: bool = True) -> list[Example]:
    """Return the held-out examples of a data section; of its rows no more is in memory.

    Those of a large source are kept in drkl's cache.

    Raises:
        DrklError: see `drkl.data.examples.load_examples`.
    """
    if config.eval_path == NO_ROWS:
        return []
    section = _section(config, {"classes": () if classifier else None})
    wanted = [_eval_source(section)] if section.eval_path is not None else _training_sources(section)
    described = [[one.source.identity(), one.row_format, one.facts, one.prefix] for one in wanted]
    key = key_of({"heldout": described, "needs_responses": needs_responses})
    kept = rows_folder(Watch()) / f"heldout-{key}.json"
    if kept.is_file():
        with contextlib.suppress(DrklError, ValueError, TypeError):
            return heldout_examples(read_sealed(kept))
    examples: list[Example] = []
    is_large = False
    for one in wanted:
        found = _scanned(one, needs_responses=needs_responses)
        try:
            train, heldout = one.choose(found)
        except NotStorable:
            return read_shares(config, classifier=classifier, needs_responses=needs_responses)[1]
        chosen = heldout if section.eval_path is None else train
        chosen = np.ones(len(found), np.bool_) if chosen is None else chosen
        examples += _chosen(found, one, chosen, needs_responses=needs_responses)
        is_large = is_large or len(found.sizes) > 1
    if is_large and all(one[0] is not None for one in described):
        with contextlib.suppress(DrklError, NotStorable):
            write_json(kept, sealed({"heldout": [(example.id, to_json(example)) for example in examples]}))
    return examples


def _scanned(wanted: Wanted, *, needs_responses: bool = True) -> Scan:
    return scan(wanted.source, reader(wanted.row_format, None, needs_responses=needs_responses), wanted.prefix)


def _chosen(rows: Scan, wanted: Wanted, mask: NDArray[np.bool_], *, needs_responses: bool = True) -> Iterator[Example]:
    """The examples of some rows of a source."""
    read, start = reader(wanted.row_format, None, needs_responses=needs_responses), 0
    for block, size in rows.blocks():
        if mask[start : start + size].any():
            for number, (_, own, example) in enumerate(read(rows.source.read(block)), start=start):
                if mask[number]:
                    yield replace(example, id=rows.name(number, own))
        start += size


def _section(config: DataConfig, kind: dict[str, Any]) -> DataConfig:
    return config if kind["classes"] is None else config.model_copy(update={"format": "text_label"})


def _settings(config: DataConfig) -> dict[str, Any]:
    return {"turns": config.turns, "template": config.template}


def _lengths(config: DataConfig) -> Lengths:
    return Lengths(config.max_prompt_tokens, config.max_tokens)


def _source(source: SourceConfig) -> Source:
    if source.path is not None:
        check_readable(source.path)
        return source_at(source.path, source.format or "auto")
    assert source.dataset is not None
    return source_of_dataset(source.dataset)


@dataclass(frozen=True)
class _Choice:
    """Chooses the rows of a source that are trained on, and those that are held out."""

    splits: bool
    max_rows: int | None

    def __call__(self, rows: Scan) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        held = rows.held_out() if self.splits else np.zeros(len(rows), np.bool_)
        if held is None:
            raise NotStorable("The ends of few texts are held out, which are cut in memory.")
        train = ~held
        if self.max_rows is not None:
            train[np.flatnonzero(train)[self.max_rows :]] = False
        return train, held


def _first_by_hash(count: int | None) -> Any:
    def choose(rows: Scan) -> tuple[NDArray[np.bool_] | None, None]:
        if count is None:
            return None, None
        chosen = np.zeros(len(rows), np.bool_)
        chosen[rows.by_hash[:count]] = True
        return chosen, None

    return choose
