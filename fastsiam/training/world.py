"""The processes of a run, which torchrun or accelerate started, or this one alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn


class World:
    """The processes that share each batch of a run; one process alone shares nothing.

    Each process takes its share of the rows of a batch, and DistributedDataParallel averages the
    gradients. The weights of `share` make that average the gradient of the mean over the whole
    batch, however the rows fall.

    Args:
        accelerator: of the processes; None: this process is alone.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.size: int = 1 if accelerator is None else accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module, with gradients averaged over the processes."""
        if self.size == 1:
            return module
        wrapped: nn.Module = self.accelerator.prepare_model(module)
        return wrapped

    def share(self, rows: Any) -> tuple[Any, float]:
        """Return this process's rows of a batch, and the weight of their mean loss.

        The mean over the processes of weight times loss is the mean over all rows. A process that
        gets none, in a last batch, takes the first row with weight 0, since all must join in.
        """
        if self.size == 1:
            return rows, 1.0
        mine = rows[self.rank :: self.size]
        if not len(mine):
            return rows[:1], 0.0
        return mine, len(mine) * self.size / len(rows)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, in each of them."""
        if self.size == 1:
            return tensor
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in their order, in each of them."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object([value])
        return gathered


def find_world(device: torch.device) -> World:
    """Return the processes that this one was started with.

    torchrun and `accelerate launch` say so in the environment.

    Args:
        device: the run's; several processes on CUDA take one device each.

    Raises:
        ImportError: there are several, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(
            "train: several processes need accelerate; install with: "
            "pip install 'fastsiam[distributed]'"
        ) from error
    return World(Accelerator(cpu=device.type == "cpu"))
