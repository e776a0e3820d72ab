"""Every misuse is one clear sentence: who, what must hold, what came; and no misuse is silent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DEVICE
from torch import nn

from fastsiam import SiameseLSTM
from fastsiam.engine import select
from fastsiam.functional import (
    Weights,
    manhattan_similarity,
    manhattan_topk,
    prepare,
    siamese_encode,
    siamese_similarity,
)

B, T, D, H, V = 3, 4, 5, 6, 10


def dense(**options):
    return SiameseLSTM(D, H, **options)


def embedded(**options):
    return SiameseLSTM(D, H, embedding=torch.zeros(V, D), **options)


def x(*shape, **options):
    return torch.zeros(shape or (B, T, D), **options)


def ids(*shape, value=0, dtype=torch.int64):
    return torch.full(shape or (B, T), value, dtype=dtype)


def with_id(value, at=0):
    t = ids()
    t[1, at] = value
    return t


MASK = torch.ones(B, T)

BAD_CALLS = {
    "batch sizes": (
        lambda: dense()(x(), x(2, T, D)),
        "left and right must have the same number of rows, got 3 and 2",
    ),
    "too few lengths": (
        lambda: dense()(x(), x(), [1, 2]),
        r"left's lengths must be one number a row, \[3\], got \[2\]",
    ),
    "too many lengths": (
        lambda: dense()(x(), x(), None, torch.ones(4, dtype=torch.int64)),
        r"right's lengths must be one number a row, \[3\], got \[4\]",
    ),
    "lengths in two dimensions": (
        lambda: dense()(x(), x(), [[1, 1, 1]]),
        r"left's lengths must be one number a row, \[3\], got \[1, 3\]",
    ),
    "a number for lengths": (
        lambda: dense()(x(), x(), torch.tensor(2)),
        r"left's lengths must be one number a row, \[3\], got \[\]",
    ),
    "negative length": (
        lambda: dense()(x(), x(), [1, -2, 1]),
        "left's lengths must be between 0 and T = 4, got -2",
    ),
    "length beyond T": (
        lambda: dense()(x(), x(), None, torch.tensor([1, 5, 4], dtype=torch.int32)),
        "right's lengths must be between 0 and T = 4, got 5",
    ),
    "float lengths": (
        lambda: dense()(x(), x(), [1.0, 2.0, 3.0]),
        "left's lengths must be whole numbers .* got torch.float32",
    ),
    "bool lengths": (
        lambda: dense()(x(), x(), torch.ones(B, dtype=torch.bool)),
        "left's lengths must be whole numbers .* got torch.bool",
    ),
    "negative id": (
        lambda: embedded()(with_id(-1), ids()),
        "left's ids must be between 0 and V - 1 = 9, got -1",
    ),
    "id beyond V": (
        lambda: embedded()(ids(), with_id(V)),
        "right's ids must be between 0 and V - 1 = 9, got 10",
    ),
    "ids of both sides": (
        lambda: embedded()(with_id(V), with_id(-1)),
        "left's ids must be between 0 and V - 1 = 9, got 10",
    ),
    "id of the longer side": (
        lambda: embedded()(ids(), ids(B, T + 2, value=-7)),
        "right's ids must be between 0 and V - 1 = 9, got -7",
    ),
    "id beyond V, encoded": (
        lambda: embedded().encode(with_id(V), [4, 1, 4]),
        "x's ids must be between 0 and V - 1 = 9, got 10",
    ),
    "wrong D": (
        lambda: dense()(x(), x(B, T, D + 1)),
        r"right must be \[B, T, D\] with D = 5, got \[3, 4, 6\]",
    ),
    "two dimensions": (
        lambda: dense()(x(B, D), x()),
        r"left must be \[B, T, D\] with D = 5, got \[3, 5\]",
    ),
    "ids without an embedding": (
        lambda: dense()(ids(), ids()),
        r"left must be \[B, T, D\].*ids need an embedding",
    ),
    "floats with an embedding": (
        lambda: embedded()(x(), x()),
        r"left must be integer ids \[B, T\] .* got \[3, 4, 5\] of torch.float32",
    ),
    "float ids": (
        lambda: embedded()(ids(), ids().float()),
        "right must be integer ids .* of torch.float32",
    ),
    "small integer ids": (
        lambda: embedded()(ids(dtype=torch.int16), ids()),
        "left must be integer ids .* of torch.int16",
    ),
    "wrong dtype": (
        lambda: dense()(x(), x(dtype=torch.float64)),
        r"right must have the weights' dtype torch.float32, got torch.float64; .*\.to",
    ),
    "half the dtype": (
        lambda: dense(dtype=torch.bfloat16)(x(), x()),
        "left must have the weights' dtype torch.bfloat16, got torch.float32",
    ),
    "other device": (
        lambda: dense()(x(), x(device="meta")),
        "right must be on the weights' device cpu, got meta",
    ),
    "one mask": (
        lambda: dense()(x(), x(), right_mask=MASK),
        "left_mask and right_mask must be given together or not at all",
    ),
    "mask's shape": (
        lambda: dense()(x(), x(), left_mask=MASK, right_mask=MASK[:, :3]),
        r"right's mask must be \[B, T\] = \[3, 4\], got \[3, 3\]",
    ),
    "mask of one row": (
        lambda: dense().encode(x(), mask=MASK[:1]),
        r"x's mask must be \[B, T\] = \[3, 4\], got \[1, 4\]",
    ),
    "mask with a gradient": (
        lambda: dense()(x(), x(), left_mask=MASK.clone().requires_grad_(), right_mask=MASK),
        "left's mask carries no gradient .* detach it",
    ),
    "mask's device": (
        lambda: dense().encode(x(), mask=MASK.to("meta")),
        "x's mask must be on the device cpu, got meta",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call(call, message):
    with pytest.raises(
        ValueError, match=f"^(siamese_similarity|siamese_encode): .*{message}"
    ) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
@pytest.mark.parametrize("name", ["lstm", "reference", "triton"])
def test_no_backend_is_laxer(request, monkeypatch, name, call, message):
    if name == "triton":
        request.getfixturevalue("triton")
        if DEVICE == "cuda":
            pytest.skip("the inputs are on the CPU, which triton refuses first")
    monkeypatch.setattr(
        sys.modules[__name__], "dense", lambda **o: SiameseLSTM(D, H, backend=name, **o)
    )
    table = torch.zeros(V, D)
    monkeypatch.setattr(
        sys.modules[__name__],
        "embedded",
        lambda **o: SiameseLSTM(D, H, embedding=table, backend=name, **o),
    )
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embedded()(ids().numpy(), ids()), "siamese_similarity: left must be a tensor"),
        (lambda: embedded()(ids(), ids().tolist()), "siamese_similarity: right .*, got list; pass"),
        (lambda: dense().encode(x().numpy()), "siamese_encode: x must be a tensor, got ndarray"),
        (
            lambda: dense()(x(), x(), left_mask=MASK.numpy(), right_mask=MASK),
            r"siamese_similarity: left's mask must be a tensor, got ndarray; pass torch\.as_tensor",
        ),
        (
            lambda: SiameseLSTM(D, H, embedding=x(V, D).numpy()),
            "SiameseLSTM: embedding must be a tensor, got ndarray",
        ),
        (
            lambda: manhattan_topk(x(B, H).numpy(), x(V, H), 2),
            r"manhattan_topk: queries must be a tensor, got ndarray; pass torch\.as_tensor of it$",
        ),
        (
            lambda: manhattan_topk(x(B, H), x(V, H).tolist(), 2),
            "manhattan_topk: corpus must be a tensor, got list",
        ),
        (
            lambda: siamese_encode(ids(), weights(), embedding=x(V, D).numpy()),
            "siamese_encode: embedding must be a tensor, got ndarray",
        ),
        (lambda: prepare(weights(), x(V, D).numpy()), "prepare: embedding must be a tensor, got"),
        (
            lambda: siamese_encode(x(), tuple(weights())),
            "siamese_encode: weights must be Weights or a list of them, got Tensor",
        ),
        (
            lambda: siamese_encode(x(), weights(bias_ih=x(4 * H).numpy())),
            "siamese_encode: bias_ih must be a tensor, got ndarray",
        ),
        (lambda: manhattan_similarity([1.0], x(1, 1)), "manhattan_similarity: u must be a tensor"),
    ],
)
def test_what_is_no_tensor(call, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        call()


BAD_MODULES = {
    "no features": (lambda: SiameseLSTM(0, 3), "input_size must be at least 1, got 0"),
    "no units": (lambda: SiameseLSTM(3, -1), "hidden_size must be at least 1, got -1"),
    "scale 0": (lambda: dense(scale=0.0), "scale must be positive and finite, got 0"),
    "scale < 0": (lambda: dense(scale=-1.0, learn_scale=True), "scale must be positive .* -1"),
    "scale nan": (lambda: dense(scale=float("nan")), "scale must be positive .* nan"),
    "scale inf": (lambda: dense(scale=float("inf")), "scale must be positive .* inf"),
    "backend": (lambda: dense(backend="cuda"), "backend must be one of auto, .* got 'cuda'"),
    "pooling": (
        lambda: dense(pooling="first"),
        "pooling must be one of last, mean, max, got 'first'",
    ),
    "embedding's D": (
        lambda: SiameseLSTM(D, H, embedding=torch.zeros(V, D + 1)),
        r"embedding must be floating point \[V, D\] with D = 5, got \[10, 6\]",
    ),
    "embedding's rank": (
        lambda: SiameseLSTM(D, H, embedding=torch.zeros(D)),
        r"embedding must be floating point \[V, D\] with D = 5, got \[5\]",
    ),
    "whole numbers as embedding": (
        lambda: SiameseLSTM(D, H, embedding=torch.zeros(V, D, dtype=torch.int64)),
        "embedding must be floating point .* of torch.int64",
    ),
    "embedding that renorms": (
        lambda: dense(embedding=nn.Embedding(V, D, max_norm=2.0)),
        r"embedding must be without max_norm=2.0, .* pass its weight alone",
    ),
    "projected nn.LSTM": (
        lambda: SiameseLSTM.from_lstm(nn.LSTM(D, H, proj_size=2)),
        "proj_size must be 0, got 2",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_MODULES.values(), ids=BAD_MODULES)
def test_bad_module(make, message):
    with pytest.raises(ValueError, match=f"^SiameseLSTM.*: {message}"):
        make()


def test_dropout_with_nothing_to_act_between_is_named():
    with pytest.warns(UserWarning, match="^SiameseLSTM: dropout=0.5 acts between layers, and "):
        dense(dropout=0.5)


def weights(**changes):
    parts = {"weight_ih": x(4 * H, D), "weight_hh": x(4 * H, H)}
    return Weights(**(parts | {"bias_ih": x(4 * H), "bias_hh": x(4 * H)} | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: siamese_similarity(x(), x(), weights(), scale=0.0),
            "scale must be positive and finite, got 0",
        ),
        (
            lambda: siamese_similarity(x(), x(), weights(), scale=-2),
            "scale must be positive and finite, got -2",
        ),
        (
            lambda: siamese_similarity(x(), x(), weights(), scale=float("inf")),
            "scale must be positive and finite, got inf",
        ),
        (
            lambda: manhattan_similarity(x(B, H), x(B, H), -1.0),
            "manhattan_similarity: scale must be positive and finite, got -1.0",
        ),
        (
            lambda: manhattan_similarity(x(B, H), x(B, H), torch.ones(3)),
            r"manhattan_similarity: scale must have one element, got \[3\]",
        ),
        (
            lambda: siamese_similarity(x(), x(), weights(), scale=torch.ones(2)),
            r"scale must have one element, got \[2\]",
        ),
        (
            lambda: siamese_similarity(x(), x(), weights(), backend="gpu"),
            "backend must be one of auto, .* got 'gpu'",
        ),
        (
            lambda: siamese_similarity(ids(), ids(), weights(), embedding=x(V, D + 1)),
            r"embedding must be \[V, D\] with D = 5, got \[10, 6\]",
        ),
        (
            lambda: siamese_similarity(ids(), ids(), weights(), embedding=x(V, D).double()),
            "embedding must have the weights' dtype torch.float32, got torch.float64",
        ),
        (
            lambda: siamese_encode(ids(), weights(), embedding=x(V, D, device="meta")),
            "embedding must have the weights' device cpu, got meta",
        ),
        (
            lambda: prepare(weights(), x(V, D + 1)),
            r"prepare: embedding must be \[V, D\] with D = 5, got \[10, 6\]",
        ),
        (
            lambda: prepare(weights(), x(V)),
            r"prepare: embedding must be \[V, D\] with D = 5, got \[10\]",
        ),
        (
            lambda: prepare(weights(), x(V, D).double()),
            "prepare: embedding must have the weights' dtype torch.float32, got torch.float64",
        ),
        (
            lambda: siamese_encode(x(), weights(weight_hh=x(4 * H + 1, H))),
            r"weight_hh must be \[24, 6\] .* got \[25, 6\]",
        ),
        (
            lambda: siamese_encode(x(), weights(weight_ih=x(3 * H, D))),
            r"weight_ih must be \[24, 5\] .* got \[18, 5\]",
        ),
        (
            lambda: siamese_encode(x(), weights(bias_hh=x(H))),
            r"bias_hh must be \[24\] .* got \[6\]",
        ),
        (
            lambda: siamese_encode(x(), weights(bias_hh=None)),
            "bias_ih and bias_hh must be given together or not at all",
        ),
        (
            lambda: siamese_encode(x(), weights(bias_hh=x(4 * H).double())),
            "all weights must have one dtype, got bias_hh of torch.float64",
        ),
        (
            lambda: siamese_encode(x(), weights(weight_ih=x(4 * H, D, device="meta"))),
            "all weights must have one device, got weight_ih of meta and weight_hh of cpu",
        ),
        (
            lambda: siamese_encode(x().cfloat(), Weights(*(t.cfloat() for t in weights()))),
            "siamese_encode: weights must be floating point, got torch.complex64",
        ),
        (
            lambda: siamese_encode(x(), weights(), cell="rnn"),
            "cell must be one of lstm, gru, got 'rnn'",
        ),
        (
            lambda: siamese_encode(x(), weights(), pooling="sum"),
            "pooling must be one of last, mean, max, got 'sum'",
        ),
        (
            lambda: siamese_encode(x(), [weights()] * 3, bidirectional=True),
            r"weights must be 2 a layer \(bidirectional=True\), got 3 in all",
        ),
        (
            lambda: siamese_encode(x(), [weights()] * 2),
            r"weight_ih must be \[24, 6\] .* got \[24, 5\]",
        ),
        (
            lambda: siamese_encode(
                x(), [weights(), weights(bias_ih=None, bias_hh=None)], bidirectional=True
            ),
            "every layer and direction must have biases, or none",
        ),
        (
            lambda: siamese_encode(x(), weights(), dropout=1.0),
            r"dropout must be at least 0 and below 1, got 1\.0",
        ),
        (
            lambda: manhattan_similarity(x(B, H), x(B, H + 1)),
            r"u and v must be \[B, H\] of one shape, got \[3, 6\] and \[3, 7\]",
        ),
    ],
)
def test_bad_function_call(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_not_read_is_not_checked():
    m = embedded()
    wild = with_id(10**12, at=3)
    assert torch.equal(m(wild, ids(), [4, 3, 4]), m(ids(), ids(), [4, 3, 4]))
    with pytest.raises(ValueError, match="got 1000000000000"):
        m(wild, ids(), [4, 4, 4])


def test_validate_checks_on_every_device(triton):
    m = embedded(backend="triton").to(DEVICE)
    for bad, lengths, message in (
        (with_id(V), None, "left's ids"),
        (ids(), torch.tensor([1, 2, 9]), "left's lengths"),
        (ids(), torch.tensor([1, -2, 3]), "left's lengths"),
    ):
        lengths = None if lengths is None else lengths.to(DEVICE)
        with pytest.raises(ValueError, match=message):
            m(bad.to(DEVICE), ids().to(DEVICE), lengths, validate=True)


@pytest.mark.gpu
def test_unchecked_values_are_clamped_on_cuda(triton):
    """Never out of bounds, whatever the device's tensors hold."""
    torch.manual_seed(0)
    m = SiameseLSTM(D, H, embedding=torch.randn(V, D), backend="triton", device="cuda")
    left = torch.randint(V, (B, T), device="cuda")
    wild = left.clone()
    wild[0, 1], wild[1, 2] = 2**31 - 1, V
    tame = wild.clamp(0, V - 1)
    lengths = torch.tensor([T + 1000, 2, -7], device="cuda")
    for trained in (False, True):
        with torch.set_grad_enabled(trained):
            got = m(wild, left, lengths)
            assert torch.equal(got, m(tame, left, lengths.clamp(0, T)))


@pytest.mark.parametrize(
    ("H", "dtype", "message"),
    [
        (129, torch.float32, "H must be at most 128 for backend 'triton' in .*, got 129"),
        (16, torch.float64, "dtype must be float32, .* for backend 'triton', got torch.float64"),
    ],
    ids=["H", "dtype"],
)
def test_triton_says_what_it_does_not_cover(triton, H, dtype, message):
    m = SiameseLSTM(D, H, backend="triton", dtype=dtype, device=DEVICE)
    t = torch.zeros(B, T, D, dtype=dtype, device=DEVICE)
    for call in (lambda: m(t, t), lambda: m.encode(t), m.explain):
        with pytest.raises(ValueError, match=f"{message}; pass backend='torch'"):
            call()
    m.backend = "auto"
    assert m.explain().startswith(("cpu: ", "batched: ") if DEVICE == "cpu" else "lstm: ")
    torch.testing.assert_close(m(t, t), torch.ones_like(m(t, t)))


OUTSIDE = """
import torch
from fastsiam import SiameseLSTM
from fastsiam.engine import select
m = SiameseLSTM(5, 6, backend="triton")
x = torch.zeros(3, 4, 5)
for call in (lambda: m(x, x), m.explain):
    try:
        call()
    except ValueError as error:
        print(error)
m.backend = "auto"
m(x, x).sum().backward()
print(m.explain())
"""


def test_outside_the_interpreter(triton):
    """The mode is a process's, so this is one of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", OUTSIDE], env=environment, capture_output=True, text=True, check=True
    )
    first, second, auto = run.stdout.splitlines()
    for line in (first, second):
        assert "backend 'triton' needs CUDA tensors, got cpu" in line
        assert "TRITON_INTERPRET=1" in line
        assert line.endswith("pass backend='torch'")
    assert auto.startswith("cpu: inputs are on cpu")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(select, "HAS_TRITON", False)
    m = dense(backend="triton")
    with pytest.raises(ImportError, match=r"pip install triton .*, or pass backend='torch'"):
        m(x(), x())
    with pytest.raises(ImportError, match=r"^prepare: backend 'triton' needs the package triton"):
        prepare(weights(), x(V, D), "triton")
    m.backend = "auto"
    torch.testing.assert_close(m(x(), x()), torch.ones(B))
