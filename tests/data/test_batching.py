from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drkl.data.batching import bucket_by_length, plan_epochs, split_by_cost, split_rows
from drkl.errors import DrklError

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def plan_steps(lengths: list[int], *, num_steps: int, **settings: Any) -> list[list[int]]:
    """The first steps of a plan, over as many epochs as that takes."""
    return list(islice(chain.from_iterable(plan_epochs(lengths, **settings)), num_steps))


@given(LENGTHS, st.integers(1, 200), st.integers(0, 60), st.integers(0, 5))
def test_budgets_hold_and_epochs_are_whole(lengths: list[int], budget: int, num_steps: int, seed: int) -> None:
    steps = plan_steps(lengths, tokens_per_step=budget, num_steps=num_steps, seed=seed)
    assert len(steps) == num_steps
    epoch: list[int] = []
    for step in steps:
        padded = max(lengths[i] for i in step) * len(step)
        assert padded <= budget or len(step) == 1
        epoch += step
        assert len(epoch) == len(set(epoch)) and len(epoch) <= len(lengths)
        if len(epoch) == len(lengths):
            epoch = []


@given(LENGTHS, st.integers(1, 200))
def test_buckets_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    buckets = bucket_by_length(lengths, budget)
    assert sorted(chain.from_iterable(buckets)) == list(range(len(lengths)))
    assert [lengths[i] for i in chain.from_iterable(buckets)] == sorted(lengths)
    for bucket in buckets:
        assert len(bucket) == 1 or max(lengths[i] for i in bucket) * len(bucket) <= budget
    # Greedy: no row would have fitted into the batch before its own.
    for before, after in pairwise(buckets):
        assert lengths[after[0]] * (len(before) + 1) > budget


@given(LENGTHS, st.integers(1, 200))
def test_packed_buckets_count_tokens(lengths: list[int], budget: int) -> None:
    buckets = bucket_by_length(lengths, budget, packed=True)
    assert [lengths[i] for i in chain.from_iterable(buckets)] == sorted(lengths)
    sizes = [sum(lengths[i] for i in bucket) for bucket in buckets]
    assert all(len(bucket) == 1 or size <= budget for bucket, size in zip(buckets, sizes, strict=True))
    assert all(size + lengths[after[0]] > budget for size, after in zip(sizes, buckets[1:], strict=False))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 4))
def test_packed_parts_are_cut_where_the_largest_has_fewest_tokens(lengths: list[int], parts: int) -> None:
    cut = split_by_cost(lengths, parts, packed=True)
    assert list(chain.from_iterable(cut)) == list(range(len(lengths))) and len(cut) == parts
    assert sum(map(bool, cut)) == min(parts, len(lengths))
    places = itertools.combinations(range(1, len(lengths)), min(parts, len(lengths)) - 1)
    ways = ([0, *inner, len(lengths)] for inner in places)
    least = min(max(sum(lengths[a:b]) for a, b in pairwise(ends)) for ends in ways)
    assert max(sum(lengths[i] for i in part) for part in cut) == least


@given(LENGTHS, st.integers(1, 200), st.integers(0, 5))
def test_a_plan_is_repeatable_and_fewer_steps_are_its_beginning(lengths: list[int], budget: int, seed: int) -> None:
    long = plan_steps(lengths, tokens_per_step=budget, num_steps=40, seed=seed)
    assert long == plan_steps(lengths, tokens_per_step=budget, num_steps=40, seed=seed)
    assert long[:7] == plan_steps(lengths, tokens_per_step=budget, num_steps=7, seed=seed)


@given(LENGTHS, st.integers(1, 200), st.integers(0, 5))
def test_the_same_batches_every_epoch(lengths: list[int], budget: int, seed: int) -> None:
    words = {"tokens_per_step": budget, "seed": seed}
    first = plan_steps(lengths, num_steps=len(lengths), **words)
    count = int(np.cumsum([len(step) for step in first]).tolist().index(len(lengths))) + 1
    plan = plan_steps(lengths, num_steps=3 * count, same_batches=True, **words)
    assert plan[:count] == first[:count]
    for epoch in (plan[count : 2 * count], plan[2 * count :]):
        assert sorted(epoch) == sorted(first[:count])
    if count > 6:
        assert plan[:count] != plan[count : 2 * count] != plan[2 * count :]
    shorter = plan_steps(lengths, num_steps=count + 1, same_batches=True, **words)
    assert shorter == plan[: count + 1]


def skewed(count: int) -> list[int]:
    return np.random.default_rng(0).lognormal(4.4, 0.5, count).astype(int).clip(8, 400).tolist()


def epochs(lengths: list[int], budget: int, seed: int) -> list[list[list[int]]]:
    """The first two epochs of a plan."""
    steps = plan_steps(lengths, tokens_per_step=budget, num_steps=2 * len(lengths), seed=seed)
    ends = np.cumsum([len(step) for step in steps]).tolist()
    first, second = ends.index(len(lengths)) + 1, ends.index(2 * len(lengths)) + 1
    return [steps[:first], steps[first:second]]


@pytest.mark.parametrize("budget", [512, 1024, 4096])
def test_little_padding_and_even_steps(budget: int) -> None:
    lengths = skewed(2000)
    for steps in epochs(lengths, budget, seed=3):
        padded = [max(lengths[i] for i in step) * len(step) for step in steps]
        assert 1 - sum(lengths) / sum(padded) < 0.06
        assert np.mean(padded) > 0.85 * budget


def test_epochs_and_seeds_shuffle_differently() -> None:
    lengths = skewed(300)
    one, two = epochs(lengths, 1024, seed=0)
    other, _ = epochs(lengths, 1024, seed=1)
    as_sets = [{frozenset(step) for step in plan} for plan in (one, two, other)]
    assert len(as_sets[0] & as_sets[1]) < len(one) / 10
    assert len(as_sets[0] & as_sets[2]) < len(one) / 10


def test_steps_do_not_come_in_order_of_length() -> None:
    lengths = skewed(2000)
    (steps, _) = epochs(lengths, 1024, seed=0)
    longest = [max(lengths[i] for i in step) for step in steps]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2


def test_a_row_over_the_budget_is_its_own_step() -> None:
    steps = plan_steps([5, 100, 5], tokens_per_step=20, num_steps=2, seed=0)
    assert sorted(sorted(step) for step in steps) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("lengths", "budget", "message"),
    [([], 10, "no rows to plan"), ([3], 0, "tokens_per_step must be at least 1, got 0")],
)
def test_bad_plans(lengths: list[int], budget: int, message: str) -> None:
    with pytest.raises(DrklError, match=message):
        plan_steps(lengths, tokens_per_step=budget, num_steps=1, seed=0)


@given(st.lists(st.integers(), max_size=30), st.integers(1, 12))
def test_split_rows(rows: list[int], parts: int) -> None:
    split = split_rows(rows, parts)
    assert list(chain(*split)) == rows
    sizes = [len(part) for part in split]
    assert len(split) == parts and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_split_rows_needs_a_part() -> None:
    with pytest.raises(DrklError, match="at least 1 part, got 0"):
        split_rows([1], 0)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "lengths", [[], [7], [3, 3], [1, 1, 1, 1, 2, 4], [9, 8, 5, 5, 2, 1, 1], [4, 1, 6, 2, 2, 9, 1], [5] * 8]
)
def test_the_costliest_of_contiguous_parts_costs_as_little_as_it_can(lengths: list[int], parts: int) -> None:
    def cost(rows: Sequence[int]) -> int:
        return len(rows) * max((lengths[row] for row in rows), default=0)

    cut = split_by_cost(lengths, parts)
    assert len(cut) == parts and [row for part in cut for row in part] == list(range(len(lengths)))
    assert sum(bool(part) for part in cut) == min(parts, len(lengths))
    places = range(len(lengths) + 1)
    every = (
        [range(a, b) for a, b in itertools.pairwise((0, *ends, len(lengths)))]
        for ends in itertools.combinations_with_replacement(places, parts - 1)
    )
    assert max(map(cost, cut)) == min(max(map(cost, other)) for other in every)


def test_split_by_cost_needs_a_part() -> None:
    with pytest.raises(DrklError, match="at least 1 part, got 0"):
        split_by_cost([1], 0)
