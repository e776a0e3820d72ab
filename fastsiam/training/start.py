"""The weights that training starts from, and the optimizer that moves them."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Adadelta, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastsiam.modules import SiameseLSTM
from fastsiam.training.config import Config


@torch.no_grad()
def initialize(lstm: SiameseLSTM, forget_bias: float, generator: torch.Generator) -> None:
    """Draw the small start of the MaLSTM authors' own program.

    Standard deviations: .2 / sqrt(sqrt(H * D)) for the input weights, .2 / sqrt(H) for the
    recurrent ones; biases from U(-.5, .5), but `forget_bias` for the forget gate.

    nn.LSTM's two biases only ever act as their sum. `bias_hh_l0` is set to 0 and frozen: trained as
    well, it would get the same step as `bias_ih_l0` from Adam, and the sum would move twice as far.

    Args:
        lstm: the module to fill.
        forget_bias: the summed bias of the forget gate.
        generator: CPU generator, so that every device starts alike.
    """
    D, H = lstm.input_size, lstm.hidden_size
    gates = 4 * H
    weight_ih = torch.randn(gates, D, generator=generator) * (0.2 / math.sqrt(math.sqrt(H * D)))
    weight_hh = torch.randn(gates, H, generator=generator) * (0.2 / math.sqrt(H))
    bias = torch.rand(gates, generator=generator) - 0.5
    bias[H : 2 * H] = forget_bias
    lstm.weight_ih_l0.copy_(weight_ih)
    lstm.weight_hh_l0.copy_(weight_hh)
    lstm.bias_ih_l0.copy_(bias)
    lstm.bias_hh_l0.zero_()
    lstm.bias_hh_l0.requires_grad_(False)


def make_optimizer(
    module: nn.Module, config: Config, steps: int
) -> tuple[Optimizer, CosineAnnealingLR]:
    """Return the optimizer of a phase and its schedule: from the first rate to 0 in `steps`."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer: Optimizer
    if config.optimizer == "adam":
        optimizer = Adam(parameters, lr=config.first_lr, fused=True)
    else:
        optimizer = Adadelta(parameters, lr=config.first_lr, rho=0.95, eps=1e-6)
    return optimizer, CosineAnnealingLR(optimizer, T_max=steps)
