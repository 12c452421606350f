"""The teacher's likelihood of answers, against a plain forward pass over the whole row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from drkl.data import Example
from drkl.data.tokenize import tokenize_examples
from drkl.evaluation.answers import Answer
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.declared import TEACHER_NLL
from drkl.evaluation.evaluate import run_task
from drkl.evaluation.judging import nll_of_answers
from drkl.evaluation.store import Store
from drkl.evaluation.tasks import Generation, Parts
from drkl.models.ends import answer_start, stops_of
from drkl.models.forward import decoder_start
from drkl.models.generate import sample_texts
from tests.evaluation import tiny
from tests.models import tiny as families

SETTINGS = EvaluationConfig(prompts=4, samples_per_prompt=3, max_new_tokens=6, seed=1, sweep=(0.5, 1.0))

pytestmark = pytest.mark.usefixtures("few_resamples")


def evaluate(settings: EvaluationConfig = SETTINGS, models: Any = None, **changes: Any) -> Any:
    models = models or {"teacher": tiny.llama, "before": lambda: tiny.llama(1), "student": lambda: tiny.llama(3)}
    return run_task(Generation(tiny.tokenizer(), tiny.rows(8), settings, pad_id=0, **changes), models)


def by_hand(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...], begin: list[int]) -> float:
    """Of a whole row by itself: no batch, no padding."""
    if (start := decoder_start(model)) is not None:
        read = torch.tensor([[start, *begin, *answer[:-1]]])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=read).logits[0, len(begin) :]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
    logp = log_softmax(logits.detach().double().numpy(), -1)
    return float(-logp[np.arange(len(answer)), list(answer)].sum())


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_it_is_the_log_softmax_of_a_plain_forward_pass(family: str) -> None:
    tokens = families.tokenizer()
    teacher, student = (getattr(families, family)(seed).double().eval() for seed in (1, 2))
    turns = [
        ({"role": "user", "content": f"w{i} w{2 * i}"}, {"role": "assistant", "content": "w1 w2"}) for i in range(3)
    ]
    rows, _ = tokenize_examples(
        [Example(f"id-{i}", turn) for i, turn in enumerate(turns)], tokens, max_prompt_tokens=20, max_tokens=40,
        encoder_decoder=family != "llama",
    )  # fmt: skip
    begin = answer_start(student, tokens)
    made = sample_texts(
        student, tokens, [row.sampling_ids for row in rows], samples_per_prompt=2, max_new_tokens=7,
        stop_ids=stops_of(student, tokens),
    )  # fmt: skip
    pools = [[Answer(one.text, one.num_tokens, one.finished, one.token_ids) for one in pool] for pool in made]
    found = nll_of_answers(teacher, rows, pools, pad_id=0, begin=begin)
    expected = [
        by_hand(teacher, row.sampling_ids, one.token_ids, begin)
        for row, pool in zip(rows, pools, strict=True)
        for one in pool
    ]
    assert found == pytest.approx(expected, rel=1e-5)


def test_tokens_that_the_teacher_has_not_and_those_that_are_one_class() -> None:
    [row, *_] = tiny.rows(1)
    model = tiny.llama()
    pool = [Answer("", 2, False, (7, 9)), Answer("", 2, False, (7, tiny.VOCAB)), Answer("", 2, False, (7, 60))]
    found = nll_of_answers(model, [row], [pool], pad_id=0, vocab_size=50)
    assert found[1:] == [math.inf, math.inf] and math.isfinite(found[0])
    logits = model(input_ids=torch.tensor([[*row.sampling_ids, 7]])).logits[0, -2:].detach().numpy()
    logp = log_softmax(logits, -1)
    [merged] = nll_of_answers(model, [row], [pool[:1]], pad_id=0, merged_ids=(9, 11))
    assert merged == pytest.approx(-logp[0, 7] - np.logaddexp(logp[1, 9], logp[1, 11]), rel=1e-9)


def test_every_model_s_answers_at_temperature_1_are_read() -> None:
    found = evaluate()
    lines = {(line["model"], line["sampling_temperature"]): [] for line in found.samples}
    for line in found.samples:
        lines[line["model"], line["sampling_temperature"]].append(line)
    assert set(lines) == {(m, 1.0) for m in ("teacher", "before", "student")} | {("teacher", 0.5), ("student", 0.5)}
    for (model, temperature), own in lines.items():
        assert all(("teacher_nll" in line) == (temperature == 1) for line in own)
        if temperature == 1:
            total = math.fsum(line["teacher_nll"] for line in own) / sum(line["num_tokens"] for line in own)
            assert found.value(model, TEACHER_NLL) == pytest.approx(total, rel=1e-12)
            low, high = found.interval(model, TEACHER_NLL)
            assert low < total < high
    assert [point.values[TEACHER_NLL] is None for point in found.sweep["student"]] == [True, False]
    assert found.value("teacher", TEACHER_NLL) < found.value("student", TEACHER_NLL)


@pytest.mark.slow
def test_its_own_value_is_the_entropy_of_what_it_writes() -> None:
    settings = EvaluationConfig(prompts=8, samples_per_prompt=60, max_new_tokens=1, sweep=())
    found = evaluate(settings, {"teacher": tiny.llama, "student": tiny.llama})
    model, entropies = tiny.llama(), []
    for row in tiny.rows(8):
        logp = log_softmax(model(input_ids=torch.tensor([row.sampling_ids])).logits[0, -1].detach().numpy())
        entropies.append(-(np.exp(logp) * logp).sum())
    low, high = found.interval("teacher", TEACHER_NLL)
    assert low < np.mean(entropies) < high
    assert found.value("student", TEACHER_NLL) == found.value("teacher", TEACHER_NLL)


@pytest.mark.slow
def test_other_temperatures_are_not_read() -> None:
    found = evaluate(SETTINGS.model_copy(update={"sampling_temperature": 0.7}))
    assert found.value("student", TEACHER_NLL) is None and "answers" in found.timing["teacher"]
    assert [point.values[TEACHER_NLL] is None for point in found.sweep["student"]] == [True, False]


@pytest.mark.slow
def test_what_was_read_is_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Store(tmp_path / "shared")
    few = SETTINGS.model_copy(update={"prompts": 2, "samples_per_prompt": 2, "max_new_tokens": 3, "sweep": ()})
    first = evaluate(few, parts=Parts(Store(tmp_path / "own"), shared))
    read: list[int] = []

    def counted(*given: Any, **named: Any) -> list[float]:
        read.append(sum(map(len, given[2])))
        return nll_of_answers(*given, **named)

    monkeypatch.setattr("drkl.evaluation.tasks.nll_of_answers", counted)
    again = evaluate(few, parts=Parts(Store(tmp_path / "own"), shared))
    assert not read and "answers" not in again.timing["teacher"]
    assert again.numbers == first.numbers and again.samples == first.samples
    evaluate(few, parts=Parts(Store(tmp_path / "other"), shared))
    assert read == [4, 4], "before's and the student's: the teacher's own are in the shared parts"
