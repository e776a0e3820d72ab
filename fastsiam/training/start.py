"""The weights that training starts from, and the optimizer that moves them."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Adadelta, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from fastsiam.modules import SiameseLSTM
from fastsiam.training.config import FORGET_BIASES, Config


@torch.no_grad()
def initialize(
    lstm: SiameseLSTM,
    forget_bias: float | None,
    generator: torch.Generator,
    start: str = "orig",
) -> None:
    """Draw the weights of a named start.

    - "orig", of the MaLSTM authors' own program: standard deviations .2 / sqrt(sqrt(H * D)) for
      the input weights and .2 / sqrt(H) for the recurrent ones; biases from U(-.5, .5).
    - "seed", of the TensorFlow article: standard deviation .2 for both, biases 0.
    - "pytorch": everything from U(-1/sqrt(H), 1/sqrt(H)), as nn.LSTM does.

    nn.LSTM's two biases only ever act as their sum. `bias_hh_l0` is set to 0 and frozen: trained as
    well, it would get the same step as `bias_ih_l0` from Adam, and the sum would move twice as far.

    Args:
        lstm: the module to fill, of one layer, in one direction or two.
        forget_bias: the summed bias of the forget gate; None: the start's own, 2.5 for "orig", 1
            for "seed" (which TensorFlow's cell adds as it runs), as drawn for "pytorch".
        generator: CPU generator, so that every device starts alike.
        start: the name.
    """
    D, H = lstm.input_size, lstm.hidden_size
    gates = 4 * H
    if forget_bias is None:
        forget_bias = FORGET_BIASES[start]

    def normal(columns: int, deviation: float) -> torch.Tensor:
        return torch.randn(gates, columns, generator=generator) * deviation

    def uniform(bound: float, *shape: int) -> torch.Tensor:
        return (2 * torch.rand(*shape, generator=generator) - 1) * bound

    for suffix in ("", "_reverse") if lstm.bidirectional else ("",):
        if start == "orig":
            weight_ih = normal(D, 0.2 / math.sqrt(math.sqrt(H * D)))
            weight_hh = normal(H, 0.2 / math.sqrt(H))
            bias = torch.rand(gates, generator=generator) - 0.5
        elif start == "seed":
            weight_ih, weight_hh = normal(D, 0.2), normal(H, 0.2)
            bias = torch.zeros(gates)
        else:
            bound = H**-0.5
            weight_ih, weight_hh = uniform(bound, gates, D), uniform(bound, gates, H)
            bias = uniform(bound, gates) + uniform(bound, gates)
        if forget_bias is not None:
            bias[H : 2 * H] = forget_bias
        values = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias}
        for name, value in values.items():
            getattr(lstm, f"{name}_l0{suffix}").copy_(value)
        frozen = getattr(lstm, f"bias_hh_l0{suffix}")
        frozen.zero_()
        frozen.requires_grad_(False)


def make_optimizer(module: nn.Module, config: Config, steps: int) -> tuple[Optimizer, LRScheduler]:
    """Return the optimizer of a phase and its schedule: on a cosine to 0 in `steps`, or none."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer: Optimizer
    if config.optimizer == "adam":
        optimizer = Adam(parameters, lr=config.first_lr, fused=True)
    else:
        optimizer = Adadelta(parameters, lr=config.first_lr, rho=0.95, eps=1e-6)
    if config.schedule == "constant":
        return optimizer, LambdaLR(optimizer, lambda _: 1.0)
    return optimizer, CosineAnnealingLR(optimizer, T_max=steps)
