"""The operator: every backend against the definition, and what must hold between its results."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from cases import CASES, DEVICE, LARGE, Case, compute, define, make_inputs
from tolerance import assert_accurate

from fastsiam import SiameseLSTM
from fastsiam.functional import Weights, siamese_encode, siamese_similarity

SOME = [
    Case(B=17, T_left=7, T_right=5, H=50, pooling="mask", inputs="ids, trained"),
    Case(B=5, T_left=2, T_right=7, H=33, call="log_similarity", learned_scale=True),
    Case(B=14, H=16, dtype=torch.float16, inputs="ids, trained", call="encode"),
    Case(B=3, H=100, dtype=torch.bfloat16),
]


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
    # what one layer rounds the next one multiplies, forward and backward
    eps *= 8 if case.layers > 1 else 1
    # half precision on a CPU is not ours there: what it rounds hangs on the processor
    theirs = backend == "lstm" and DEVICE == "cpu" and case.dtype.itemsize == 2
    for name in actual:
        truth = same_dtype[name], gold[name]
        assert_accurate(name, actual[name], *truth, eps, times=16 if theirs else 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient(backend, case):
    check(case, backend)


@pytest.mark.parametrize("backend", ["torch", "lstm"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(backend, case):
    # two float64 results, neither the truth: each may err as a float32 one may, in its own eps
    case = dataclasses.replace(case, dtype=torch.float64)
    check(case, backend, eps=4 * torch.finfo(torch.float64).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float32], ids=str)
def test_tf32(triton, case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    # of tf32's 10 bits of mantissa
    check(case, "triton", eps=2**-10)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(triton, case):
    check(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", ["dense", "ids, trained"])
def test_sanitize(triton, inputs):
    """For compute-sanitizer: ids of no row behind the ends, records packed, groups by length."""
    check(Case(B=5, T_left=7, T_right=3, H=50, inputs=inputs, vocabulary="few"), "triton")


@pytest.fixture
def change_tiles(triton, monkeypatch):
    """A function that changes fields of every tile."""
    from fastsiam.kernels import tiling

    def change(names=("forward_tile", "backward_tile"), **fields):
        for name in names:
            choose = getattr(tiling, name)
            monkeypatch.setattr(
                tiling, name, lambda *args, choose=choose: choose(*args)._replace(**fields)
            )

    return change


@pytest.mark.parametrize("H", [3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_streamed_weights(change_tiles, dtype, H):
    """Small tiles keep the recurrent weight on chip; here they read it every step all the same."""
    change_tiles(stream=True)
    check(Case(H=H, dtype=dtype, T_left=5), "triton")


@pytest.mark.parametrize("H", [16, 50])
def test_wide_tiles(change_tiles, H):
    """Some targets' matrix instructions want 16 columns: two groups of pairs a program."""
    change_tiles(sequences=16)
    check(Case(B=13, H=H, T_left=5, inputs="ids, trained"), "triton")


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(
    ("sequences", "B"), [(4, 7), (8, 1)], ids=["several programs of 4", "a program of 8 not full"]
)
def test_few_and_many_sequences_a_program(change_tiles, sequences, B, cell):
    """A pair is two threads' in a program of 4, one thread's in one of 8."""
    change_tiles(sequences=sequences)
    check(Case(B=B, H=50, T_left=4, inputs="ids, trained", learned_scale=True, cell=cell), "triton")
    check(
        Case(B=B, H=33, T_left=3, call="encode", pooling="max", directions=2, cell=cell), "triton"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sequences_a_program_change_no_bit(change_tiles, dtype):
    """What a pair gets does not hang on the size of the batch it is in."""
    case = Case(B=5, H=50, T_left=6, T_right=4, dtype=dtype, inputs="ids", pooling="mask")
    inputs = make_inputs(case)
    results = []
    for sequences in (4, 8):
        change_tiles(sequences=sequences)
        results.append(compute(case, inputs, "triton", dtype))
    for name, few in results[0].items():
        assert torch.equal(few, results[1][name]), name


@pytest.mark.parametrize("fields", [{"parts": 1}, {"parts": 1, "stream": True}], ids=str)
def test_float32_rounded_to_the_mantissa_of_tf32(change_tiles, fields):
    """What GPUs do where tf32 is allowed."""
    change_tiles(**fields)
    check(Case(H=50, T_left=5), "triton", eps=2**-10)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gate_gradients_that_are_not_rounded(change_tiles, cell):
    """GPUs with tf32 have instructions for it, which the interpreter takes for float32's."""
    change_tiles(["backward_tile"], operand=torch.float32, parts=1)
    eps = 2.0**-10 if DEVICE == "cuda" else None
    check(Case(H=50, T_left=5, directions=2, cell=cell), "triton", eps=eps)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_of_any_size(change_tiles, cell, parts):
    """Products are made in float16, but its range does not show: not one bit is lost."""
    change_tiles(parts=parts)
    case = Case(B=5, H=33, T_left=6, call="encode", cell=cell)
    inputs = make_inputs(case)
    found = compute(case, inputs, "triton", case.dtype)
    for factor in (2.0**-70, 2.0**50):
        scaled = dataclasses.replace(inputs, upstream=inputs.upstream * factor)
        for name, gradient in compute(case, scaled, "triton", case.dtype).items():
            if name.startswith("d"):
                assert gradient.any(), name
                assert torch.equal(gradient, found[name] * factor), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_not_finite_gradients_and_weights_stay_so(triton, cell):
    """What a loop looks at to skip a step must not be rounded to something finite."""
    case = Case(B=3, H=16, T_left=4, call="encode", lengths="full", cell=cell)
    inputs = make_inputs(case)
    for value in (torch.inf, torch.nan):
        upstream = inputs.upstream.clone()
        upstream[0, 0] = value
        broken = dataclasses.replace(inputs, upstream=upstream)
        assert not compute(case, broken, "triton", case.dtype)["dweight_hh_l0"].isfinite().all()
        weight = inputs.leaves["weight_hh_l0"].clone()
        weight[0, 0] = value
        broken = dataclasses.replace(inputs, leaves=inputs.leaves | {"weight_hh_l0": weight})
        assert not compute(case, broken, "triton", case.dtype)["trained encode"].isfinite().all()


def test_half_as_many_warps(change_tiles):
    """Programs that share a multiprocessor have 4 instead of 8."""
    change_tiles(num_warps=4)
    check(Case(H=50, T_left=5, dtype=torch.float16, inputs="ids"), "triton")


def test_cases_reach_every_path(triton):
    from fastsiam.kernels import tiling

    target = tiling.target_of(torch.device(DEVICE))
    hows = {case.dtype: tiling.arithmetic(case.dtype, False, target) for case in CASES}
    sizes = {case.B for case in (CASES if DEVICE == "cpu" else CASES + LARGE)}
    lengths = {B: torch.ones(2 * B, device=DEVICE, dtype=torch.int64) for B in sizes}
    loads = {c: tiling.load_of(lengths[c.B], c.directions, target) for c in CASES}
    tiles = {tiling.forward_tile(c.H, c.dtype, hows[c.dtype], target, loads[c]) for c in CASES}
    assert {tile.sequences for tile in tiles} == {4, 8} or DEVICE == "cuda"
    # where there is shared memory enough no weight is read every step
    assert {tile.stream for tile in tiles} <= {False, True}
    assert {tile.stream for tile in tiles} == {False, True} or target in ("sm_90", "sm_100")
    assert {tile.block_h for tile in tiles} == {32, 64, 128}
    orders = [tiling.pair_order(lengths[B], B, target) for B in sizes]
    assert {order is None for order in orders} == {False, True}


@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_order_of_programs_changes_no_bit(triton, case, monkeypatch):
    from fastsiam.kernels import tiling

    inputs = make_inputs(case)
    results = []
    for order in (None, torch.randperm(case.B, device=DEVICE)):
        monkeypatch.setattr(tiling, "pair_order", lambda *_, order=order: order)
        results.append(compute(case, inputs, "triton", case.dtype))
    for name, plain in results[0].items():
        assert torch.equal(plain, results[1][name]), name


@pytest.mark.parametrize("case", SOME, ids=str)
def test_results_are_repeatable(fused_backend, case):
    inputs = make_inputs(case)
    first, second = (compute(case, inputs, fused_backend, case.dtype) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_results_do_not_follow_the_default_dtype(fused_backend):
    case = Case(B=2, T_left=3, H=5, inputs="ids, trained")
    inputs = make_inputs(case)
    expected = compute(case, inputs, fused_backend, case.dtype)
    torch.set_default_dtype(torch.float64)
    try:
        found = compute(case, inputs, fused_backend, case.dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, wanted in expected.items():
        assert found[name].dtype == wanted.dtype, name
        assert torch.equal(found[name], wanted), name


def make_module(backend, H=20, **options):
    torch.manual_seed(0)
    table = torch.randn(30, 5)
    return SiameseLSTM(5, H, embedding=table, backend=backend, device=DEVICE, **options)


def draw_ids(B, T):
    torch.manual_seed(B + T)
    ids = torch.randint(30, (B, T), device=DEVICE)
    return ids, torch.randint(T + 1, (B,), device=DEVICE)


def assert_same(backend, actual, expected):
    """Require equal bits of "triton", where one tile computes all; a few eps of the others."""
    if backend == "triton":
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=8 * torch.finfo().eps, atol=0)


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("masked", [False, True], ids=["last", "mask"])
def test_similarity_with_itself_is_one(backend, masked, trained):
    m = make_module(backend)
    ids, lengths = draw_ids(6, 5)
    # the same sentences, padded further and with something else
    longer = torch.cat((ids, torch.full_like(ids, 29)), dim=1)
    masks = {}
    if masked:
        mask = torch.randn(6, 5, device=DEVICE)
        masks = {"left_mask": mask, "right_mask": torch.cat((mask, mask), dim=1)}
    with torch.set_grad_enabled(trained):
        similarity = m(ids, longer, lengths, lengths, **masks)
        log_similarity = m.log_similarity(ids, longer, lengths, lengths, **masks)
    assert_same(backend, similarity.detach(), torch.ones(6, device=DEVICE))
    if backend == "triton":
        assert not log_similarity.any()


@pytest.mark.parametrize("backend_", ["torch", "lstm"])
def test_log_similarity_with_itself_is_next_to_zero(backend_):
    m = make_module(backend_)
    ids, lengths = draw_ids(6, 5)
    distance = m.log_similarity(ids, ids, lengths, lengths)
    assert distance.abs().max() <= 20 * 8 * torch.finfo().eps


def test_dense_rows_with_themselves(backend):
    torch.manual_seed(0)
    m = SiameseLSTM(7, 20, backend=backend, device=DEVICE)
    x = torch.randn(5, 6, 7, device=DEVICE)
    with torch.no_grad():
        assert_same(backend, m(x, x, [6, 1, 0, 3, 5], [6, 1, 0, 3, 5]), torch.ones(5).to(DEVICE))


@pytest.mark.parametrize("log", [False, True], ids=["similarity", "log"])
def test_scales_of_any_kind(backend, log):
    torch.manual_seed(0)
    weights = Weights(torch.randn(12, 2, device=DEVICE), torch.randn(12, 3, device=DEVICE))
    x, y = torch.randn(2, 2, 2, 2, device=DEVICE)
    options = {"log": log, "backend": backend}
    expected = siamese_similarity(x, y, weights, scale=0.5, **options)
    for scale in (Fraction(1, 2), torch.tensor([[0.5]]), torch.tensor([0.5]).double()):
        if isinstance(scale, torch.Tensor):
            scale.requires_grad_()
        actual = siamese_similarity(x, y, weights, scale=scale, **options)
        torch.testing.assert_close(actual, expected, check_stride=True)
        if isinstance(scale, torch.Tensor):
            actual.sum().backward()
            assert scale.grad.shape == scale.shape
            assert scale.grad < 0


def test_swapping_the_sides(backend):
    m = make_module(backend)
    left, left_lengths = draw_ids(6, 5)
    right, right_lengths = draw_ids(6, 3)
    with torch.no_grad():
        one = m(left, right, left_lengths, right_lengths)
        other = m(right, left, right_lengths, left_lengths)
    assert_same(backend, one, other)


def test_permuting_the_pairs(backend):
    m = make_module(backend)
    left, left_lengths = draw_ids(15, 5)
    right, right_lengths = draw_ids(15, 3)
    order = torch.randperm(15)
    with torch.no_grad():
        plain = m(left, right, left_lengths, right_lengths)
        permuted = m(left[order], right[order], left_lengths[order], right_lengths[order])
    assert_same(backend, permuted, plain[order])


def test_a_pair_does_not_depend_on_its_batch(backend):
    m = make_module(backend)
    left, left_lengths = draw_ids(15, 5)
    right, right_lengths = draw_ids(15, 3)
    # of one projection: else the product that makes it may round by its number of words
    with torch.no_grad(), m.prepared():
        together = m(left, right, left_lengths, right_lengths)
        vectors = m.encode(left, left_lengths)
        for b in (0, 3, 14):
            row, steps = slice(b, b + 1), int(left_lengths[b])
            # alone, and without its padding
            alone = m(left[row, :steps], right[row], [steps], right_lengths[row])
            assert_same(backend, alone, together[row])
            vector = m.encode(left[row, :steps], [steps])
            if backend == "triton":
                assert torch.equal(vector, vectors[row])
            else:
                torch.testing.assert_close(vector, vectors[row], rtol=0, atol=1e-6)


def test_training_and_inference_score_alike(backend):
    m = make_module(backend)
    left, left_lengths = draw_ids(15, 5)
    right, right_lengths = draw_ids(15, 3)
    trained = m(left, right, left_lengths, right_lengths)
    with torch.no_grad():
        inferred = m(left, right, left_lengths, right_lengths)
    assert trained.requires_grad
    assert_same(backend, inferred, trained.detach())


@pytest.mark.parametrize("inputs", ["dense", "ids, trained"])
@pytest.mark.parametrize("pooling", ["last", "mask", "max"])
@pytest.mark.parametrize(("B", "T"), [(0, 4), (3, 0), (0, 0)], ids=["B0", "T0", "B0-T0"])
@pytest.mark.parametrize("name", ["torch", "lstm", "reference", "triton"])
def test_nothing_to_run(request, name, B, T, pooling, inputs):
    """An empty batch has no results; sentences without steps are the vector 0."""
    if name == "triton":
        request.getfixturevalue("triton")
    for call in ("similarity", "encode"):
        case = Case(B=B, T_left=T, T_right=T, H=3, lengths="none", pooling=pooling, inputs=inputs)
        case = dataclasses.replace(case, call=call, learned_scale=True, directions=1 + (B > 0))
        results = compute(case, make_inputs(case), name, case.dtype)
        for key, value in results.items():
            if "similarity" in key:
                assert torch.equal(value, torch.full((B,), float("log" not in key)).to(DEVICE))
            else:
                assert not value.any(), key


def test_one_side_without_steps(backend):
    m = make_module(backend)
    ids, _ = draw_ids(3, 4)
    similarity = m(ids, ids[:, :0])
    expected = torch.exp(-m.encode(ids).abs().sum(dim=1))
    torch.testing.assert_close(similarity, expected)
    similarity.sum().backward()
    assert torch.isfinite(m.weight_hh_l0.grad).all()


def test_hypothesis_shapes_against_nn_lstm():
    """Any small shape, lengths and seed: the batched backend is nn.LSTM, row by row."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.settings(deadline=None, derandomize=True, max_examples=60, database=None)
    @hypothesis.given(
        lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6),
        D=st.integers(1, 4),
        H=st.integers(1, 6),
        bias=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def property_(lengths, D, H, bias, seed):
        torch.manual_seed(seed)
        lstm = torch.nn.LSTM(D, H, bias=bias, batch_first=True, dtype=torch.float64)
        sides = list(zip(*lengths, strict=True))
        left, right = (
            torch.randn(len(lengths), max(s), D, dtype=torch.float64, requires_grad=True)
            for s in sides
        )
        weights = Weights(*lstm.parameters())
        actual = siamese_similarity(
            left,
            right,
            weights,
            left_lengths=list(sides[0]),
            right_lengths=list(sides[1]),
            backend="torch",
        )

        def last(x, steps):
            return lstm(x[None, :steps])[0][0, -1] if steps else torch.zeros(H).double()

        expected = torch.stack(
            [
                torch.exp(-(last(u, n) - last(v, m)).abs().sum())
                for u, v, (n, m) in zip(left, right, lengths, strict=True)
            ]
        )
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
        if actual.requires_grad and expected.requires_grad:
            leaves = (left, right, *lstm.parameters())
            upstream = torch.randn(len(lengths), dtype=torch.float64)
            options = {"allow_unused": True, "materialize_grads": True}
            for one, other in zip(
                torch.autograd.grad(actual, leaves, upstream, **options),
                torch.autograd.grad(expected, leaves, upstream, **options),
                strict=True,
            ):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)

    property_()


def test_wild_ids_behind_the_ends_of_either_dtype(backend):
    m = make_module(backend)
    for dtype in (torch.int32, torch.int64):
        info = torch.iinfo(dtype)
        ids = torch.tensor([[3, info.max, info.min], [1, 2, 29]], dtype=dtype, device=DEVICE)
        for trained in (False, True):
            with torch.set_grad_enabled(trained):
                wild = m(ids, ids, [1, 3], [1, 3])
                tame = m(ids.clamp(0, 29), ids.clamp(0, 29), [1, 3], [1, 3])
            assert torch.equal(wild, tame)


def test_encode_alone(backend):
    """`encode` takes the same arguments as one side."""
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(4, 6, batch_first=True).to(DEVICE)
    x = torch.randn(3, 5, 4, device=DEVICE)
    h = siamese_encode(x, Weights(*lstm.parameters()), lengths=[5, 2, 0], backend=backend)
    y = lstm(x)[0]
    expected = torch.stack((y[0, 4], y[1, 1], torch.zeros_like(y[0, 0])))
    torch.testing.assert_close(h, expected)
