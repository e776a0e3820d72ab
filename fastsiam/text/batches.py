"""Batches of pair indices: grouped by length for training, in order for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

POOL = 32  # batches sorted together: long enough for even lengths, short enough to stay random


def grouped_batches(
    left_lengths: Tensor, right_lengths: Tensor, batch_size: int, generator: torch.Generator
) -> list[Tensor]:
    """Shuffle the pairs into batches of nearly equal length.

    The pairs are shuffled, sorted by length within pools of 32 batches, cut, and the batches are
    shuffled: every epoch sees other batches, and little of a batch is padding.

    Args:
        left_lengths: [N] integer, tokens of the first sentences.
        right_lengths: [N] integer, tokens of the second sentences.
        batch_size: pairs a batch, at least 1; one batch may be smaller.
        generator: CPU generator; its state decides the order and moves on.

    Returns:
        Index tensors, int64, that hold each of 0..N-1 once.

    Raises:
        ValueError: the two sides differ in shape, or `batch_size` is below 1.
    """
    if left_lengths.ndim != 1 or left_lengths.shape != right_lengths.shape:
        raise ValueError(
            "grouped_batches: left_lengths and right_lengths must be [N] of one size, "
            f"got {list(left_lengths.shape)} and {list(right_lengths.shape)}"
        )
    _check_batch_size("grouped_batches", batch_size)
    # both sides share the time loop, so the longer one counts first
    longer = torch.maximum(left_lengths, right_lengths).cpu().long()
    shorter = torch.minimum(left_lengths, right_lengths).cpu().long()
    key = longer * (int(shorter.max()) + 1 if len(shorter) else 1) + shorter
    order = torch.randperm(len(key), generator=generator)
    batches: list[Tensor] = []
    for start in range(0, len(order), POOL * batch_size):
        pool = order[start : start + POOL * batch_size]
        batches += _cut(pool[torch.argsort(key[pool], stable=True)], batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def ordered_batches(count: int, batch_size: int) -> list[Tensor]:
    """Cut 0..count-1 into batches in order.

    Args:
        count: number of pairs, at least 0.
        batch_size: pairs a batch, at least 1; the last batch may be smaller.

    Returns:
        Index tensors, int64.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    _check_batch_size("ordered_batches", batch_size)
    return _cut(torch.arange(count, device="cpu"), batch_size)


def _cut(indices: Tensor, size: int) -> list[Tensor]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _check_batch_size(who: str, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"{who}: batch_size must be at least 1, got {batch_size}")
