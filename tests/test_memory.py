"""The memory of large tensors goes back to the system with the last tensor that reads it."""

import mmap
import os
from pathlib import Path

import pytest
import torch

from fastsiam.engine.cpu import HUGE, empty

FLOATS = HUGE // 4


def resident():
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    not (hasattr(mmap, "MADV_HUGEPAGE") and Path("/proc/self/statm").exists()),
    reason="it is read where Linux has it",
)
def test_memory_goes_back():
    before = resident()
    tensor = empty((4, FLOATS), torch.empty(0))
    tensor.zero_()
    part = tensor[1, :3]
    del tensor
    assert resident() - before > 3 * HUGE
    part.fill_(7)
    del part
    assert resident() - before < HUGE


def test_shapes_and_dtypes():
    assert empty((3, 2), torch.empty(0)).shape == (3, 2)
    for dtype in (torch.float32, torch.float64):
        large = empty((2, FLOATS), torch.empty(0, dtype=dtype))
        assert large.dtype == dtype
        assert large.shape == (2, FLOATS)
        assert large.is_contiguous()
