"""Records of more than 2**31 elements: rows far apart, of which few are ever touched."""

import mmap

import pytest
import torch
from cases import DEVICE

from fastsiam import _layer, _packed

# three sequences of five million padded steps and a few valid ones: offsets pass 2**31 in the last
N, T, H, V = 3, 5_700_000, 3, 5


def leave_untouched(monkeypatch):
    """Let memory come from the system page by page as it is written: 9 GB of it are named here."""

    def zeros(*shape, device=None, dtype=torch.float32):
        there = plain(0, device=device, dtype=dtype)
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        if there.device.type != "cpu" or not size.numel():
            return plain(*shape, device=device, dtype=dtype)
        memory = mmap.mmap(-1, size.numel() * dtype.itemsize)
        return torch.frombuffer(memory, dtype=dtype).view(size)

    plain = torch.zeros
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(
        torch, "zeros_like", lambda t: zeros(t.shape, device=t.device, dtype=t.dtype)
    )


def launch(steps):
    """Run forward and backward kernels on sequences padded to `steps`; return results by row."""
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
    table, weight = _packing.prepare(x, weight_ih, weight_hh, None)
    _, transposed = _packing.pack_backward(None, weight_hh, False)
    # H, steps, pooling, paired, allow_tf32, dtype
    how = (H, steps, "last", False, False, dtype)
    _, _, vectors, _, gates, cells, states, peaks = siamese_fwd(
        table, weight, ids, lengths, None, None, 1.0, *how, store_records=True, store_outputs=False
    )
    dvectors = torch.randn_like(vectors)
    dgates = siamese_bwd(
        None, dvectors, None, vectors, transposed, lengths, None, gates, cells, states, peaks,
        steps, "last", False,
    )  # fmt: skip
    largest = max(t.numel() for t in (gates, cells, states, dgates))
    records = (t.reshape(N, steps + 1, -1)[:, :5] for t in (gates, states, dgates))
    return largest, [vectors, *(t.clone() for t in records)]


def test_offsets_past_two_to_the_31(triton):
    # few steps come from the heap, whose left-overs the interpreter would warn of: not for them
    with pytest.MonkeyPatch.context() as monkeypatch:
        leave_untouched(monkeypatch)
        largest, far = launch(T)
    assert largest > 2**31
    _, near = launch(7)
    lengths = torch.tensor([4, 2, 3], device=DEVICE)
    valid = (torch.arange(5, device=DEVICE) - 1 < lengths.unsqueeze(1)).unsqueeze(2)
    # row t + 1 of the records holds step t; gates have no row before the first step
    first = valid & (torch.arange(5, device=DEVICE) > 0).view(1, 5, 1)
    assert torch.equal(far[0], near[0])
    assert torch.equal(far[1] * first, near[1].nan_to_num() * first)
    assert torch.equal(far[2] * valid, near[2] * valid)
    assert torch.equal(far[3], near[3])
    assert far[3].any(dim=2)[2, :3].all()


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
