"""Records of more than 2**31 elements: rows far apart, of which few are ever touched."""

import pytest
import torch
from cases import DEVICE

from fastsiam.engine.layer import Inputs, Options, Stacked, Upstream
from fastsiam.engine.triton import TRITON

# three sequences of five million padded steps and a few valid ones: offsets pass 2**31 in the last
N, T, H, V = 3, 5_700_000, 3, 5


def launch(steps):
    """Run all kernels on sequences padded to `steps`; return what they wrote, 0 elsewhere."""
    torch.manual_seed(0)
    dtype = torch.float16
    weight_ih = torch.randn(1, 4 * H, 2, device=DEVICE, dtype=dtype)
    weight_hh = torch.randn(1, 4 * H, H, device=DEVICE, dtype=dtype)
    x = torch.randn(V, 2, device=DEVICE, dtype=dtype)
    ids = torch.zeros(N, steps, device=DEVICE, dtype=torch.int32)
    ids[:, :4] = torch.randint(V, (N, 4), device=DEVICE, dtype=torch.int32)
    lengths = torch.tensor([4, 2, 3], device=DEVICE)
    inputs = Inputs(x, ids, lengths, None, steps)
    options = Options("lstm", training=True)
    weights = Stacked(weight_ih, weight_hh, None)
    outputs, kept = TRITON.forward(inputs, weights, options)
    dvectors = torch.randn_like(outputs.vectors)
    upstream = Upstream(dvectors, None, None, None)
    found = TRITON.backward(inputs, weights, options, outputs, kept, upstream, need_dx=False)
    largest = max(t.numel() for t in (kept.gates, kept.cells, kept.states))
    # a step goes from a row of the records to the next one
    row = torch.arange(5, device=DEVICE).view(1, 5, 1)
    ends = lengths.view(-1, 1, 1)
    ended = (row > 0) & (row <= ends)
    written = [
        torch.where(ended, t.view(N, steps + 1, -1)[:, :5], 0) for t in (kept.gates, kept.states)
    ]
    return largest, [outputs.vectors, *written, found.weight_ih, found.weight_hh, found.bias]


def test_offsets_past_two_to_the_31(triton):
    # few steps come from the heap, whose left-overs the interpreter would warn of: not for them
    with pytest.MonkeyPatch.context() as monkeypatch:
        # memory comes from the system page by page as it is written: 9 GB of it are named here
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        largest, far = launch(T)
    assert largest > 2**31
    _, near = launch(7)
    assert all(t.any() for t in near)
    for a, b in zip(far, near, strict=True):
        assert torch.equal(a, b)


def test_shapes_of_the_largest_promised_batch(triton):
    """16k pairs of 4096 steps: what the operators would allocate, by shape alone."""
    pairs, steps, hidden = 16384, 4096, 128
    from fastsiam.kernels.weight_layout import record_shapes

    shapes = record_shapes("lstm", 2 * pairs, steps, hidden, 2)
    assert [torch.Size(shape).numel() > 2**31 for shape in shapes] == [True, True, True]
    # rows of records are counted in 32 bits, elements in 64
    assert 2 * 2 * pairs * (steps + 1) < 2**31
