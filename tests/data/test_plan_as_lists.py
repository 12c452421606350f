"""The plan of steps in arrays is the plan that lists give: batches of published runs stay what they are."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drkl.data.batching import Steps, bucket_by_length, plan_epochs
from drkl.training.checkpoints import plan_digest

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=90)


def listed_epoch(lengths: list[int], budget: int, generator: np.random.Generator) -> list[list[int]]:
    order = generator.permutation(len(lengths)).tolist()
    mean = max(1.0, sum(lengths) / len(lengths))
    window = max(1, round(min(32 * budget / mean, 0.5 * len(lengths))))
    steps: list[list[int]] = []
    longest = 0
    for start in range(0, len(order), window):
        down = start // window % 2 == 1
        for row in sorted(order[start : start + window], key=lambda i: lengths[i], reverse=down):
            longest = max(longest, lengths[row])
            if steps and longest * (len(steps[-1]) + 1) <= budget:
                steps[-1].append(row)
            else:
                steps.append([row])
                longest = lengths[row]
    return [steps[i] for i in generator.permutation(len(steps)).tolist()]


@given(LENGTHS, st.integers(1, 200), st.integers(0, 5), st.booleans())
def test_token_budgets(lengths: list[int], budget: int, seed: int, same: bool) -> None:
    found = islice(plan_epochs(lengths, tokens_per_step=budget, seed=seed, same_batches=same), 3)
    first: list[list[int]] = []
    for epoch, steps in enumerate(found):
        generator = np.random.default_rng([seed, epoch])
        if same and epoch:
            assert steps == [first[i] for i in generator.permutation(len(first)).tolist()]
            continue
        expected = listed_epoch(lengths, budget, generator)
        first = first or expected
        assert steps == expected and list(steps) == expected


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5), st.booleans())
def test_counted_rows(num_rows: int, size: int, seed: int, drop: bool) -> None:
    order = np.random.default_rng([seed, 0]).permutation(num_rows).tolist()
    expected = [order[i : i + size] for i in range(0, num_rows, size)]
    if drop and len(expected[-1]) < size:
        expected.pop()
    if expected:
        assert next(plan_epochs([3] * num_rows, rows_per_step=size, seed=seed, drop_last=drop)) == expected


@given(LENGTHS, st.integers(1, 200))
def test_buckets(lengths: list[int], budget: int) -> None:
    expected: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if expected and lengths[index] * (len(expected[-1]) + 1) <= budget:
            expected[-1].append(index)
        else:
            expected.append([index])
    assert bucket_by_length(lengths, budget) == expected


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6), st.slices(6))
def test_steps_are_their_lists(lists: list[list[int]], part: slice) -> None:
    steps = Steps.of(lists)
    assert list(steps) == lists and steps == lists and len(steps) == len(lists)
    assert steps[part] == lists[part] and [steps[-i - 1] for i in range(len(lists))] == lists[::-1]
    assert Steps.joined([steps, steps]) == lists + lists and steps != [*lists, [1]]
    assert all(type(number) is int for step in steps for number in step)


def test_the_digest_of_a_plan_is_that_of_earlier_checkpoints() -> None:
    steps = Steps.of([[3, 10], [0], [2, 1]])
    assert plan_digest(steps) == plan_digest([[3, 10], [0], [2, 1]])
    # sha256 of the text "[[3, 10], [0], [2, 1]]"
    assert plan_digest(steps) == "874ba48da6e4da69bbc34d2c7f4b0d769fd81cd3df561a95976980f4df3f55e0"
    assert plan_digest([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"


def test_an_empty_step_has_no_place() -> None:
    with pytest.raises(IndexError):
        Steps.of([])[0]
