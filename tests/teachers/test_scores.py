"""What is read from a server's answer, and every way in which it may be none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from drkl.teachers.scores import NOTHING, Odd, as_topk, read_scores

PROMPT = [5, 2, 0, 3]
P = np.array([[0.5, 0.2, 0.1, 0.1, 0.06, 0.04], [0.01, 0.9, 0.03, 0.03, 0.02, 0.01], [1e-9, 1e-9, 1, 1e-9, 1e-9, 1e-9]])
"""Probabilities of six tokens, at the places of PROMPT that have one after them."""


def entry(place: int, k: int, token: int) -> dict[str, Any]:
    """As vLLM writes it: the k best, and the token that stands there."""
    best = sorted(range(6), key=lambda i: (-P[place, i], i))[:k]
    return {str(i): {"logprob": float(np.log(P[place, i])), "rank": 1} for i in dict.fromkeys([token, *best])}


def answer(k: int = 3, **changes: Any) -> dict[str, Any]:
    entries: Any = [None, *(entry(place, k, token) for place, token in enumerate(PROMPT[1:]))]
    return {"choices": [{"index": 0, "prompt_logprobs": entries, "prompt_token_ids": PROMPT} | changes]}


def read(body: Any, positions: Any = (0, 1, 2), **changes: Any) -> Any:
    settings: dict[str, Any] = {"k": 3, "vocab_size": 6, "served_ids": 6} | changes
    return read_scores(body, PROMPT, positions, **settings)


def test_the_k_best_the_rest_and_the_token_that_follows() -> None:
    found = read(answer(), positions=(0, 1))
    # Of equal ones that of the lower id; the token that stands there may be beyond the k.
    assert found.ids.tolist() == [[0, 1, 2], [1, 2, 3]]
    np.testing.assert_allclose(found.logp, np.log([[0.5, 0.2, 0.1], [0.9, 0.03, 0.03]]), rtol=1e-6)
    np.testing.assert_allclose(found.log_rest, np.log([0.2, 0.04]), rtol=1e-6)
    np.testing.assert_allclose(found.observed, np.log([0.1, 0.01]), rtol=1e-6)


def test_what_is_below_the_resolution_is_the_resolution() -> None:
    found = read(answer(), positions=(2,))
    assert found.log_rest.tolist() == [pytest.approx(math.log(2.0**-23))]


def test_tokens_that_are_not_shared_count_as_rest() -> None:
    found = read(answer(), positions=(1,), vocab_size=3)
    assert found.ids.tolist() == [[1, 2, -1]] and found.logp[0, 2] == -np.inf
    np.testing.assert_allclose(np.exp(found.log_rest), [0.07], rtol=1e-5)
    np.testing.assert_allclose(found.observed, np.log([0.01]), rtol=1e-6)


def test_where_every_token_is_known_nothing_is_left() -> None:
    found = read(answer(k=6), positions=(0,), k=6)
    assert found.log_rest.tolist() == [-math.inf]


def test_no_probability_is_a_number() -> None:
    body = answer()
    body["choices"][0]["prompt_logprobs"][1]["2"]["logprob"] = -math.inf
    body["choices"][0]["prompt_logprobs"][1]["5"] = -(10**400)
    assert read(body, positions=(0,)).observed[0] == NOTHING


def test_rows_are_joined() -> None:
    parts = [read(answer(), positions=(0,)), read(answer(), positions=(1, 2))]
    known = as_topk(parts, 3, 6, labelled=True)
    assert known.ids.tolist() == [[0, 1, 2], [1, 2, 3], [2, 0, 1]] and known.vocab_size == 6
    assert known.log_rest.shape == (3, 1) and known.label_logits is not None
    assert as_topk(parts, 3, 6, labelled=False).label_logits is None
    assert len(as_topk([], 3, 6, labelled=True)) == 0


def changed(place: int, **values: Any) -> dict[str, Any]:
    body = answer()
    body["choices"][0]["prompt_logprobs"][place] |= {name.removeprefix("t"): value for name, value in values.items()}
    return body


def without(token: int) -> dict[str, Any]:
    body = answer()
    del body["choices"][0]["prompt_logprobs"][1][str(token)]
    return body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, r"not the one choice"),
        ({"choices": []}, r"not the one choice"),
        ({"choices": [{}, {}]}, r"not the one choice"),
        ({"choices": ["a"]}, r"not the one choice"),
        (answer(index=1), r"its choice is not the first"),
        (answer(prompt_token_ids=[1, *PROMPT]), r"another prompt than it was asked"),
        (answer(prompt_logprobs=None), r"no prompt_logprobs; the server does not give"),
        (answer(prompt_logprobs=answer()["choices"][0]["prompt_logprobs"][:-1]), r"3 entries, and the prompt 4 tokens"),
        (answer(prompt_logprobs=[None] * 4), r"entry 1 has no log-probabilities"),
        (answer(prompt_logprobs=answer()["choices"][0]["prompt_logprobs"][::-1]), r"entry 3 has no log-probabilities"),
        (without(2), r"entry 1 has no log-probability of the token that stands there, 2"),
        (answer(k=1), r"entry 1 has 2 of 3 tokens; start it with --max-logprobs 3"),
        (changed(1, t0={"logprob": math.nan}), r"a log-probability that is no number"),
        (changed(1, t0={"logprob": None}), r"a log-probability that is no number"),
        (changed(1, t0={"logprob": True}), r"a log-probability that is no number"),
        (changed(1, t0={"logprob": "-1"}), r"a log-probability that is no number"),
        (changed(1, t0={"logprob": 12.5}), r"the log-probability 12\.5, above 0; .*--logprobs-mode raw_logprobs"),
        (changed(1, t0={"logprob": math.inf}), r"the log-probability inf, above 0"),
        (changed(1, t1={"logprob": -0.1}), r"probabilities that add up to 1\.5"),
        (changed(1, t6={"logprob": -9.0}), r"the token 6, and the teacher's vocabulary 6"),
        (changed(1, t99999999999999999999={"logprob": -9.0}), r"has '9{20}' where a token id was expected"),
        (changed(1, t2147483648={"logprob": -9.0}), r"has '2147483648' where a token id was expected"),
        (changed(1, t00={"logprob": -9.0}), r"has '00' where a token id was expected"),
        (changed(1, **{"-1": {"logprob": -9.0}}), r"has '-1' where a token id was expected"),
        (changed(1, **{"ein": {"logprob": -9.0}}), r"has 'ein' where a token id was expected"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none(body: Any, message: str) -> None:
    with pytest.raises(Odd, match=message):
        read(body)


def test_no_token_that_both_models_have() -> None:
    with pytest.raises(Odd, match=r"none of the 3 tokens in entry 2 is among the 1 that both.*larger top_k"):
        read(answer(), positions=(1,), vocab_size=1)
