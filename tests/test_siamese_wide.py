"""Hidden sizes above 128, whose units several programs share: against the definition in float64."""

import dataclasses

import pytest
import torch
from cases import DEVICE, Case
from test_siamese_lstm import check

from fastsiam import SiameseGRU, SiameseLSTM
from fastsiam.engine.autograd import layer_op
from fastsiam.engine.layer import Options

# between them every option of the kernels: some thousand units and few tokens are quick enough
ODD = [
    # two tiles for one group, and an inner dimension that is no power of two
    Case(B=9, T_left=3, T_right=2, H=129, directions=2, inputs="ids", learned_scale=True),
    Case(
        B=3, T_left=4, T_right=1, H=200, dtype=torch.float16, pooling="max", inputs="ids, trained"
    ),
    Case(B=2, T_left=2, T_right=1, H=150, dtype=torch.bfloat16, pooling="mask", call="encode"),
    Case(B=1, T_left=2, T_right=1, H=257, dtype=torch.bfloat16, inputs="ids", lengths="full"),
    Case(B=4, T_left=2, T_right=1, H=130, inputs="ids", pooling="max", call="log_similarity"),
    Case(B=2, T_left=1, T_right=1, H=200, lengths="zeros"),
]
ODD += [dataclasses.replace(case, cell="gru") for case in ODD]
# without biases nothing but the product reaches what a GRU's reset gate multiplies
ODD.append(Case(B=2, T_left=3, T_right=2, H=131, bias=False, layers=2, cell="gru"))
LARGE = [
    Case(B=257, T_left=40, T_right=31, D=31, H=256, dtype=torch.bfloat16, inputs="ids, trained"),
    Case(
        B=64, T_left=31, T_right=40, D=300, H=256, dtype=torch.float16, directions=2, pooling="mean"
    ),
    Case(B=33, T_left=17, T_right=9, D=31, H=256, dtype=torch.float16, layers=2, pooling="mask"),
]
LARGE += [dataclasses.replace(case, cell="gru") for case in LARGE]


@pytest.fixture
def wide(triton, monkeypatch):
    """Let programs wait for each other where they are interpreted; yields what takes turns."""
    if DEVICE == "cuda":
        yield []
        return
    import together

    from fastsiam.kernels import tiling, wide_bwd, wide_fwd

    def tile(units, inner):
        def choose(N, P, H, dtype, target, at_once):
            block_k = tiling.power_of_two_above(inner * tiling.block_h(H))
            return tiling.WideTile(units, 16, block_k, 1, 4)

        return choose

    monkeypatch.setattr(tiling, "wide_forward_tile", tile(tiling.FORWARD_UNITS, 1))
    monkeypatch.setattr(tiling, "wide_backward_tile", tile(tiling.BACKWARD_UNITS, 4))
    monkeypatch.setattr(tiling, "wide_obstacle", lambda *_: "")
    yield together.patch(monkeypatch, wide_fwd.wide_fwd_kernel, wide_bwd.wide_bwd_kernel)


@pytest.mark.parametrize("case", ODD, ids=str)
def test_value_and_gradient(wide, case):
    """Programs that wait for each other, in random turns."""
    check(case, "triton")
    assert all(each.changes > 0 for each in wide) or case.lengths == "zeros"


@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3)])
def test_all_states(wide, cell, gates):
    """What a layer gives to the next, and the gradients of it, are those of the other backend."""
    torch.manual_seed(0)
    H, N, steps = 129, 3, 2
    shapes = (N * steps, 3), (2, gates * H, 3), (2, gates * H, H), (2, 4 * H)
    leaves = [
        torch.randn(*shape, device=DEVICE).div_(shape[-1] ** 0.5).requires_grad_()
        for shape in shapes
    ]
    x, *weights = leaves
    upstream = torch.randn(N, steps, 2 * H, device=DEVICE)
    lengths = torch.tensor([2, 0, 1], device=DEVICE)
    results, none = [], x.new_empty(0)
    for backend in ("triton", "batched"):
        options = Options(cell, all_states=True, training=True).encode()
        states = layer_op([x, none, lengths, none, *weights], steps, options, backend)[1]
        results.append([states, *torch.autograd.grad(states, leaves, upstream)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_which_shapes_have_a_tile(triton):
    from fastsiam.kernels.tiling import wide_backward_tile, wide_forward_tile

    def has(tile, H, dtype="bfloat16", N=64, target="sm_90", P=1, at_once=132):
        return tile(N, P, H, getattr(torch, dtype), target, at_once) is not None

    for H, ahead, back in ((129, True, True), (256, True, True), (512, True, False)):
        assert has(wide_forward_tile, H) == has(wide_forward_tile, H, N=10000) == ahead
        assert has(wide_backward_tile, H) == has(wide_backward_tile, H, N=10000) == back
        for tile in (wide_forward_tile, wide_backward_tile):
            assert not has(tile, H, target="gfx942")
            assert not has(tile, H, target="interpreter")
    assert not has(wide_forward_tile, 1024)
    assert has(wide_forward_tile, 256, "float32")
    # the groups of both directions run at once
    assert wide_forward_tile(64, 2, 512, torch.float16, "sm_90", 132).groups == 4
    assert not has(wide_forward_tile, 512, P=2, at_once=30)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(triton, case):
    check(case, "triton")


@pytest.mark.gpu
def test_tf32(triton, monkeypatch):
    """Scoring; with gradients two slices of the weight would not fit."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.manual_seed(0)
    m = SiameseLSTM(5, 200, backend="triton", device=DEVICE)
    x, y = torch.randn(2, 17, 9, 5, device=DEVICE)
    with torch.no_grad():
        found = m(x, y)
        m.backend = "reference"
        torch.testing.assert_close(found, m(x, y), rtol=0.02, atol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_sanitize(triton, cell, dtype):
    """For compute-sanitizer: programs that wait, and ids of no row behind the ends."""
    case = Case(B=33, T_left=4, T_right=3, H=130, dtype=dtype, inputs="ids, trained", cell=cell)
    check(case, "triton")


@pytest.mark.parametrize("kind", [SiameseLSTM, SiameseGRU])
def test_gradients_of_any_size(wide, kind):
    """Small gradients from outside give as many small ones, bit for bit."""
    torch.manual_seed(0)
    m = kind(5, 129, backend="triton", device=DEVICE)
    x = torch.randn(2, 2, 5, device=DEVICE, requires_grad=True)
    h, leaves = m.encode(x, [2, 1]), [x, *m.parameters()]
    upstream = torch.randn_like(h)
    plain = torch.autograd.grad(h, leaves, upstream, retain_graph=True)
    small = torch.autograd.grad(h, leaves, upstream * 2.0**-70)
    for gradient, other in zip(small, plain, strict=True):
        assert gradient.any()
        assert torch.equal(gradient, other * 2.0**-70)


def test_gradients_without_records(wide):
    """Of layers that the backward runs again they are those of the other backend."""
    torch.manual_seed(0)
    m = SiameseGRU(5, 129, device=DEVICE)
    left, right = torch.randn(2, 1, 2, 5, device=DEVICE)
    results = []
    for m.backend, m.recompute in (("triton", True), ("torch", False)):
        similarity = m(left, right, [2], [1])
        results.append(torch.autograd.grad(similarity, list(m.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [SiameseLSTM, SiameseGRU])
def test_bits_do_not_depend_on_batch_or_order(wide, kind):
    """A pair beside others, in tiles sorted by length, is what it is alone, or swapped."""
    torch.manual_seed(0)
    m = kind(5, 129, embedding=torch.randn(9, 5), backend="triton", device=DEVICE)
    left, right = torch.randint(9, (2, 20, 3), device=DEVICE)
    left_lengths, right_lengths = torch.randint(4, (2, 20), device=DEVICE)
    with torch.no_grad():
        together = m(left, right, left_lengths, right_lengths)
        some = slice(11, 13)
        alone = m(right[some], left[some], right_lengths[some], left_lengths[some])
        assert torch.equal(m(left[:2], left[:2]), torch.ones(2, device=DEVICE))
    assert torch.equal(alone, together[some])
