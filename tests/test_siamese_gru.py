"""The GRU: every backend against the definition, and the module against nn.GRU."""

import dataclasses

import pytest
import torch
from cases import CASES, DEVICE, Case, compute, define, make_inputs
from tolerance import assert_accurate
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastsiam import SiameseGRU, SiameseLSTM
from fastsiam.engine import reference
from fastsiam.engine.autograd import layer_op
from fastsiam.engine.layer import Call, Options
from fastsiam.engine.select import choose

# the frame around a cell is tested with the LSTM's; few cases, and short ones, as interpreted
# kernels are slow
IDS = {"inputs": "ids, trained", "T_left": 3}
SOME = [
    Case(B=5, H=50, directions=2, **IDS),
    Case(B=3, H=33, T_left=4, pooling="max", directions=2, dtype=torch.float16, strided=True),
    Case(B=3, H=100, pooling="mask", inputs="ids", T_left=4, dtype=torch.bfloat16),
    Case(B=3, H=17, pooling="mean", call="encode", vocabulary="many", **IDS),
    # the weight is read every step
    Case(B=2, H=128, T_left=2, lengths="full"),
    # without biases nothing but the product reaches what the reset gate multiplies
    Case(B=5, H=3, T_left=4, bias=False, layers=2),
    Case(B=4, H=2, T_left=1, lengths="none", call="log_similarity", learned_scale=True),
    Case(B=3, H=16, T_left=2, lengths="zeros", dtype=torch.bfloat16),
]
SOME = [dataclasses.replace(case, cell="gru") for case in SOME]
# the other backends take no time
MORE = [dataclasses.replace(case, cell="gru") for case in CASES[::4]]


def check(case, backend, eps=None):
    """Compare all of a backend's results with those of the definition in float64."""
    inputs = make_inputs(case)
    actual = compute(case, inputs, backend, case.dtype)
    sign = None
    if "h_left" in actual:
        sign = torch.sign(actual["h_left"].double() - actual["h_right"].double())
    gold = define(case, inputs, torch.float64, sign)
    same_dtype = define(case, inputs, case.dtype, sign)
    eps = eps or torch.finfo(case.dtype).eps
    for name in actual:
        assert_accurate(name, actual[name], same_dtype[name], gold[name], eps)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_value_and_gradient(backend, case):
    check(case, backend)


@pytest.mark.parametrize("name", ["torch", "lstm"])
@pytest.mark.parametrize("case", MORE, ids=str)
def test_more_values_and_gradients(name, case):
    check(case, name)


@pytest.mark.parametrize("name", ["torch", "lstm"])
@pytest.mark.parametrize("case", MORE[::3], ids=str)
def test_float64(name, case):
    case = dataclasses.replace(case, dtype=torch.float64)
    check(case, name, eps=4 * torch.finfo(torch.float64).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in SOME if case.dtype == torch.float32], ids=str)
def test_tf32(triton, case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    check(case, "triton", eps=2**-10)


LARGE = [
    Case(B=1024, T_left=32, T_right=32, D=300, H=128, dtype=torch.bfloat16, lengths="full"),
    Case(B=4099, T_left=24, T_right=37, D=31, H=50, inputs="ids, trained", directions=2),
    Case(B=257, T_left=73, T_right=73, D=300, H=100, dtype=torch.float16, pooling="max"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(triton, case):
    check(dataclasses.replace(case, cell="gru"), "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_weights(triton, dtype, monkeypatch):
    """Small tiles keep the recurrent weight on chip; here they read it every step all the same."""
    from fastsiam.kernels import tiling

    for name in ("forward_tile", "backward_tile"):
        choose = getattr(tiling, name)
        monkeypatch.setattr(
            tiling, name, lambda *args, choose=choose: choose(*args)._replace(stream=True)
        )
    check(Case(B=2, H=20, dtype=dtype, T_left=3, T_right=1, cell="gru"), "triton")


def torch_vectors(gru, x, lengths, pooling):
    """Return what nn.GRU makes of packed sequences; rows of length 0, which it refuses, are 0."""
    some = lengths > 0
    packed = pack_padded_sequence(x[some], lengths[some], batch_first=True, enforce_sorted=False)
    y, h = gru(packed)
    y, _ = pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])
    if pooling == "last":
        found = h[-2:].transpose(0, 1).flatten(1) if gru.bidirectional else h[-1]
    else:
        valid = (torch.arange(x.shape[1]) < lengths[some].unsqueeze(1)).unsqueeze(2)
        found = torch.where(valid, y, 0).sum(dim=1) / lengths[some].unsqueeze(1)
        if pooling == "max":
            found = torch.where(valid, y, -torch.inf).amax(dim=1)
    return found.new_zeros(len(x), found.shape[1]).index_copy(0, some.nonzero()[:, 0], found)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize(("layers", "bias"), [(1, True), (1, False), (2, True)])
@pytest.mark.parametrize("name", ["torch", "lstm", "reference"])
def test_module_is_nn_gru(name, layers, bias, bidirectional, pooling):
    """Values and every gradient in float64, ragged lengths."""
    torch.manual_seed(layers)
    gru = nn.GRU(5, 7, layers, bias, batch_first=True, bidirectional=bidirectional).double()
    m = SiameseGRU.from_gru(gru, pooling=pooling, scale=0.3, backend=name)
    x = torch.randn(2, 6, 9, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[9, 1, 5, 0, 7, 3], [3, 9, 1, 4, 4, 6]])
    u, v = (torch_vectors(gru, *side, pooling) for side in zip(x, lengths, strict=True))
    expected = torch.exp(-0.3 * (u - v).abs().sum(dim=1))
    actual = m(*x, *lengths)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    upstream = torch.randn(6, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, (x, *gru.parameters()), upstream)
    own = dict(m.named_parameters())
    ours = [x, *(own[each] for each, _ in gru.named_parameters())]
    for one, other in zip(torch.autograd.grad(actual, ours, upstream), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(m.encode(x[0], lengths[0]), u, rtol=1e-12, atol=1e-14)


def test_weights_come_from_and_go_to_nn_gru():
    gru = nn.GRU(3, 4, num_layers=2, bidirectional=True, dropout=0.5, batch_first=True)
    m = SiameseGRU.from_gru(gru, scale=0.25, pooling="max")
    assert (m.dropout, m.pooling, m.scale) == (0.5, "max", 0.25)
    back = m.to_gru()
    assert (back.num_layers, back.bidirectional, back.dropout) == (2, True, 0.5)
    for name, weight in gru.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)
    plain = SiameseGRU(3, 4, 2, bidirectional=True)
    plain.load_state_dict(gru.state_dict())
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(plain.encode(x), gru.eval()(x)[1][-2:].transpose(0, 1).flatten(1))


def test_reference_has_two_derivatives():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 0])

    def encode(x, weight_ih, weight_hh, bias):
        return reference.gru_states(x, lengths, weight_ih, weight_hh, bias, reverse=True)

    shapes = ((3, 3, 2), (6, 2), (6, 2), (8,))
    leaves = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(encode, leaves)
    assert torch.autograd.gradgradcheck(encode, leaves)


def test_results_are_repeatable_and_a_pair_alone_is_the_same(fused_backend):
    torch.manual_seed(0)
    m = SiameseGRU(5, 20, embedding=torch.randn(30, 5), backend=fused_backend, device=DEVICE)
    ids = torch.randint(30, (2, 5, 3), device=DEVICE)
    lengths = torch.tensor([[3, 0, 1, 2, 2], [1, 3, 2, 0, 3]], device=DEVICE)
    gradients = []
    for _ in range(2):
        m.zero_grad()
        m(*ids, *lengths).sum().backward()
        gradients.append(m.weight_hh_l0.grad)
    assert torch.equal(*gradients)
    with torch.no_grad():
        together = m(*ids, *lengths)
        alone = m(*ids[:, 4:], *lengths[:, 4:])
        itself = m(ids[0], ids[0], lengths[0], lengths[0])
    tolerance = 0 if fused_backend == "triton" else 8 * torch.finfo().eps
    torch.testing.assert_close(alone, together[4:], rtol=tolerance, atol=0)
    torch.testing.assert_close(itself, torch.ones_like(itself), rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", [SiameseGRU, SiameseLSTM])
def test_backward_under_autocast(fused_backend, kind):
    torch.manual_seed(0)
    m = kind(5, 6, embedding=torch.randn(9, 5), freeze_embedding=False, backend=fused_backend)
    m, ids = m.to(DEVICE), torch.randint(9, (2, 2, 3), device=DEVICE)
    gradients = []
    for inside in (False, True):
        m.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            similarity = m(*ids)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=inside):
            similarity.sum().backward()
        gradients.append([parameter.grad for parameter in m.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_all_results_of_a_layer(fused_backend):
    torch.manual_seed(0)
    x = torch.randn(4 * 2, 3, device=DEVICE)
    lengths = torch.tensor([2, 0, 1, 2], device=DEVICE)
    weights = [torch.randn(2, *shape, device=DEVICE) for shape in ((15, 3), (15, 5), (20,))]
    leaves = [t.requires_grad_() for t in (x, *weights)]
    backend = choose("f", fused_backend, Call("gru", 5, x.dtype, x.device, True)).backend.name
    options = Options("gru", "max", paired=True, all_states=True, training=True)
    none = x.new_empty(0)
    layer = [leaves[0], none, lengths, none, *leaves[1:]]
    vectors, states, _, similarity, *_ = layer_op(layer, 2, options.encode(), backend)
    # of all states too: those behind a sequence's end are 0, and get nothing
    (similarity.sum() + vectors.sum() + (states**2).sum()).backward()
    gradients = [t.grad.clone() for t in leaves]
    for t in leaves:
        t.grad = None
    h, expected = [], []
    for p in range(2):
        of_direction = [t[p] for t in leaves[1:]]
        every = reference.gru_states(x.view(4, 2, 3), lengths, *of_direction, reverse=p == 1)
        expected.append(every)
        h.append(reference.pool(every, lengths, "max", None, reverse=p == 1))
    torch.testing.assert_close(states, torch.cat(expected, dim=2))
    left, right = torch.cat(h, dim=1).chunk(2)
    similarity = torch.exp(-(left - right).abs().sum(dim=1))
    (similarity.sum() + torch.cat(h).sum() + (torch.cat(expected) ** 2).sum()).backward()
    for one, t in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(one, t.grad, rtol=1e-4, atol=1e-5)
