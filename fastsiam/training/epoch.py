"""One pass over the pairs: the step that every training takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastsiam.training.guard import Guard
from fastsiam.training.running import Running
from fastsiam.training.world import World

Precision = Literal["float32", "bf16"]


def run_epoch(
    objective: nn.Module,
    source: Any,
    batches: Iterable[Any],
    optimizer: Optimizer,
    schedule: LRScheduler,
    *,
    clip: float = math.inf,
    precision: Precision = "float32",
    guard: Guard | None = None,
    running: Running | None = None,
    world: World | None = None,
    after_step: Callable[[int], bool] = lambda _: True,
) -> Running:
    """Make one step for each of the batches.

    Args:
        objective: called with a batch, returns an `Output`.
        source: its `batch(rows, device)` makes a batch.
        batches: the rows of each.
        optimizer: holds the parameters to train.
        schedule: moved on after each step, a skipped one too.
        clip: largest norm of the gradient.
        precision: as for `fit`.
        guard: skips bad steps; None: a new one.
        running: sums to go on with; None: new ones.
        world: the processes that share each batch; `objective` was wrapped by it.
        after_step: called with the number of pairs; False ends the loop.

    Returns:
        The sums.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    world = world or World()
    guard = guard or Guard(device)
    running = running or Running(device)
    for rows in batches:
        mine, weight = world.share(rows)
        batch = source.batch(mine, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = objective(batch)
        loss = output.loss if weight == 1 else output.loss * weight
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(parameters, clip)
        # every process must come to the same verdict, so each sees the loss of all
        good = guard.judge(world.sum(loss.detach()), norm)
        guard.step(optimizer, good)
        schedule.step()
        if weight:
            running.add(output, norm, good)
        if not after_step(len(rows)):
            break
    return running
