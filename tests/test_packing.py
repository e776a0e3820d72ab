"""Packed weights, bit for bit: every element at its place, scaled, and 0 everywhere else."""

import pytest
import torch
from cases import DEVICE

# of the gates ahead and back
SIZES = [(1, 1, 32), (50, 130, 64), (129, 65, 192)]
FACTORS = ((0.5, 0.25, 1.0, 2.0), (4.0, 0.125, 0.5, 1.0))


def four_gates(weight, gates, block, factors=FACTORS[0], times=1.0):
    """Return [P, len(gates) * H, K] scaled, as [P, 4, block, K]; `gates` are those that it has."""
    P, rows, K = weight.shape
    H = rows // len(gates)
    full = weight.new_zeros(P, 4, block, K)
    for number, gate in enumerate(gates):
        full[:, gate, :H] = weight[:, number * H : (number + 1) * H] * (times * factors[gate])
    return full


@pytest.mark.parametrize(
    ("dtype", "P"), [(torch.float32, 1), (torch.bfloat16, 2)], ids=["float32", "bfloat16-both-ways"]
)
@pytest.mark.parametrize(
    ("H", "D", "block", "cell"),
    [(H, D, block, cell) for H, D, block in SIZES for cell in ("lstm", "gru")],
)
def test_every_bit_is_in_its_place(triton, H, D, block, cell, P, dtype):
    from fastsiam.kernels.pack import Operand, pack
    from fastsiam.kernels.tiling import FORWARD_UNITS

    torch.manual_seed(H)
    # r, z, n, y: the input has no part in y, the state none in n
    of_input, of_state = ((0, 1, 2), (0, 1, 3)) if cell == "gru" else ((0, 1, 2, 3),) * 2
    rows = len(of_input) * H
    weight_ih = torch.randn(P, rows, D, device=DEVICE).to(dtype)
    # columns first in memory
    weight_hh = torch.randn(P, H, rows, device=DEVICE).to(dtype).transpose(1, 2)
    bias = torch.randn(P, 4 * H, device=DEVICE).to(dtype)
    factors = torch.tensor(FACTORS, device=DEVICE)

    operand = Operand(dtype, 1)
    both = pack(weight_ih, weight_hh, bias, factors, operand, operand)
    ahead = pack(weight_ih, weight_hh, None, factors, operand)
    back = pack(None, weight_hh, None, factors, back=operand)
    of_inputs = pack(weight_ih, weight_hh, None, factors[1])

    for found, scaling in ((both, 0), (ahead, 0), (of_inputs, 1)):
        by_unit = four_gates(weight_ih, of_input, block, FACTORS[scaling]).transpose(1, 2)
        assert torch.equal(found[0], by_unit.reshape(P, 4 * block, D))
    by_unit = four_gates(bias.unsqueeze(2), (0, 1, 2, 3), block).transpose(1, 2)
    assert torch.equal(both[1], by_unit.reshape(P, 4 * block))
    # the state comes twice as large
    full, full_back = (weight_hh.new_zeros(P, 4, block, block) for _ in range(2))
    full[..., :H] = four_gates(weight_hh, of_state, block, times=0.5)
    full_back[..., :H] = four_gates(weight_hh, of_state, block, FACTORS[1], times=0.5)
    units = block if H <= 128 else FORWARD_UNITS
    assert torch.equal(ahead[2], both[2])
    found = both[2].view(P, -1, 2, units // 8, 2, 8, block).permute(0, 2, 4, 1, 3, 5, 6)
    assert torch.equal(found.reshape(full.shape), full)
    full = full_back
    first, second = torch.cat((full[:, 0], full[:, 1]), dim=1), full[:, 3]
    if cell == "lstm":
        second = torch.cat((full[:, 2], full[:, 3]), dim=1)
    halves = [half.transpose(1, 2).reshape(P, -1) for half in (first, second)]
    transposed = torch.cat(halves, dim=1)
    if H > 128:
        # a unit's gates together, as records have them, n's too
        transposed = full.permute(0, 3, 2, 1).reshape(P, -1)
    assert torch.equal(both[3].reshape(P, -1), transposed)
    assert torch.equal(back[3], both[3])
    for empty in (ahead[1], ahead[3], back[0], back[1], back[2], *of_inputs[1:]):
        assert not empty.numel()


@pytest.mark.parametrize("transposed", [False, True], ids=["ahead", "back"])
@pytest.mark.parametrize("rows", [4, 3], ids=["lstm", "gru"])
def test_two_parts_of_float32(triton, rows, transposed):
    """The first is what float16 holds of a weight, the second, 2048 times, what that leaves."""
    from fastsiam.kernels.pack import Operand, pack

    torch.manual_seed(0)
    weight = torch.randn(2, rows * 33, 33, device=DEVICE) * torch.logspace(-6, 3, 33, device=DEVICE)
    # float16 ends at 65504, and a weight is quartered
    weight[:, 0, :4] = torch.tensor([3e5, -3e5, torch.inf, torch.nan], device=DEVICE)
    factors = torch.full((2, 4), 0.5, device=DEVICE)
    operands = (torch.float32, 1), (torch.float16, 1), (torch.float16, 2)
    way = "back" if transposed else "ahead"
    whole, one, two = (
        pack(None, weight, None, factors, **{way: Operand(*each)})[3 if transposed else 2]
        for each in operands
    )

    whole, one, (high, low) = whole.squeeze(1), one.squeeze(1), two.unbind(1)
    assert torch.equal(high.isnan(), whole.isnan())
    assert torch.equal(high.isinf(), whole.isinf())
    finite = whole.isfinite()
    within = whole.clamp(-65504, 65504)[finite]
    assert torch.equal(high[finite], within.half())
    assert torch.equal(one[finite], high[finite])
    assert torch.equal(low[finite], ((within - high[finite].float()) * 2048).half())
    error = (high[finite].double() + low[finite].double() / 2048 - within.double()).abs()
    assert (error <= 2.0**-22 * within.abs() + 2.0**-36).all()
