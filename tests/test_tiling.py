"""Which tiles and splits are offered: plain arithmetic."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastsiam.kernels import tiling

# dtype, and whether tf32 is allowed
HALF, FULL, TF32 = (torch.bfloat16, False), (torch.float32, False), (torch.float32, True)


@pytest.mark.parametrize(
    ("H", "precision", "target", "load", "ahead", "back"),
    [
        # sequences and warps of a program: one alone, two of 4, two of 8, a queue
        (50, HALF, "sm_90", 4, (4, 8), (4, 4)),
        (50, HALF, "sm_90", 8, (4, 4), (8, 4)),
        (50, HALF, "sm_90", 9, (8, 4), (8, 4)),
        (50, HALF, "sm_90", 24, (8, 4), (8, 4)),
        (50, HALF, "sm_90", 25, (8, 4), (16, 4)),
        (128, HALF, "sm_90", 4, (4, 8), (4, 8)),
        (128, HALF, "sm_90", 5, (8, 8), (8, 8)),
        (128, HALF, "sm_90", 9, (8, 8), (16, 8)),
        (32, HALF, "sm_90", 8, (4, 4), (8, 2)),
        (32, HALF, "sm_90", 99, (8, 4), (8, 2)),
        (50, FULL, "sm_90", 4, (4, 8), (8, 4)),
        (50, FULL, "sm_90", 5, (8, 8), (8, 4)),
        (128, FULL, "sm_90", 1, (8, 8), (8, 8)),
        (128, FULL, "sm_90", 99, (8, 8), (8, 8)),
        (50, TF32, "sm_90", 4, (4, 8), (4, 4)),
        (50, TF32, "sm_90", 8, (4, 4), (8, 4)),
        (32, TF32, "sm_90", 4, (4, 4), (8, 2)),
        (128, TF32, "sm_90", 99, (8, 8), (8, 8)),
        (128, HALF, "sm_100", 99, (8, 8), (8, 8)),
        (50, HALF, "gfx942", 1, (16, 8), (16, 4)),
    ],
)
def test_sequences_and_warps(H, precision, target, load, ahead, back):
    dtype, allow_tf32 = precision
    how = tiling.arithmetic(dtype, allow_tf32, target)
    for choose, wanted in ((tiling.forward_tile, ahead), (tiling.backward_tile, back)):
        tile = choose(H, dtype, how, target, load)
        assert (tile.sequences, tile.num_warps) == wanted


def test_load_counts_directions(monkeypatch):
    monkeypatch.setattr(tiling, "multiprocessors", lambda *_: 132)
    lengths = torch.ones(2 * 132, dtype=torch.int64)
    assert tiling.load_of(lengths, 1, "sm_90") == 2
    assert tiling.load_of(lengths, 2, "sm_90") == 4
    assert tiling.load_of(lengths[:1], 1, "sm_90") == 1


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
    monkeypatch.setattr(tiling, "multiprocessors", lambda *_: 132)
    assert tiling.parts_of_tokens(torch.device("cuda"), "sm_90", tiles, blocks) == parts


@pytest.mark.parametrize(("n", "power"), [(-3, 1), (0, 1), (1, 1), (3, 2), (4, 4), (33, 32)])
def test_power_of_two_below(n, power):
    assert tiling.power_of_two_below(n) == power
