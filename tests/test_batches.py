"""Batches: each pair once, lengths together, one order per seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsiam.training.batches import grouped_batches


def generator(seed):
    return torch.Generator().manual_seed(seed)


LENGTHS = st.lists(st.tuples(st.integers(0, 73), st.integers(0, 73)), max_size=200)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 50), st.integers(0, 2**32))
def test_each_pair_once(lengths, batch_size, seed):
    left, right = torch.tensor(lengths, dtype=torch.int64).reshape(-1, 2).unbind(1)
    batches = grouped_batches(left, right, batch_size, generator(seed))
    indices = [index for batch in batches for index in batch.tolist()]
    assert sorted(indices) == list(range(len(lengths)))
    sizes = sorted(len(batch) for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)
    assert all(size == batch_size for size in sizes[1:])
    again = grouped_batches(left, right, batch_size, generator(seed))
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in batches]


def padding(batches, left, right):
    longer = torch.maximum(left, right)
    return sum(int((longer[b].max() - longer[b]).sum()) for b in batches)


def test_lengths_stand_together():
    left, right = torch.randint(1, 40, (2, 2000), generator=generator(0))
    grouped = grouped_batches(left, right, 32, generator(1))
    shuffled = torch.randperm(2000, generator=generator(2)).split(32)
    assert padding(grouped, left, right) < 0.05 * padding(shuffled, left, right)


def test_epochs_differ_and_batches_come_in_no_order():
    left = torch.arange(640) % 37
    state = generator(0)
    first, second = (grouped_batches(left, left, 32, state) for _ in range(2))
    assert {tuple(b.tolist()) for b in first}.isdisjoint(tuple(b.tolist()) for b in second)
    means = [float(left[batch].float().mean()) for batch in first]
    assert means != sorted(means)


def test_int32_lengths_do_not_overflow():
    left = torch.tensor([100_000, 99_999], dtype=torch.int32)
    batches = grouped_batches(left, left, 1, generator(0))
    assert sorted(int(batch) for batch in batches) == [0, 1]


def test_bad_arguments():
    ones = torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"of one size, got \[3\] and \[2\]"):
        grouped_batches(ones, ones[:2], 2, generator(0))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        grouped_batches(ones, ones, 0, generator(0))
