"""Hidden sizes above 128, whose units several programs share: against the definition in float64."""

import dataclasses

import pytest
import torch
from cases import DEVICE, Case
from test_siamese_lstm import check
from torch.library import opcheck

from fastsiam import SiameseGRU, SiameseLSTM, _layer, _ops

# between them every option of the kernels: some thousand units and few tokens are quick enough
ODD = [
    Case(B=2, T_left=3, T_right=1, H=129, learned_scale=True),
    Case(B=3, T_left=1, T_right=2, H=160, dtype=torch.float16, pooling="max", inputs="ids"),
    Case(B=1, T_left=2, T_right=1, H=257, dtype=torch.bfloat16, inputs="ids", lengths="full"),
    Case(B=17, T_left=2, T_right=2, H=200, inputs="ids", pooling="mask", call="log_similarity"),
    Case(B=4, T_left=2, T_right=1, H=130, inputs="ids, trained", directions=2, pooling="max"),
    Case(B=2, T_left=1, T_right=1, H=200, lengths="zeros"),
]
ODD += [dataclasses.replace(case, cell="gru") for case in ODD]
# without biases nothing but the product reaches what a GRU's reset gate multiplies
ODD.append(Case(B=2, T_left=3, T_right=2, H=131, bias=False, layers=2, cell="gru"))
LARGE = [
    Case(B=257, T_left=40, T_right=31, D=31, H=256, dtype=torch.bfloat16, inputs="ids, trained"),
    Case(B=64, T_left=31, T_right=40, D=300, H=512, directions=2, pooling="mean"),
    Case(B=33, T_left=17, T_right=9, D=31, H=1024, dtype=torch.float16, layers=2, pooling="mask"),
    Case(B=5, T_left=9, T_right=3, D=7, H=2048, call="log_similarity", learned_scale=True),
]
LARGE += [dataclasses.replace(case, cell="gru") for case in LARGE]


@pytest.mark.parametrize("case", ODD, ids=str)
def test_value_and_gradient(triton, case):
    check(case, "triton")


@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3)])
def test_all_states(triton, cell, gates):
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
    results = []
    for backend in ("triton", "torch"):
        rest = (None, 1.0, steps, "last", False, True, False, False, cell, backend)
        states = _ops.siamese_fwd(x, None, lengths, None, *weights, *rest)[3]
        results.append([states, *torch.autograd.grad(states, leaves, upstream)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture
def in_one_launch(triton, monkeypatch):
    """Interpreted, wide kernels run all steps in one launch; yields what takes their turns."""
    if DEVICE == "cuda":
        pytest.skip("there _tiling_wide.py decides, and programs do run at once")
    import together

    from fastsiam.kernels import _tiling_wide, siamese_wide_bwd, siamese_wide_fwd

    def resident(choose, inner):
        def tile(N, P, H, *rest):
            block_k = 1 << (inner * _tiling_wide.block_h(H) - 1).bit_length()
            chosen = choose(N, P, H, *rest)
            return chosen._replace(sequences=16, block_k=block_k, resident=True, groups=1)

        return tile

    for name, inner in (("forward_tile", 1), ("backward_tile", 4)):
        monkeypatch.setattr(_tiling_wide, name, resident(getattr(_tiling_wide, name), inner))
    kernels = siamese_wide_fwd._siamese_wide_fwd_kernel, siamese_wide_bwd._siamese_wide_bwd_kernel
    return together.patch(monkeypatch, *kernels)


@pytest.mark.parametrize(
    "case",
    [
        # two tiles for one group, and an inner dimension that is no power of two
        Case(B=9, T_left=3, T_right=2, H=129, directions=2, inputs="ids"),
        Case(B=3, T_left=4, T_right=1, H=200, dtype=torch.float16, pooling="max"),
        Case(B=2, T_left=2, T_right=1, H=150, dtype=torch.bfloat16, pooling="mask", call="encode"),
        Case(B=9, T_left=2, T_right=3, H=129, directions=2, inputs="ids", cell="gru"),
        Case(B=3, T_left=3, T_right=1, H=200, dtype=torch.float16, pooling="max", cell="gru"),
        Case(B=2, T_left=2, H=150, dtype=torch.bfloat16, pooling="mask", call="encode", cell="gru"),
    ],
    ids=str,
)
def test_all_steps_in_one_launch(in_one_launch, case):
    """Programs that wait for each other, in random turns."""
    check(case, "triton")
    assert all(each.changes > 0 for each in in_one_launch)


def test_which_shapes_are_one_launch(triton):
    from fastsiam.kernels._tiling_wide import backward_tile, forward_tile

    def resident(tile, H, dtype="bfloat16", N=64, precision="tf32", target="sm_90", P=1):
        return tile(N, P, H, getattr(torch, dtype), precision, target, 132).resident

    for H, ahead, back in ((129, True, True), (256, True, True), (512, True, False)):
        assert resident(forward_tile, H) == ahead
        assert resident(backward_tile, H) == back
        for tile in (forward_tile, backward_tile):
            assert not resident(tile, H, "float32", precision="tf32x3")
            assert not resident(tile, H, target="gfx942", precision="ieee")
            assert not resident(tile, H, target="interpreter", precision="ieee")
            # so many sequences are quicker a step at a time
            assert not resident(tile, H, N=10000)
    assert not resident(forward_tile, 1024)
    assert resident(forward_tile, 256, "float32")
    m = SiameseLSTM(5, 129, backend="triton", device=DEVICE)
    if DEVICE == "cpu":
        assert "forward a launch a step, backward a launch a step)" in m.explain(pairs=3, steps=2)
    # the groups of both directions run at once
    assert forward_tile(64, 2, 512, torch.float16, "tf32", "sm_90", 132).groups == 4
    assert not forward_tile(64, 2, 512, torch.float16, "tf32", "sm_90", 30).resident
    # a launch a step: as few columns as leave no multiprocessor idle, and no more
    for N, columns in ((1, 16), (100, 32), (600, 64)):
        assert forward_tile(N, 1, 2048, torch.float16, "tf32", "sm_90", 132).sequences == columns


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(triton, case):
    check(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_tf32(triton, monkeypatch, cell):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    # of tf32's 10 bits of mantissa
    check(Case(B=17, T_left=7, T_right=9, H=200, inputs="ids", cell=cell), "triton", eps=2**-10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_sanitize(triton, cell, dtype):
    """For compute-sanitizer: a launch a step, and one in all; ids of no row behind the ends."""
    case = Case(B=33, T_left=4, T_right=3, H=130, dtype=dtype, inputs="ids, trained", cell=cell)
    check(case, "triton")


@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators(triton, dtype, cell, gates):
    """What the compiler is told of shapes and dtypes is what comes."""
    torch.manual_seed(0)
    H, steps = 129, 1
    x, weight_ih, weight_hh = (
        torch.randn(*shape, device=DEVICE, dtype=dtype)
        for shape in ((4, 3), (1, gates * H, 3), (1, gates * H, H))
    )
    weights = weight_ih, weight_hh, None
    opcheck(_ops.siamese_prepare, (x, *weights, cell, "triton"), test_utils="test_faketensor")
    lengths = torch.tensor([1, 0, 1, 1], device=DEVICE)
    rest = (None, 1.0, steps, "max", True, True, False, False, cell, "triton")
    args = (x, None, lengths, None, *weights, *rest)
    opcheck(_ops.siamese_fwd, args, test_utils="test_faketensor")


@pytest.mark.parametrize("kind", [SiameseLSTM, SiameseGRU])
def test_gradients_of_any_size(triton, kind):
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


def test_gradients_without_records(triton):
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
def test_bits_do_not_depend_on_batch_or_order(triton, kind):
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


def test_shapes_of_the_largest_batch():
    """Rows of records are counted in 32 bits, elements in 64."""
    pairs, steps, H = 16384, 4096, 2048
    shapes, _ = _layer.saved_shapes(
        2 * pairs, steps, H, 2, torch.bfloat16, "lstm", backend="triton"
    )
    assert all(torch.Size(shape).numel() > 2**31 for shape in shapes)
    assert 2 * 2 * pairs * (steps + 1) < 2**31
