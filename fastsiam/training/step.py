"""One training step; a step whose loss or gradient is not finite changes nothing."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastsiam.training.objective import Output
from fastsiam.training.world import World

Precision = Literal["float32", "bf16"]

LIMIT = 10  # skipped steps in a row after which a run makes no further ones


class NotFiniteError(ValueError):
    """`LIMIT` steps in a row had a loss or a gradient that is not finite."""


def train_step(
    objective: nn.Module,
    batch: Any,
    optimizer: Optimizer,
    schedule: LRScheduler,
    guard: Guard,
    *,
    clip: float = math.inf,
    precision: Precision = "float32",
    world: World | None = None,
    weight: float = 1.0,
) -> tuple[Output, Tensor, Tensor]:
    """Make one step, without waiting for the device.

    Args:
        objective: called with a batch, returns an `Output`.
        batch: this process's share of the pairs.
        optimizer: holds the parameters to train.
        schedule: moved on after the step, a skipped one too.
        guard: skips the step where its loss or gradient is not finite.
        clip: largest norm of the gradient.
        precision: as for `fit`.
        world: the processes that share each batch; `objective` was wrapped by it.
        weight: of this share's mean loss in that of all, from `World.share`.

    Returns:
        The output, the gradient's norm before clipping, [], and whether the step counted, bool [].
    """
    world = world or World()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = objective(batch)
    loss = output.loss if weight == 1 else output.loss * weight
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_(parameters, clip)
    # every process must come to the same verdict, so each sees the loss of all
    good = guard.judge(world.sum(loss.detach()), norm)
    guard.step(optimizer, good)
    schedule.step()
    return output, norm, good


class Guard:
    """Skips bad steps and counts them where the loss is computed.

    Whether a step counts is a tensor on the device, and so are the counts: the host reads them
    when it wants to, and no step waits for that. After `LIMIT` bad steps in a row every later one
    is skipped as well, so that however late the host looks, the weights are still those of the
    last good step.

    Args:
        device: where the loss is computed.
    """

    def __init__(self, device: torch.device) -> None:
        # skipped so far, skipped in a row just now, the longest such row
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return whether the step counts, a bool tensor [], and count it."""
        skipped, row, longest = self._counts
        good: Tensor = torch.isfinite(loss) & torch.isfinite(norm) & (longest < LIMIT)
        row = torch.where(good, 0, row + 1)
        self._counts = torch.stack([skipped + ~good, row, torch.maximum(longest, row)])
        return good

    def step(self, optimizer: Optimizer, good: Tensor) -> None:
        """Make a step of the optimizer; unless `good`, its weights and its state do not change.

        PyTorch's fused optimizers read a flag on the device themselves. For any other, the step is
        made and undone by `torch.where`; state that it makes in a bad first step becomes zero.
        """
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            fused: Any = optimizer
            fused.grad_scale, fused.found_inf = None, (~good).float()
            optimizer.step()
            del fused.grad_scale, fused.found_inf
            return
        before = {id(t): t.detach().clone() for t in _moved(optimizer)}
        optimizer.step()
        with torch.no_grad():
            for tensor in _moved(optimizer):
                old = before.get(id(tensor), torch.zeros((), device=tensor.device))
                # a step count may live on the CPU beside weights on the device
                keep = good if tensor.device == good.device else good.to(tensor.device)
                tensor.copy_(torch.where(keep, tensor, old.to(tensor.dtype)))

    def look(self) -> tuple[int, bool]:
        """Return how many steps were skipped, and whether the limit was reached: waits."""
        skipped, _, longest = self._counts.tolist()
        return skipped, longest >= LIMIT

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts."""
        return {"counts": self._counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the counts of `state_dict`."""
        self._counts = state["counts"].to(self._counts.device)


def _moved(optimizer: Optimizer) -> list[Tensor]:
    """Return the tensors that a step changes: parameters with a gradient, optimizer state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in parameters]
    return [
        *(p for p in parameters if p.grad is not None),
        *(v for state in states for v in state.values() if isinstance(v, Tensor)),
    ]
