"""The memory of large tensors, which is kept for the next ones."""

import mmap

import pytest
import torch

from fastsiam import _packed

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="all memory comes from the C library here"
)
FLOATS = _packed.HUGE // 4


@pytest.fixture(autouse=True)
def _nothing_spare():
    _packed._SPARE.clear()
    yield
    _packed._SPARE.clear()


def test_memory_comes_back_when_nothing_reads_it():
    like = torch.empty(0)
    first = _packed.empty((2, FLOATS), like)
    at, part = first.data_ptr(), first[1, :3].fill_(7)
    del first
    # a part of it is still read
    second = _packed.empty((1, FLOATS), like)
    assert second.data_ptr() != at
    del part
    # less than there was
    third = _packed.empty((1, FLOATS + 1), like)
    assert third.data_ptr() == at
    assert third.shape == (1, FLOATS + 1)
    assert second.data_ptr() != at


def test_memory_that_is_too_small_is_dropped():
    like = torch.empty(0)
    gone = _packed.empty((1, FLOATS), like)
    del gone
    assert len(_packed._SPARE) == 1
    larger = _packed.empty((2, FLOATS), like)
    assert not _packed._SPARE
    assert larger.numel() == 2 * FLOATS


def test_no_more_is_kept_than_two_layers_take():
    tensors = [_packed.empty((1, FLOATS), torch.empty(0)) for _ in range(8)]
    tensors.clear()
    assert len(_packed._SPARE) == 6


def test_small_tensors_and_those_of_another_dtype():
    assert _packed.empty((3, 2), torch.empty(0)).shape == (3, 2)
    double = _packed.empty((FLOATS,), torch.empty(0, dtype=torch.float64))
    assert double.dtype == torch.float64
    assert double.shape == (FLOATS,)
