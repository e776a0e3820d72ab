"""What "auto" picks, and that a call takes what `explain` says."""

import pytest
import torch

from fastsiam import SiameseLSTM
from fastsiam.engine import select
from fastsiam.engine.layer import Backend, Call
from fastsiam.engine.select import BACKENDS, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HAS_LIBRARY = not BACKENDS["cpu"].obstacle(Call("lstm", 1, torch.float32, CPU, False))
OURS = "cpu" if HAS_LIBRARY else "batched"


def picked(device=CPU, cell="lstm", H=64, dtype=torch.float32, training=False, sequences=512):
    choice = choose("f", "auto", Call(cell, H, dtype, device, training, sequences))
    assert choice.reason
    return choice.backend.name


def test_auto_on_the_cpu():
    assert picked() == picked(training=True) == picked(sequences=None) == OURS
    assert picked(dtype=torch.float64) == picked(dtype=torch.bfloat16, training=True) == "batched"
    # there torch's own recurrence is faster
    assert picked(H=256, training=True, sequences=16) == "lstm"
    assert picked(H=1024, sequences=32) == "lstm"
    # the GRU was never slower, and float64 was not measured
    assert picked(H=256, training=True, sequences=16, cell="gru") == OURS
    assert picked(H=1024, sequences=32, dtype=torch.float64) == "batched"
    # one more sequence
    assert picked(H=256, training=True, sequences=17) == OURS
    assert picked(H=1024, sequences=33) == "batched"


def test_auto_on_a_gpu(triton, monkeypatch):
    from fastsiam.kernels import tiling

    monkeypatch.setattr(tiling, "target_of", lambda _: "sm_90")
    monkeypatch.setattr(tiling, "multiprocessors", lambda *_: 132)
    assert picked(CUDA) == picked(CUDA, H=128, training=True) == "triton"
    assert picked(CUDA, dtype=torch.float64) == "lstm"
    assert picked(CUDA, H=129) == "lstm"


def test_auto_without_triton(monkeypatch):
    monkeypatch.setattr(select, "HAS_TRITON", False)
    select._automatic.cache_clear()
    try:
        assert picked(CUDA) == "lstm"
        with pytest.raises(ImportError, match="f: backend 'triton' needs the package triton"):
            choose("f", "triton", Call("lstm", 64, torch.float32, CUDA, False))
    finally:
        select._automatic.cache_clear()


def test_a_named_backend_runs_or_raises():
    call = Call("lstm", 64, torch.float32, CPU, False)
    for name in ("batched", "lstm", "reference"):
        assert choose("f", name, call) == (BACKENDS[name], "named by the caller")
    assert choose("f", "torch", call).backend.name == OURS
    double = Call("lstm", 64, torch.float64, CPU, False)
    assert choose("f", "torch", double).backend.name == "batched"
    with pytest.raises(
        ValueError, match=r"^f: the compiled library takes float32, and the weights are float64"
    ):
        choose("f", "cpu", double)
    with pytest.raises(ValueError, match="f: backend must be one of auto, torch, triton, cpu, "):
        choose("f", "keras", call)


def test_triton_names_its_limit(triton, monkeypatch):
    from fastsiam.kernels import tiling

    monkeypatch.setattr(tiling, "target_of", lambda _: "sm_90")
    monkeypatch.setattr(tiling, "multiprocessors", lambda *_: 132)
    for dtype, training, limit in (
        (torch.bfloat16, False, 512),
        (torch.bfloat16, True, 256),
        (torch.float32, False, 128),
    ):
        fits, does_not = (Call("lstm", H, dtype, CUDA, training) for H in (limit, limit + 1))
        assert choose("f", "triton", fits).backend.name == "triton"
        with pytest.raises(ValueError, match=f"f: H must be at most {limit} for .*got {limit + 1}"):
            choose("f", "triton", does_not)


class Watched(Backend):
    """Notes whether a backend ran."""

    def __init__(self, backend, seen):
        self.backend, self.seen = backend, seen
        self.name, self.composite = backend.name, backend.composite

    def obstacle(self, call):
        return self.backend.obstacle(call)

    def __getattribute__(self, name):
        if name in ("run", "infer", "forward"):
            self.seen.add(self.name)
        if name in ("run", "infer", "forward", "project", "backward"):
            return getattr(self.backend, name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("H", [8, 256])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["auto", "torch", "batched", "lstm", "reference"])
def test_a_call_takes_what_explain_says(monkeypatch, name, training, H):
    seen = set()
    for each in ("CPU", "BATCHED", "NATIVE", "REFERENCE"):
        monkeypatch.setattr(select, each, Watched(getattr(select, each), seen))
    watched = {n: Watched(backend, seen) for n, backend in BACKENDS.items()}
    monkeypatch.setattr(select, "BACKENDS", watched)
    select._automatic.cache_clear()
    m = SiameseLSTM(3, H, backend=name)
    try:
        for pairs in (1, 20):
            x = torch.randn(pairs, 4, 3)
            seen.clear()
            with torch.set_grad_enabled(training):
                m(x, x)
                assert m.explain(pairs=pairs).split(":")[0] in seen
            assert len(seen) == 1
    finally:
        select._automatic.cache_clear()


def test_a_layer_above_a_frozen_one_trains():
    """The choice looks at the gradients of all layers, as the call does."""
    m = SiameseLSTM(3, 256, num_layers=2)
    for name, parameter in m.named_parameters():
        parameter.requires_grad_("_l1" in name)
    assert m.explain("cpu", pairs=8).startswith("lstm: ")
    assert not m.requires_grad_(False).explain("cpu", pairs=8).startswith("lstm: ")


def test_lengths_of_zero_and_padding_that_is_cut():
    torch.manual_seed(0)
    m = SiameseLSTM(5, 64, dtype=torch.float64, backend="lstm", bidirectional=True, pooling="mean")
    right = SiameseLSTM(
        5, 64, dtype=torch.float64, backend="reference", bidirectional=True, pooling="mean"
    )
    right.load_state_dict(m.state_dict())
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    x[:, 4:] = torch.nan
    for lengths in ([4, 0, 1], [0, 0, 0]):
        torch.testing.assert_close(m.encode(x, lengths), right.encode(x, lengths))
    mask = torch.rand(3, 9, dtype=torch.float64)
    expected = right.encode(x, [4, 2, 1], mask=mask)
    torch.testing.assert_close(m.encode(x, [4, 2, 1], mask=mask), expected)
