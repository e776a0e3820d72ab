"""What training minimises: a module from a batch to its loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Output(NamedTuple):
    """What an objective makes of a batch.

    Attributes:
        loss: [], mean over the pairs of the batch.
        similarity: [B], predicted, 0..1; for the logs.
        target: [B], gold, 0..1; for the logs.
    """

    loss: Tensor
    similarity: Tensor
    target: Tensor


class MeanSquaredError(nn.Module):
    """The mean squared error of the similarities.

    Args:
        module: called as `SiameseLSTM` is, with ids and lengths of both sides.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: tuple[list[Tensor], Tensor]) -> Output:
        """Return the loss of a batch, the inputs of the module and the gold similarities [B]."""
        inputs, target = batch
        similarity = self.module(*inputs)
        target = target.to(similarity.dtype)
        return Output(F.mse_loss(similarity, target), similarity, target)
