"""Which tiles and splits are offered: plain arithmetic."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastsiam.kernels import _tiling

HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("H", "dtype", "target", "each", "sequences"),
    [
        (50, HALF, "sm_90", 3, 8),
        (50, HALF, "sm_90", 4, 16),
        (128, HALF, "sm_90", 1, 8),
        (128, HALF, "sm_90", 2, 16),
        (32, HALF, "sm_90", 9, 8),
        (128, FULL, "sm_90", 9, 8),
        (128, HALF, "sm_100", 9, 8),
        (50, HALF, "gfx942", 1, 16),
    ],
)
def test_sequences_of_a_backward_program(H, dtype, target, each, sequences):
    how = _tiling.arithmetic(dtype, False, target)
    assert _tiling.backward_tile(H, dtype, how, target, each).sequences == sequences


@pytest.mark.parametrize(
    ("tiles", "blocks", "parts"),
    [
        pytest.param(12, 160, 16, id="32 pairs of 73 tokens, 300 features, 50 units"),
        pytest.param(12, 10, 1, id="one pair"),
        pytest.param(28, 32768, 8, id="16k pairs, 128 units"),
        pytest.param(2112, 8192, 1, id="large weights"),
        pytest.param(2, 10**6, 32, id="small weights"),
    ],
)
def test_parts_of_the_tokens(monkeypatch, tiles, blocks, parts):
    monkeypatch.setattr(_tiling, "multiprocessors", lambda *_: 132)
    assert _tiling.parts_of_tokens(torch.device("cuda"), "sm_90", tiles, blocks) == parts


@pytest.mark.parametrize(("n", "power"), [(-3, 1), (0, 1), (1, 1), (3, 2), (4, 4), (33, 32)])
def test_power_of_two_below(n, power):
    assert _tiling.power_of_two_below(n) == power
