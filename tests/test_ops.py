"""The registered operators: their contract with PyTorch, second opinions on gradients, compile."""

from dataclasses import replace

import pytest
import torch
from cases import DEVICE
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import opcheck

from fastsiam import SiameseLSTM
from fastsiam.engine.autograd import layer_backward_op, layer_op
from fastsiam.engine.layer import Call, Options
from fastsiam.engine.select import BACKENDS
from fastsiam.functional import Weights, siamese_encode, siamese_similarity

B, T, D, H, V = 2, 3, 3, 5, 4
N = 2 * B
LIBRARY = not BACKENDS["cpu"].obstacle(
    Call("lstm", H, torch.float32, torch.device(DEVICE), training=True)
)


def draw(dtype, ids, bias=True, P=1):
    """Return x, ids, lengths, mask, weight_ih, weight_hh, bias as the operators take them."""
    torch.manual_seed(0)
    options = {"device": DEVICE, "dtype": dtype}
    table = torch.randn(V if ids else N * T, D, **options)
    return (
        table,
        torch.randint(V, (N, T), device=DEVICE) if ids else None,
        torch.tensor([3, 0, 2, 1], device=DEVICE),
        torch.randn(N, T, **options) if ids else None,
        torch.randn(P, 4 * H, D, **options),
        torch.randn(P, 4 * H, H, **options),
        torch.randn(P, 4 * H, **options) if bias else None,
    )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "dense"])
def test_operators_are_registered_as_pytorch_wants(fused_backend, ids, dtype, cell):
    x, row_ids, lengths, mask, *weights = draw(dtype, ids, ids, P=1 + ids)
    if cell == "gru":
        weights[:2] = (w[:, : 3 * H] for w in weights[:2])
    options = Options(cell, "max", paired=True, all_states=True, training=True)
    if mask is not None:
        options = Options(cell, "mask", paired=True, training=True)
    # the leaves that autograd is checked for
    leaves = [None if t is None else t.requires_grad_() for t in (x, *weights)]
    layer = [leaves[0], row_ids, lengths, mask, *leaves[1:]]
    layer = [torch.empty(0, device=DEVICE) if t is None else t for t in layer]
    backend = ("cpu" if LIBRARY and dtype == torch.float32 else "batched", "triton")[
        fused_backend == "triton"
    ]
    how = T, options.encode(), backend
    # the saved activations hold rows that no step wrote, which are not compared as numbers
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(layer_op, (layer, *how), test_utils=tests)
    saved = [t.detach() for t in layer_op(layer, *how)]
    upstream = [torch.randn_like(t) for t in saved[:4]]
    layer = [t.detach() for t in layer]
    opcheck(layer_backward_op, (upstream, layer, saved, *how), test_utils=tests)
    scoring = replace(options, training=False)
    opcheck(layer_op, (layer, T, scoring.encode(), backend))


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "dense"])
@pytest.mark.parametrize("log", [True, False], ids=["log", "exp"])
def test_gradcheck_of_the_batched_backend(ids, log):
    x, row_ids, _, mask, weight_ih, weight_hh, bias = draw(torch.float64, ids)
    scale = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, weight_ih, weight_hh, bias, scale)]

    def score(x, weight_ih, weight_hh, bias, scale):
        weights = Weights(weight_ih[0], weight_hh[0], bias[0], bias[0])
        steps = x.view(N, T, D) if row_ids is None else row_ids
        options = {"embedding": None if row_ids is None else x, "backend": "torch"}
        masks = {}
        if mask is not None:
            masks = {"left_mask": mask[:B], "right_mask": mask[B:]}
        lengths = {"left_lengths": [3, 1], "right_lengths": [2, 1]}
        pair = siamese_similarity(
            steps[:B], steps[B:], weights, scale=scale, log=log, **lengths, **masks, **options
        )
        return pair, siamese_encode(steps, weights, lengths=[3, 0, 2, 1], mask=mask, **options)

    assert torch.autograd.gradcheck(score, leaves)


def make_module(backend, **options):
    torch.manual_seed(0)
    options = {"scale": 0.5, "learn_scale": True, **options}
    return SiameseLSTM(D, H, backend=backend, device=DEVICE, **options)


def train_once(m, score, *inputs):
    """Return the value and all gradients of one step."""
    m.zero_grad()
    similarity = score(*inputs)
    torch.nn.functional.mse_loss(similarity, torch.linspace(0, 1, B, device=DEVICE)).backward()
    return [similarity.detach()] + [p.grad.clone() for p in m.parameters()]


@pytest.mark.parametrize("embedded", [True, False], ids=["ids", "dense"])
def test_compile(fused_backend, embedded):
    torch.manual_seed(0)
    table = torch.randn(V, D) if embedded else None
    m = make_module(fused_backend, embedding=table, freeze_embedding=False)
    left, right = (torch.randn(B, steps, D, device=DEVICE) for steps in (T, T + 2))
    if embedded:
        left, right = (torch.randint(V, x.shape[:2], device=DEVICE) for x in (left, right))
    lengths = torch.tensor([1, 3], device=DEVICE), torch.tensor([5, 0], device=DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    for eager, other in zip(
        train_once(m, m, left, right, *lengths),
        train_once(m, compiled, left, right, *lengths),
        strict=True,
    ):
        torch.testing.assert_close(other, eager)
    with torch.no_grad():
        torch.testing.assert_close(compiled(left, right, *lengths), m(left, right, *lengths))


def test_compile_takes_other_sizes_without_compiling_again(fused_backend):
    m = make_module(fused_backend)
    torch.compiler.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, steps in ((2, 4), (6, 7), (5, 2)):
        x, y = (torch.randn(rows, steps, D, device=DEVICE) for _ in range(2))
        with torch._dynamo.config.patch(error_on_recompile=rows > 2):
            torch.testing.assert_close(compiled(x, y), m(x, y))


def test_gradients_only_where_they_are_wanted(fused_backend):
    m = make_module(fused_backend)
    x, y = torch.randn(2, B, T, D, device=DEVICE)
    m.requires_grad_(False)
    assert not m(x, y).requires_grad
    x.requires_grad_()
    dx = torch.autograd.grad(m(x, y).sum(), x)[0]
    m.requires_grad_(True)
    torch.testing.assert_close(torch.autograd.grad(m(x, y).sum(), x)[0], dx)
    m.weight_ih_l0.requires_grad_(False)
    m(x.detach(), y).sum().backward()
    assert m.weight_ih_l0.grad is None
    assert m.weight_hh_l0.grad.any()


def test_saved_tensors_may_come_back_in_another_layout(fused_backend):
    """As from a hook that stores them elsewhere."""
    torch.manual_seed(0)
    m = make_module(fused_backend, embedding=torch.randn(V, D), freeze_embedding=False)
    left, right = torch.randint(V, (2, B, T), device=DEVICE)
    expected = train_once(m, m, left, right)

    def turn(t):
        return t.mT.contiguous().mT if t.ndim > 1 else t

    with torch.autograd.graph.saved_tensors_hooks(turn, lambda t: t):
        actual = train_once(m, m, left, right)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_cannot_be_differentiated_again(fused_backend):
    """The operators have one derivative; the reference has them all."""
    for backend, works in ((fused_backend, False), ("reference", True)):
        m = make_module(backend)
        x, y = torch.randn(2, B, T, D, device=DEVICE)
        gradient = torch.autograd.grad(m(x, y).sum(), m.weight_hh_l0, create_graph=True)[0]
        if works:
            gradient.sum().backward()
            assert m.weight_hh_l0.grad.any()
        else:
            with pytest.raises(RuntimeError, match="cannot be differentiated again"):
                gradient.sum().backward()


def test_fake_tensors(fused_backend):
    with FakeTensorMode():
        m = make_module(fused_backend)
        x, y = torch.randn(2, B, T, D, device=DEVICE)
        similarity = m(x, y)
        similarity.sum().backward()
        with torch.no_grad():
            alone = m(x, y)
    assert similarity.shape == alone.shape == (B,)
    made = [similarity, alone, *(p.grad for p in m.parameters())]
    assert all(isinstance(t, FakeTensor) for t in made)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_over_a_gradient_is_refused(fused_backend):
    m = make_module(fused_backend)
    x, y = torch.randn(2, B, T, D, device=DEVICE)
    with torch.autograd.forward_ad.dual_level():
        similarity = m(x, y)
        upstream = torch.autograd.forward_ad.make_dual(*torch.ones(2, B, device=DEVICE))
        with pytest.raises(RuntimeError, match="forward mode"):
            torch.autograd.grad(similarity, m.weight_hh_l0, upstream)


def in_forward_mode(m, x, y):
    with torch.autograd.forward_ad.dual_level():
        m(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), y)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    "derive",
    [
        lambda m, x, y: torch.func.grad(lambda x: m(x, y).sum())(x),
        lambda m, x, y: torch.func.jvp(lambda x: m(x, y), (x,), (x,)),
        torch.no_grad()(lambda m, x, y: torch.func.jvp(lambda x: m(x, y), (x,), (x,))),
        in_forward_mode,
        torch.no_grad()(in_forward_mode),
    ],
    ids=[
        "func.grad",
        "func.jvp",
        "func.jvp without gradients",
        "forward mode",
        "forward mode without gradients",
    ],
)
def test_other_ways_to_a_derivative_are_refused(fused_backend, derive):
    """The reference has them."""
    x, y = (torch.randn(B, T, D, device=DEVICE) for _ in range(2))
    for trained in (True, False):
        derive(make_module("reference").requires_grad_(trained), x, y)
        m = make_module(fused_backend).requires_grad_(trained)
        with pytest.raises(RuntimeError, match=r"^siamese layer: .*; pass backend='reference'"):
            derive(m, x, y)
