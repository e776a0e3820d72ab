"""Records of more than 2**31 elements: rows far apart, of which few are ever touched."""

import pytest
import torch
from cases import DEVICE

from fastsiam import _layer, _packed

# three sequences of five million padded steps and a few valid ones: offsets pass 2**31 in the last
N, T, H, V = 3, 5_700_000, 3, 5


def launch(steps):
    """Run all kernels on sequences padded to `steps`; return what they wrote, 0 elsewhere."""
    from fastsiam.kernels import _packing
    from fastsiam.kernels.siamese_bwd import siamese_bwd
    from fastsiam.kernels.siamese_fwd import siamese_fwd

    torch.manual_seed(0)
    dtype = torch.float16
    weight_ih = torch.randn(1, 4 * H, 2, device=DEVICE, dtype=dtype)
    weight_hh = torch.randn(1, 4 * H, H, device=DEVICE, dtype=dtype)
    x = torch.randn(V, 2, device=DEVICE, dtype=dtype)
    ids = torch.zeros(N, steps, device=DEVICE, dtype=torch.int32)
    ids[:, :4] = torch.randint(V, (N, 4), device=DEVICE, dtype=torch.int32)
    lengths = torch.tensor([4, 2, 3], device=DEVICE)
    table, weight, transposed = _packing.prepare(
        x, weight_ih, weight_hh, None, keep=True, allow_tf32=False
    )
    # H, steps, pooling, paired, allow_tf32, dtype
    how = (H, steps, "last", False, False, dtype)
    _, _, vectors, _, gates, cells, states, peaks = siamese_fwd(
        table, weight, ids, lengths, None, None, 1.0, *how, store_records=True, store_outputs=False
    )
    dvectors = torch.randn_like(vectors)
    dgates = siamese_bwd(
        None, vectors, 1.0, None, dvectors, None, vectors, transposed, lengths, None, gates, cells,
        states, peaks, steps, "last", False,
    )  # fmt: skip
    largest = max(t.numel() for t in (gates, cells, states, dgates))
    gradients = _packing.weight_gradients(
        dgates, states, x, ids, lengths, None, weight_hh, steps, allow_tf32=False
    )
    # a step goes from a row of the records to the next one
    row = torch.arange(5, device=DEVICE).view(1, 5, 1)
    ends = lengths.view(-1, 1, 1)
    ended, began = (row > 0) & (row <= ends), row < ends
    written = [
        torch.where(there, t.view(N, steps + 1, -1)[:, :5], 0)
        for t, there in ((gates, ended), (states, ended), (dgates, began))
    ]
    return largest, [vectors, *written, *gradients[1:]]


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


def test_shapes_of_the_largest_promised_batch():
    """16k pairs of 4096 steps: what the operators would allocate, by shape alone."""
    pairs, steps, hidden = 16384, 4096, 128
    shapes, _ = _layer.saved_shapes(
        2 * pairs, steps, hidden, 2, torch.bfloat16, "lstm", backend="triton"
    )
    assert [torch.Size(shape).numel() > 2**31 for shape in shapes] == [True, True, True]
    # rows of records are counted in 32 bits, elements in 64
    assert 2 * 2 * pairs * (steps + 1) < 2**31
    assert _packed.compute_dtype(torch.bfloat16) == torch.float32
