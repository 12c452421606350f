"""The two kinds of task that are evaluated: generating answers, and classifying texts.

`drkl.evaluation.evaluate` runs one loop over models for either of them: ``measure`` while a model is on its device,
``score`` once it is gone, and ``evaluation`` at the end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drkl.data.classification import LabelledRow
from drkl.data.ends import taught_ends
from drkl.data.examples import hash_of_id
from drkl.data.lengths import NO_LIMIT, Room, check_answer, fit_answer
from drkl.data.tokenize import Row
from drkl.evaluation.answers import Answer, AnswerTable
from drkl.evaluation.bookkeeping import Report, check_same_weights, finite, timed, versions
from drkl.evaluation.bootstrap import RESAMPLES, Interval, Metrics, Resampled
from drkl.evaluation.cached import cache_fingerprint, read_cached
from drkl.evaluation.calibration import EDGES, mass_bins, width_bins
from drkl.evaluation.class_scores import ClassScores
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.declared import ANSWER_KEYS, CLASS_KEYS, JUDGED, KEYS, NUM_CALIBRATION_BINS, definitions
from drkl.evaluation.findings import Differences, of_evaluation
from drkl.evaluation.judging import nll_of_answers
from drkl.evaluation.paired import Curve
from drkl.evaluation.positions import PROFILE_RANKS, PositionTable, bin_edges, compare
from drkl.evaluation.result import (
    SCALED,
    Coverage,
    Distributions,
    Evaluation,
    Numbers,
    Reliability,
    ReliabilityBins,
    SweepPoint,
    TailProfile,
)
from drkl.evaluation.sampling import Drawn, Sampler
from drkl.evaluation.scaling import Temperatures, temperatures_of
from drkl.evaluation.store import Store, fingerprint
from drkl.losses.common import log_softmax
from drkl.models.ends import answer_start, stops_of
from drkl.models.fingerprint import model_fingerprint
from drkl.models.forward import lm_head
from drkl.models.generate import sampling_batches
from drkl.models.readout import Readout, read
from drkl.objectives.decoupled import GAMMA
from drkl.positions import brier_score, token_statistics
from drkl.processes import ALONE, Share
from drkl.teachers.cached import TeacherCache

_log = logging.getLogger("drkl")
ESTIMATES = tuple(key for key in KEYS if key not in ("num_tokens", "num_answers"))
"""The metrics that have intervals: a size is no estimate."""
SWEPT = ("teacher", "student")
"""The models that answer at every temperature of the sweep; the others answer at the main one."""
KEPT_STATES_BYTES = 2**30
"""Larger held-out states of a teacher are not kept for later students."""
OTHERS = ("teacher", "before", "warmup", SCALED)
"""The models that the student is compared with in findings."""


Measured = PreTrainedModel | TeacherCache
"""A model, or the cache of a teacher."""


class Task(Protocol):
    """A kind of evaluation: measures each model and collects the numbers."""

    settings: EvaluationConfig

    def measure(self, name: str, model: Measured, report: Report, seconds: dict[str, float]) -> None:
        """Run a model, which is on its device in eval mode, or read its cache; the teacher comes first."""

    def is_to_judge(self) -> bool:
        """Whether the teacher is to be run once more, over what all models wrote."""

    def judge(self, teacher: PreTrainedModel, report: Report, seconds: dict[str, float]) -> None:
        """Let the teacher read what all models wrote, once every one of them is measured."""

    def score(self, name: str, seconds: dict[str, float]) -> None:
        """Compute what needs no model, once it is gone."""

    def evaluation(self, facts: Mapping[str, Any], data: Mapping[str, Any], seconds: Seconds) -> Evaluation:
        """The numbers of all models, with findings.

        Args:
            facts: settings for the record: what the models are, the device, the command.
            data: where the rows come from.
            seconds: by model and part.
        """


Seconds = Mapping[str, dict[str, float]]


class Parts(NamedTuple):
    """Stores of finished parts; ``shared`` outlasts the evaluation and holds the teacher's."""

    own: Store
    shared: Store


# Generation -------------------------------------------------------------------------------------------------------


class Generation:
    """Teacher-forced metrics on every held-out row, and metrics of answers sampled for some of their prompts.

    Args:
        tokenizer: the one that the rows were made with, and that all models share.
        rows: the held-out rows, of different ids.
        settings: how many answers are sampled, and how.
        suites: the name of each row's suite; prompts are then picked from each, and each has numbers of its own.
        vocab_size: how many ids, from 0, the models are compared on where their padding differs; None for all.
        merged_ids: ids that are one class when the models are compared.
        gamma: DRKL's, for the share of positions where it strengthens the tail.
        parts: where finished parts are kept and looked for; an evaluation that was killed goes on from them.
        pad_id: fills batches; default the tokenizer's.
        template: how the prompts were written, which says what ends an answer.
        room: the models' context. Where ``settings`` do not say how long an answer is, it fits the models, and prompts
            that leave it no room are not answered.
        share: of several processes, which divide the work and have all numbers each.

    Raises:
        DrklError: answers as long as ``settings`` say do not fit the models.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        settings: EvaluationConfig,
        *,
        suites: Sequence[str] | None = None,
        vocab_size: int | None = None,
        merged_ids: Sequence[int] = (),
        gamma: float = GAMMA,
        parts: Parts | None = None,
        pad_id: int | None = None,
        template: str = "auto",
        room: Room = NO_LIMIT,
        share: Share = ALONE,
    ) -> None:
        self.tokenizer, self.rows, self.share = tokenizer, rows, share
        self.vocab_size, self.gamma, self.parts = vocab_size, gamma, parts
        self.merged_ids = merged_ids
        self.pad_id: int = tokenizer.pad_token_id if pad_id is None else pad_id
        self.template, self.taught = template, taught_ends(rows, tokenizer)
        self.has_suites = suites is not None
        self.suite_of = {row.id: suite for row, suite in zip(rows, suites or [""] * len(rows), strict=True)}
        self.max_new_tokens, answerable = _answerable(rows, settings, room)
        self.settings = settings.model_copy(update={"max_new_tokens": self.max_new_tokens})
        self.num_too_long = len(rows) - len(answerable)
        self.prompts = choose_prompts(answerable, settings.prompts, [self.suite_of[row.id] for row in answerable])
        check_answer(self.max_new_tokens, room, max(map(_prompt_length, self.prompts), default=0))
        self._teacher: tuple[str, Readout] | None = None
        self._num_outputs = 0
        self._tables: dict[str, PositionTable] = {}
        self._pools: dict[str, dict[float, list[list[Answer]]]] = {}
        self._answers: dict[str, dict[float, dict[str, AnswerTable]]] = {}
        self._teacher_mark: list[str] = []
        self._scaled: Temperatures | None = None

    def measure(self, name: str, model: Measured, report: Report, seconds: dict[str, float]) -> None:
        """Read the rows and sample the answers; a cache writes none."""
        with timed(seconds, "load"):
            mark = _mark(model) if self.parts is not None or self.share.is_divided else ""
            self.share.check_same(f"weights of the {name}", mark)
        with timed(seconds, "teacher_forced"):
            states, facts = self._read(name, model, mark, report)
            done = partial(report, "comparing", len(states.labels))
            self._tables[name] = self._table(name, states, facts, done)
        if name == "student" and self.settings.logit_temperature is not None:
            with timed(seconds, "scaled"):
                self._scale(states, facts, report)
        with timed(seconds, "samples"):
            self._pools[name] = {}
            if not isinstance(model, TeacherCache):
                self._pools[name] = self._sample(name, model, mark, report)

    def is_to_judge(self) -> bool:
        """Whether there are answers at the temperature `JUDGED` whose likelihood by the teacher is not kept."""
        for name, pools in self._unread():
            store = self._store(name)
            kept = None if store is None else self.share.first(partial(store.read_tensors, self._judged_key(pools)))
            if kept is not None:
                self._take(name, kept["nll"].tolist())
        return bool(self._unread())

    def judge(self, teacher: PreTrainedModel, report: Report, seconds: dict[str, float]) -> None:
        """Read the answers of all models with the teacher, one model's at a time: batches move last digits."""
        waiting, prompts = self._unread(), _as_read("teacher", self.prompts)
        progress = report("reading answers", sum(len(pool) for _, pools in waiting for pool in pools))
        with timed(seconds, "answers"):
            for name, pools in waiting:
                nll = nll_of_answers(
                    teacher, prompts, pools, pad_id=self.pad_id, begin=answer_start(teacher, self.tokenizer),
                    vocab_size=self.vocab_size, merged_ids=self.merged_ids, share=self.share, progress=progress,
                )  # fmt: skip
                store = self._store(name)
                if store is not None and self.share.is_first:
                    store.write_tensors(self._judged_key(pools), {"nll": torch.tensor(nll, dtype=torch.float64)})
                self._take(name, nll)

    def _unread(self) -> list[tuple[str, list[list[Answer]]]]:
        """By model the answers that the teacher is to read and has not read."""
        answers = [(name, pools.get(JUDGED, [])) for name, pools in self._pools.items()]
        return [(name, pools) for name, pools in answers if pools and pools[0][0].teacher_nll is None]

    def _take(self, name: str, nll: Sequence[float]) -> None:
        found = iter(nll)
        pools = self._pools[name][JUDGED]
        self._pools[name][JUDGED] = [[one._replace(teacher_nll=next(found)) for one in pool] for pool in pools]

    def _judged_key(self, pools: Sequence[Sequence[Answer]]) -> str:
        read = zip(_as_read("teacher", self.prompts), pools, strict=True)
        answers = fingerprint(value=[[row.sampling_ids, [one.token_ids for one in pool]] for row, pool in read])
        return fingerprint(
            kind="likelihood of answers", model=self._teacher_mark, answers=answers, vocab=self.vocab_size,
            merged=[*self.merged_ids],
        )  # fmt: skip

    def score(self, name: str, seconds: dict[str, float]) -> None:
        """Compare the answers with the references and with each other."""
        with timed(seconds, "text"):
            self._answers[name] = {
                temperature: self._answer_tables(pools) for temperature, pools in self._pools[name].items()
            }

    def _read(self, name: str, model: Measured, mark: str, report: Report) -> tuple[Readout, dict[str, Any]]:
        """A model's states, and what they depend on; the teacher's stay for those that follow."""
        store, rows = self._store(name), _as_read(name, self.rows)
        facts: dict[str, Any] = {
            "rows": fingerprint(value=[[row.id, row.prompt_ids, row.response_ids, row.trained] for row in rows]),
            "model": mark, "vocab": self.vocab_size, "device": model.device.type,
        }  # fmt: skip
        if name == "teacher" and store is not None and not isinstance(model, TeacherCache):
            states = self._kept_states(model, rows, store, fingerprint(kind="states at the head", **facts), report)
        else:
            states = self._states(model, rows, report)
        self._num_outputs = states.num_outputs
        if name == "teacher":
            self._teacher, self._teacher_mark = (mark, states), [mark, model.device.type]
        against, _ = self._teacher or ("", None)
        if self.merged_ids:
            facts["merged"] = [*self.merged_ids]
        return states, {"against": against, "gamma": self.gamma, **facts}

    def _table(
        self,
        name: str,
        states: Readout,
        facts: Mapping[str, Any],
        done: Callable[[], Callable[[int], None] | None],
        scaled: np.ndarray | None = None,
    ) -> PositionTable:
        """The teacher-forced numbers of a model; ``scaled`` `[rows]` divide its logits, and are among the facts."""
        store, key = self._store(name), fingerprint(kind="positions", **facts)
        arrays = None if store is None else self.share.first(lambda: store.read_tensors(key))
        if arrays is not None:
            return PositionTable.from_arrays({column: tensor.numpy() for column, tensor in arrays.items()})
        _, teacher = self._teacher or ("", None)
        own = compare(states, teacher, gamma=self.gamma, progress=done(), temperatures=scaled)
        table = PositionTable(self.gamma)
        for part in self.share.together(lambda: [own.to_arrays()]):
            table.merge(PositionTable.from_arrays(part))
        if store is not None and self.share.is_first:
            store.write_tensors(key, {column: torch.from_numpy(array) for column, array in table.to_arrays().items()})
        return table

    def _scale(self, states: Readout, facts: Mapping[str, Any], report: Report) -> None:
        """Measure the student once more, with the temperature that the settings ask for on its logits."""
        wanted, ids, store = self.settings.logit_temperature, [row.id for row in self.rows], self._store("student")
        assert wanted is not None
        key = fingerprint(kind="temperatures", wanted=wanted, **facts)
        kept = None if store is None else self.share.first(lambda: store.read_tensors(key))
        _, teacher = self._teacher or ("", None)
        if kept is not None:
            found: Temperatures | str = Temperatures.from_tensors(kept, wanted, ids)
        else:
            found = temperatures_of(wanted, ids, states, teacher, self.share)
        if (usable := _usable(found, self.share)) is None:
            return
        if store is not None and kept is None and self.share.is_first:
            store.write_tensors(key, usable.to_tensors())
        self._scaled = usable
        facts = {**facts, "temperatures": usable.of_rows.tolist()}
        done = partial(report, "comparing the scaled student", len(states.labels))
        self._tables[SCALED] = self._table("student", states, facts, done, usable.of_rows)

    def _states(self, model: Measured, rows: Sequence[Row], report: Report) -> Readout:
        given: dict[str, Any] = {
            "pad_id": self.pad_id, "vocab_size": self.vocab_size, "merged_ids": self.merged_ids,
            "share": self.share, "progress": report("reading", len(rows)),
        }  # fmt: skip
        return read_cached(model, rows, **given) if isinstance(model, TeacherCache) else read(model, rows, **given)

    def _kept_states(
        self, model: PreTrainedModel, rows: Sequence[Row], store: Store, key: str, report: Report
    ) -> Readout:
        """The teacher's states, from the parts where they are there, for every process."""
        kept = store.read_tensors(key)
        if all(self.share.together(lambda: [kept is not None])):
            assert kept is not None
            head = lm_head(model)
            head = head if self.vocab_size is None else head.trimmed(self.vocab_size)
            return Readout.from_tensors(kept, head, self.merged_ids).own(self.share)
        states = self._states(model, rows, report)
        if sum(self.share.together(lambda: [states.hidden.nbytes])) <= KEPT_STATES_BYTES:
            # The head is the model's own, which is there whenever its states are.
            whole = replace(states, head=None, merged=None).in_first(self.share)
            if whole is not None:
                store.write_tensors(key, whole.to_tensors())
        return states

    def _sample(self, name: str, model: PreTrainedModel, mark: str, report: Report) -> dict[float, list[list[Answer]]]:
        """Every prompt's answers by temperature; a batch that was finished before is read instead."""
        settings, prompts = self.settings, _as_read(name, self.prompts)
        if not prompts:
            return {}
        lengths = [len(row.sampling_ids) for row in prompts]
        temperatures = settings.temperatures if name in SWEPT else settings.temperatures[:1]
        drawn = [
            Drawn(temperature, seed, group, numbers)
            for temperature in temperatures
            for seed in settings.all_seeds
            for group, numbers in sampling_batches(lengths, settings.samples_per_prompt, settings.batch_size)
        ]
        by_temperature: dict[float, list[list[Answer]]] = {t: [[] for _ in prompts] for t in temperatures}
        total = len(prompts) * len(settings.all_seeds) * settings.samples_per_prompt * self.max_new_tokens
        sampler = Sampler(
            model, self.tokenizer, prompts, stops_of(model, self.tokenizer, self.template, self.taught),
            self.max_new_tokens, mark, self._store(name), self.share, lambda t: report(f"sampling at {t:g}", total),
        )  # fmt: skip
        for batch, answers in zip(drawn, sampler.answers(drawn), strict=True):
            for place, pool in zip(batch.group, answers, strict=True):
                by_temperature[batch.temperature][place] += pool
        return by_temperature

    def _store(self, name: str) -> Store | None:
        if self.parts is None:
            return None
        return self.parts.shared if name == "teacher" else self.parts.own

    def _answer_tables(self, pools: Sequence[Sequence[Answer]]) -> dict[str, AnswerTable]:
        """The answers' table of each suite."""

        def scored(place: int) -> tuple[int, AnswerTable]:
            table = AnswerTable()
            table.update(self.prompts[place].example.all_references, pools[place])
            return place, table

        places = range(len(pools))
        by_place = dict(self.share.together(lambda: [scored(place) for place in self.share.of(places)]))
        tables: dict[str, AnswerTable] = {}
        for place in places:
            tables.setdefault(self.suite_of[self.prompts[place].id], AnswerTable()).merge(by_place[place])
        return tables

    # From here on there are no models.

    def evaluation(self, facts: Mapping[str, Any], data: Mapping[str, Any], seconds: Seconds) -> Evaluation:
        """The numbers of all models, with findings."""
        settings, names, size = self.settings, list(self._tables), len(self.rows)
        sums = {name: table.row_sums(size) for name, table in self._tables.items()}
        tokens = {name: Resampled.of(sums[name].metrics, size, settings.seed) for name in names}
        merged = {name: {t: _merged(tables) for t, tables in self._answers.get(name, {}).items()} for name in names}
        answers = {
            name: {t: Resampled.of(table.metrics, len(table), settings.seed) for t, table in tables.items()}
            for name, tables in merged.items()
        }
        main = {name: merged[name].get(settings.sampling_temperature, AnswerTable()) for name in names}
        own = {name: answers[name].get(settings.sampling_temperature, Resampled({}, {})) for name in names}
        coverage = {name: values for name in names if (values := main[name].coverage())}
        profile = {name: table.tail_profile() for name, table in self._tables.items()}
        profile = {name: means for name, means in profile.items() if any(mean is not None for mean in means)}
        evaluation = Evaluation(
            Numbers(
                {name: _table(self._tables[name].compute() | main[name].compute()) for name in names},
                {name: _ends(tokens[name].intervals() | own[name].intervals(), ESTIMATES) for name in names},
            ),
            self._describe(facts, data),
            suites=self._suites(settings.seed) if self.has_suites else {},
            sweep={name: points for name in names if (points := _sweep(settings, merged[name], answers[name]))},
            coverage={name: Coverage(**values) for name, values in coverage.items()},
            tail=TailProfile(list(PROFILE_RANKS), profile) if profile else None,
            reliability=Reliability(
                [i / NUM_CALIBRATION_BINS for i in range(NUM_CALIBRATION_BINS + 1)],
                {name: ReliabilityBins(*own_sums.width.reliability()) for name, own_sums in sums.items()},
                {name: ReliabilityBins(*own_sums.mass.reliability()) for name, own_sums in sums.items()},
            ),
            distributions=Distributions(
                bin_edges(self._num_outputs),
                {name: table.distributions(self._num_outputs) for name, table in self._tables.items()},
            ),
            scaling=None if self._scaled is None else self._scaled.scaling,
            timing=self._timing(seconds),
            lines={"samples": list(self._sample_lines()), "heldout": list(self._heldout_lines())},
        )
        differences: Differences = {
            ("student", other): tokens["student"].minus(tokens[other]) | own["student"].minus(own[other])
            for other in OTHERS
            if other in tokens and "student" in tokens
        }
        curves = {name: Curve.of(answers.get(name, {})) for name in SWEPT}
        evaluation.findings.extend(of_evaluation(evaluation, differences, curves))
        return evaluation

    def _suites(self, seed: int) -> dict[str, Numbers]:
        """Every suite's own numbers: the same tables, of its rows alone."""
        result: dict[str, Numbers] = {}
        suites = list(self.suite_of.values())
        for suite in dict.fromkeys(suites):
            in_suite = np.array([name == suite for name in suites])
            values, ends = {}, {}
            for name, table in self._tables.items():
                resampled = Resampled.of(
                    _of_rows(table.row_sums(len(in_suite)).metrics, in_suite), int(in_suite.sum()), seed
                )
                at_main = self._answers.get(name, {}).get(self.settings.sampling_temperature, {})
                answers = at_main.get(suite, AnswerTable())
                values[name] = _table({**resampled.points, **answers.compute()})
                ends[name] = _ends({**resampled.intervals(), **answers.intervals(seed)})
            result[suite] = Numbers(values, ends)
        return result

    def _timing(self, seconds: Seconds) -> dict[str, Any]:
        timing: dict[str, Any] = {
            name: {part: round(value, 2) for part, value in own.items()} for name, own in seconds.items()
        }
        for name, pools in self._pools.items():
            count = sum(len(pool) for pool_of in pools.values() for pool in pool_of)
            spent = seconds[name]["samples"]
            timing[name]["answers_per_minute"] = round(60 * count / spent, 1) if spent > 0 else None
        return timing

    def _describe(self, facts: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        settings = self.settings
        return {
            "task": "generation",
            **settings.model_dump(mode="json"),
            "prompts": len(self.prompts),
            "seeds": list(settings.all_seeds),
            "gamma": self.gamma,
            "suites": [name for name in dict.fromkeys(self.suite_of.values()) if name],
            **facts,
            "data": {**data, "heldout_rows": len(self.rows)}
            | ({"no_room_for_an_answer": self.num_too_long} if self.num_too_long else {}),
            "decoding": "sampling from the whole distribution at sampling_temperature (no top-k, top-p or penalties)",
            "intervals": f"95 %, percentiles of {RESAMPLES} bootstrap resamples of the held-out rows (of the prompts, "
            "for metrics of answers), the same resamples for every model; not of training seeds",
            "versions": versions("rouge-score", "sacrebleu"),
            "definitions": definitions("generation"),
        }

    def _heldout_lines(self) -> Iterator[dict[str, Any]]:
        row_ids = [row.id for row in self.rows]
        for name, table in self._tables.items():
            more: list[dict[str, Any]] = [{}] * len(row_ids)
            if name == SCALED and self._scaled is not None:
                more = [{"temperature": float(temperature)} for temperature in self._scaled.of_rows]
            for row_id, line, own in zip(row_ids, table.rows(row_ids), more, strict=True):
                yield {"model": name, **({"suite": self.suite_of[row_id]} if self.has_suites else {}), **line, **own}

    def _sample_lines(self) -> Iterator[dict[str, Any]]:
        seeds, per_seed = self.settings.all_seeds, self.settings.samples_per_prompt
        for name, by_temperature in self._pools.items():
            for temperature, pools in by_temperature.items():
                for row, pool in zip(self.prompts, pools, strict=True):
                    references = row.example.all_references
                    for number, answer in enumerate(pool):
                        yield {
                            "model": name,
                            "prompt_id": row.id,
                            "prompt": row.example.prompt_text,
                            "sampling_temperature": temperature,
                            "sample": number,
                            "text": answer.text,
                            "reference": references[0] if len(references) == 1 else list(references),
                            "num_tokens": answer.num_tokens,
                            "ended": answer.ended,
                            **_by_the_teacher(answer),
                            **({"seed": seeds[number // per_seed]} if len(seeds) > 1 else {}),
                            **({"suite": self.suite_of[row.id]} if self.has_suites else {}),
                        }


def _by_the_teacher(answer: Answer) -> dict[str, Any]:
    """What the teacher said of an answer; json has no infinity."""
    nll = answer.teacher_nll
    return {} if nll is None else {"teacher_nll": nll if math.isfinite(nll) else str(nll)}


def _usable(found: Temperatures | str, share: Share) -> Temperatures | None:
    """Temperatures that were found, or None with a warning that says why there are none, or what is odd about them."""
    text = found if isinstance(found, str) else found.scaling.note
    if text and share.is_first:
        _log.warning("Warning: logit_temperature: %s", text)
    return None if isinstance(found, str) else found


def choose_prompts(rows: Sequence[Row], count: int | None, suites: Sequence[str] | None = None) -> list[Row]:
    """Return ``count`` rows (of each suite; all, if there are fewer) selected by a hash of their ids, in their order.

    A file sorted by subject would otherwise give the first subject only; the choice does not depend on any seed.
    """
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(suites or [""] * len(rows)):
        groups.setdefault(name, []).append(number)
    chosen: list[int] = []
    for members in groups.values():
        chosen += sorted(members, key=lambda i: hash_of_id(rows[i].id))[:count]
    return [rows[i] for i in sorted(chosen)]


def _answerable(rows: Sequence[Row], settings: EvaluationConfig, room: Room) -> tuple[int, Sequence[Row]]:
    """The length of an answer, and the rows that can be answered; a given length holds for all of them."""
    if "max_new_tokens" in settings.model_fields_set:
        return settings.max_new_tokens, rows
    length = fit_answer(settings.max_new_tokens, room, min(map(_prompt_length, rows), default=0))
    if room.separate or room.decoder is None:
        return length, rows
    return length, [row for row in rows if _prompt_length(row) + length <= room.decoder]


def _prompt_length(row: Row) -> int:
    """Tokens of the prompt of an answer, in the longer of two renderings."""
    return max(len(row.sampling_ids), len(row.teacher_prompt_ids or ()))


def _mark(model: Measured) -> str:
    return cache_fingerprint(model) if isinstance(model, TeacherCache) else model_fingerprint(model)


def _as_read(name: str, rows: Sequence[Row]) -> Sequence[Row]:
    return [row.for_teacher for row in rows] if name == "teacher" else rows


def _merged(tables: Mapping[str, AnswerTable]) -> AnswerTable:
    """The tables of several suites as one."""
    merged = AnswerTable()
    for table in tables.values():
        merged.merge(table)
    return merged


def _table(values: Mapping[str, float | None], keys: Sequence[str] = KEYS) -> dict[str, float | None]:
    return {key: finite(values.get(key)) for key in keys}


def _ends(intervals: Mapping[str, Interval], keys: Sequence[str] = KEYS) -> dict[str, Interval]:
    return {key: intervals[key] for key in keys if key in intervals}


def _sweep(
    settings: EvaluationConfig, tables: Mapping[float, AnswerTable], resampled: Mapping[float, Resampled]
) -> list[SweepPoint]:
    points = [
        SweepPoint(
            temperature,
            _table(tables[temperature].compute(), ANSWER_KEYS),
            _ends(resampled[temperature].intervals(), ANSWER_KEYS),
        )
        for temperature in sorted(tables.keys() & {*settings.sweep})
    ]
    return points if len(points) > 1 else []


def _of_rows(metrics: Metrics, selected: np.ndarray) -> Metrics:
    """The metrics of some rows alone, as functions of how often each of them counts."""

    def of_these(weights: np.ndarray) -> Mapping[str, np.ndarray]:
        spread = np.zeros((len(weights), len(selected)))
        spread[:, selected] = weights
        return metrics(spread)

    return of_these


# Classification ---------------------------------------------------------------------------------------------------

_MEANS = ("accuracy", "nll", "confidence", "entropy")
_TEACHER_MEANS = ("agreement", "fkl", "rkl", "overconfidence", "target_gap", "teacher_confidence")


class Classification:
    """Metrics of class probabilities on every held-out text.

    Args:
        rows: the held-out texts.
        classes: the names of the classes, by number.
        settings: the ``seed`` of the resampling; nothing is sampled.
        pad_id: fills batches.
        share: of several processes, which divide the batches and have all numbers each.
    """

    def __init__(
        self,
        rows: Sequence[LabelledRow],
        classes: Sequence[str],
        settings: EvaluationConfig,
        *,
        pad_id: int,
        share: Share = ALONE,
    ) -> None:
        self.rows, self.classes, self.settings, self.pad_id, self.share = rows, classes, settings, pad_id, share
        self._logits: dict[str, Tensor] = {}
        self._scores: dict[str, ClassScores] = {}
        self._scaled: Temperatures | None = None

    def measure(self, name: str, model: Measured, report: Report, seconds: dict[str, float]) -> None:
        """Read the texts."""
        if not isinstance(model, TeacherCache):
            check_same_weights(name, model, self.share)
        with timed(seconds, "reading"):
            given: dict[str, Any] = {"pad_id": self.pad_id, "share": self.share, "whole": True}
            given["progress"] = report("reading", len(self.rows))
            if isinstance(model, TeacherCache):
                readout = read_cached(model, self.rows, **given)
            else:
                readout = read(model, self.rows, **given)
        self._logits[name] = readout.hidden
        self._scores[name] = class_scores(readout.hidden, readout.labels, self._logits.get("teacher"))
        if name == "student" and (wanted := self.settings.logit_temperature) is not None:
            self._scale(wanted, readout)

    def _scale(self, wanted: float | str, student: Readout) -> None:
        """Measure the student once more, with a temperature on its logits."""
        teacher = self._logits.get("teacher")
        wide = replace(student, hidden=student.hidden.double())
        other = None if teacher is None else replace(student, hidden=teacher.double())
        # Every process has all texts.
        found = temperatures_of(wanted, [row.id for row in self.rows], wide, other)
        self._scaled = _usable(found, self.share)
        if self._scaled is not None:
            scaled = wide.hidden / torch.from_numpy(self._scaled.of_rows).unsqueeze(1)
            self._scores[SCALED] = class_scores(scaled, student.labels, teacher)

    def is_to_judge(self) -> bool:
        """There is nothing to read."""
        return False

    def judge(self, teacher: PreTrainedModel, report: Report, seconds: dict[str, float]) -> None:
        """There is nothing to read."""

    def score(self, name: str, seconds: dict[str, float]) -> None:
        """There is nothing to compute without the model."""

    def evaluation(self, facts: Mapping[str, Any], data: Mapping[str, Any], seconds: Seconds) -> Evaluation:
        """The numbers of all models, with findings."""
        size, seed = len(self.rows), self.settings.seed
        resampled = {name: Resampled.of(scores.metrics, size, seed) for name, scores in self._scores.items()}
        numbers = Numbers(
            {name: _table({**metrics.points, "num_rows": size}, CLASS_KEYS) for name, metrics in resampled.items()},
            {name: _ends(metrics.intervals(), CLASS_KEYS) for name, metrics in resampled.items()},
        )
        settings = {
            "task": "classification",
            "seed": seed,
            **(
                {}
                if self.settings.logit_temperature is None
                else {"logit_temperature": self.settings.logit_temperature}
            ),
            **facts,
            "data": {**data, "heldout_rows": size},
            "intervals": f"95 %, percentiles of {RESAMPLES} bootstrap resamples of the held-out texts; not of seeds",
            "versions": versions(),
            "definitions": definitions("classification"),
        }
        width, mass = (
            {name: ReliabilityBins(*scores.bins(bins).reliability()) for name, scores in self._scores.items()}
            for bins in (width_bins, mass_bins)
        )
        evaluation = Evaluation(
            numbers,
            settings,
            "classification",
            classes=list(self.classes),
            reliability=Reliability(EDGES, width, mass),
            scaling=None if self._scaled is None else self._scaled.scaling,
            timing={name: {part: round(value, 2) for part, value in own.items()} for name, own in seconds.items()},
            lines={"predictions": list(self._prediction_lines())},
        )
        differences = {
            ("student", other): resampled["student"].minus(resampled[other]) for other in OTHERS if other in resampled
        }
        evaluation.findings.extend(of_evaluation(evaluation, differences))
        return evaluation

    def _prediction_lines(self) -> Iterator[dict[str, Any]]:
        """A line for each text: the classes of student and teacher, their confidence, and the student's numbers."""
        logp = {name: log_softmax(self._logits[name], 1.0) for name in ("student", "teacher") if name in self._logits}
        columns = self._scores["student"].columns
        scaled = {} if self._scaled is None else {**self._scores[SCALED].columns, "temperature": self._scaled.of_rows}
        for number, row in enumerate(self.rows):
            line: dict[str, Any] = {"id": row.id, "text": row.text, "label": self.classes[row.label]}
            for name, values in logp.items():
                best = int(values[number].argmax())
                line |= {name: self.classes[best], f"{name}_confidence": round(float(values[number, best].exp()), 4)}
            line["nll"] = finite(round(-float(logp["student"][number, row.label]), 4))
            for key in ("overconfidence", "target_gap"):
                if key in columns:
                    line[key] = round(float(columns[key][number]), 4)
            for key in ("confidence", "nll", "overconfidence", "target_gap"):
                if key in scaled:
                    line[f"{SCALED}_{key}"] = finite(round(float(scaled[key][number]), 4))
            if scaled:
                line[f"{SCALED}_temperature"] = float(scaled["temperature"][number])
            yield line


def class_scores(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> ClassScores:
    """Per-text numbers of class logits `[n, classes]` (the teacher's likewise, or None) and labels `[n]`."""
    values = token_statistics(logits.double(), None if teacher_logits is None else teacher_logits.double(), labels)
    names = _MEANS if teacher_logits is None else (*_MEANS, *_TEACHER_MEANS)
    columns = {name: getattr(values, name).double().numpy() for name in names}
    columns["brier"] = brier_score(logits.double().softmax(-1), labels).numpy()
    return ClassScores(columns, logits.argmax(-1).numpy(), labels.numpy(), logits.shape[-1])
