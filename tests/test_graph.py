"""A graphed step does what a plain loop does, and refuses what a graph cannot hold."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastsiam import SiameseGRU, SiameseLSTM, functional
from fastsiam.graph import WARMUP, GraphedStep, capture_obstacle, frozen_settings

B, T, D, H, V = 7, 9, 5, 6, 13
# the parameters after a few steps, which amplify the rounding of sums over other shapes
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def make_module(kind=SiameseLSTM, dtype=torch.float64, **options):
    torch.manual_seed(0)
    table = torch.randn(V, D, dtype=dtype)
    return kind(D, H, embedding=table, scale=0.5, dtype=dtype, backend="torch", **options)


def make_batch(pairs, steps, seed, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(V, (pairs, t), generator=generator) for t in (steps, max(steps - 2, 1))]
    lengths = [torch.randint(1, s.shape[1] + 1, (pairs,), generator=generator) for s in ids]
    target = torch.rand(pairs, generator=generator, dtype=dtype)
    return [t.to(device) for t in (*ids, *lengths, target)]


def plain_step(module, optimizer, batch, clip=None, loss=F.mse_loss):
    *inputs, target = batch
    optimizer.zero_grad()
    value = loss(module(*inputs), target)
    value.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return value.detach()


def assert_same(module, other, **tolerance):
    for (name, ours), theirs in zip(module.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("kind", [SiameseLSTM, SiameseGRU])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_full_batches_are_a_plain_loop_bit_for_bit(kind, clip):
    module = make_module(kind, torch.float32)
    other = copy.deepcopy(module)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (module, other)]
    step = GraphedStep(module, optimizers[0], B, T, clip=clip)
    for seed in range(4):
        batch = make_batch(B, T, seed, torch.float32)
        # both sides in the buffers' T, as the graph sees them
        batch[1] = F.pad(batch[1], (0, T - batch[1].shape[1]))
        loss = step(*batch)
        torch.testing.assert_close(loss, plain_step(other, optimizers[1], batch, clip))
    assert_same(module, other, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "pooling": "max"}], ids=str)
def test_smaller_batches_equal_the_eager_step(options):
    module = make_module(learn_scale=True, **options)
    other = copy.deepcopy(module)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (module, other)]
    step = GraphedStep(module, optimizers[0], B, T)
    # a large batch first: what it leaves in the buffers must not show
    for seed, (pairs, steps) in enumerate([(B, T), (1, 1), (3, T), (B, 4), (2, 5)]):
        batch = make_batch(pairs, steps, seed)
        torch.testing.assert_close(step(*batch), plain_step(other, optimizers[1], batch))
    assert_same(module, other, rtol=1e-9, atol=1e-12)


def test_float_inputs_lists_and_no_lengths():
    torch.manual_seed(1)
    module = SiameseLSTM(D, H, dtype=torch.float64)
    other = copy.deepcopy(module)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (module, other)]
    step = GraphedStep(module, optimizers[0], B, T)
    for pairs, lengths in ((B, None), (2, [3, 0])):
        left, right = torch.randn(2, pairs, 4, D, dtype=torch.float64)
        left[:, 3:] = torch.nan if lengths else 1.0  # behind every end: never read
        batch = left, right, lengths, None, torch.rand(pairs, dtype=torch.float64)
        torch.testing.assert_close(step(*batch), plain_step(other, optimizers[1], batch))
    assert_same(module, other, rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_infinite_at_one_does_not_see_the_filling():
    """Two empty sentences would have the similarity 1, where this loss has none."""

    def loss(similarity, target, reduction="none"):
        values = -target * similarity.log() - (1 - target) * torch.log1p(-similarity)
        return values.mean() if reduction == "mean" else values

    module = make_module()
    other = copy.deepcopy(module)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, other)]
    step = GraphedStep(module, optimizers[0], B, T, loss=loss)
    batch = make_batch(3, T, 0)
    expected = plain_step(other, optimizers[1], batch, loss=lambda s, t: loss(s, t, "mean"))
    torch.testing.assert_close(step(*batch), expected)
    assert_same(module, other, rtol=1e-9, atol=1e-12)


def test_a_schedule_is_followed_eagerly():
    module = make_module()
    other = copy.deepcopy(module)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, other)]
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in optimizers]
    step = GraphedStep(module, optimizers[0], B, T)
    for seed in range(3):
        batch = make_batch(B, T, seed)
        step(*batch)
        plain_step(other, optimizers[1], batch)
        for schedule in schedules:
            schedule.step()
    assert_same(module, other, rtol=1e-9, atol=1e-12)


def test_parameters_that_join_later_are_clipped_too():
    module = make_module(freeze_embedding=False)
    other = copy.deepcopy(module)
    optimizers = [torch.optim.SGD(m.parameters(recurse=False), lr=0.1) for m in (module, other)]
    step = GraphedStep(module, optimizers[0], B, T, clip=0.01)
    for optimizer, m in zip(optimizers, (module, other), strict=True):
        optimizer.add_param_group({"params": [m.embedding.weight]})
    batch = make_batch(B, T, 0)
    step(*batch)
    plain_step(other, optimizers[1], batch, clip=0.01)
    assert_same(module, other, rtol=1e-9, atol=1e-12)


def test_a_first_batch_that_is_refused_leaves_nothing_behind():
    step, batch = made(), make_batch(B, T, 0)
    with pytest.raises(ValueError, match=r"^siamese_similarity: left must be integer ids"):
        step(torch.zeros(B, T, D), torch.zeros(B, T, D), None, None, batch[4].float())
    step(*batch)


def made(**changes):
    module = make_module()
    options = {"B": B, "T": T} | changes
    return GraphedStep(module, torch.optim.Adam(module.parameters()), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"B": 0}, "B must be at least 1, got 0"),
        ({"T": 0}, "T must be at least 1, got 0"),
        ({"clip": 0.0}, "clip must be positive or None, got 0.0"),
        ({"clip": float("nan")}, "clip must be positive or None, got nan"),
    ],
)
def test_options_out_of_range(changes, message):
    with pytest.raises(ValueError, match=f"^GraphedStep: {message}"):
        made(**changes)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.zeros(B + 1, T, dtype=torch.int64), r"left must be \[B, T\].*got \[8, 9\]"),
        (0, torch.zeros(B, T + 1, dtype=torch.int64), r"left must be .*got \[7, 10\]"),
        (0, torch.zeros(0, T, dtype=torch.int64), r"left must be .*1 to 7.*got \[0, 9\]"),
        (1, torch.zeros(B - 1, T, dtype=torch.int64), r"right must be .*got \[6, 9\]"),
        (1, torch.zeros(B, T, dtype=torch.int32), "right must be like that of the first batch"),
        (2, torch.full((B,), T + 1), "left_lengths must be 0 to 9, got 10 to 10"),
        (2, [-1] * B, "left_lengths must be 0 to 9, got -1 to -1"),
        (3, torch.ones(B), r"right_lengths must be \[7\] whole numbers.*float32"),
        (3, torch.ones(B, dtype=torch.bool), r"right_lengths must be .*int64\), got \[7\] .*bool"),
        (3, [1] * (B - 1), r"right_lengths must be \[7\] whole numbers .*, got \[6\]"),
        (4, torch.zeros(B, 1), r"target must be \[7\], got \[7, 1\]"),
        (4, torch.zeros(B), "target must have the dtype of the first batch's, torch.float64, got"),
    ],
)
def test_batches_that_do_not_fit(at, value, message):
    step = made()
    batch = make_batch(B, T, 0)
    step(*batch)
    batch[at] = value
    with pytest.raises(ValueError, match=f"^GraphedStep: {message}"):
        step(*batch)


@pytest.mark.parametrize(("at", "name"), [(0, "left"), (1, "right"), (4, "target")])
def test_a_batch_carries_no_gradients(at, name):
    torch.manual_seed(0)
    module = SiameseLSTM(D, H)
    step = GraphedStep(module, torch.optim.SGD(module.parameters(), lr=0.1), B, T)
    batch = [torch.randn(B, T, D), torch.randn(B, T, D), None, None, torch.rand(B)]
    step(*batch)
    batch[at].requires_grad_()
    with pytest.raises(ValueError, match=f"^GraphedStep: {name} must not require gradients, .*det"):
        step(*batch)
    batch[at] = batch[at].detach().numpy()
    with pytest.raises(TypeError, match=f"^GraphedStep: {name} must be a tensor, got ndarray"):
        step(*batch)


def test_a_loss_must_be_of_each_pair():
    with pytest.raises(ValueError, match=r"loss must return one value a pair, \[7\], got \[\]"):
        made(loss=F.mse_loss)(*make_batch(B, T, 0))


def test_an_optimizer_that_counts_on_the_host_is_refused_on_cuda():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    assert capture_obstacle(torch.optim.SGD(parameters, lr=0.1, momentum=0.9)) == ""
    assert capture_obstacle(torch.optim.Adam(parameters, capturable=True)) == ""
    assert "capturable=True on CUDA, got Adam" in capture_obstacle(torch.optim.Adam(parameters))
    assert "Adagrad is not" in capture_obstacle(torch.optim.Adagrad(parameters))


def test_what_a_graph_holds_as_constants():
    module = make_module()
    optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(1e-3), capturable=True)
    before = frozen_settings(module, optimizer)
    optimizer.param_groups[0]["lr"].fill_(1.0)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert frozen_settings(module, optimizer) == before
    module.eval()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    now = frozen_settings(module, optimizer)
    changed = {name for name in now if now[name] != before[name]}
    assert changed >= {"training of the module", "weight_decay of parameter group 0"}


@pytest.fixture
def any_algorithm():
    """Lets torch take algorithms that are not repeatable: gather's repeatable backward waits."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


def graphed_pair(backend, optimizer, dtype=torch.float32):
    """Return a module and a copy on CUDA, each with an optimizer."""
    torch.manual_seed(0)
    table = torch.randn(V, D)
    module = SiameseLSTM(
        D, H, embedding=table, freeze_embedding=False, scale=0.5, backend=backend, dtype=dtype
    ).cuda()
    other = copy.deepcopy(module)
    return module, other, [optimizer(m.parameters()) for m in (module, other)]


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("backend", ["triton", "lstm"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2, device="cuda"), capturable=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, capturable=True, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
    ids=["adam", "fused-adamw", "sgd"],
)
@pytest.mark.filterwarnings("ignore:.*capturable=True:UserWarning")
@pytest.mark.usefixtures("any_algorithm")
def test_replays_equal_eager_steps(backend, optimizer, where):
    module, other, optimizers = graphed_pair(backend, optimizer)
    step = GraphedStep(module, optimizers[0], B, T, clip=1.0)
    shapes = [(B, T)] * (WARMUP + 2) + [(1, 1), (3, T), (B, 4), (2, 5)]
    for seed, (pairs, steps) in enumerate(shapes):
        batch = make_batch(pairs, steps, seed, torch.float32, where)
        on_device = [t.cuda() for t in batch]
        expected = plain_step(other, optimizers[1], on_device, clip=1.0)
        torch.testing.assert_close(step(*batch), expected, **TOLERANCE)
        if isinstance(optimizers[0].param_groups[0]["lr"], torch.Tensor):
            for one in optimizers:
                one.param_groups[0]["lr"].mul_(0.9)
    assert_same(module, other, **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_replays_do_not_wait_for_the_device():
    def adam(parameters):
        return torch.optim.Adam(parameters, capturable=True)

    module, _, optimizers = graphed_pair("triton", adam)
    step = GraphedStep(module, optimizers[0], B, T, clip=1.0)
    batch = make_batch(B, T, 0, torch.float32, "cuda")
    for _ in range(WARMUP + 1):
        step(*batch)
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for pairs in (B, 3, 1):
            step(*(t[:pairs] for t in batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() <= before + 512


@pytest.mark.gpu
def test_scoring_between_replays_sees_the_new_weights():
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.5)

    module, other, optimizers = graphed_pair("triton", sgd)
    step = GraphedStep(module, optimizers[0], B, T)
    batch = make_batch(B, T, 0, torch.float32, "cuda")
    for _ in range(WARMUP + 3):
        step(*batch)
        plain_step(other, optimizers[1], batch)
        with torch.no_grad():
            torch.testing.assert_close(module(*batch[:4]), other(*batch[:4]), **TOLERANCE)


@pytest.mark.gpu
def test_refusals_on_cuda():
    module, _, optimizers = graphed_pair("triton", torch.optim.Adam)
    with pytest.raises(ValueError, match="capturable=True on CUDA"):
        GraphedStep(module, optimizers[0], B, T)
    batch = make_batch(B, T, 0, torch.float32, "cuda")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step = GraphedStep(module, optimizer, B, T)
    for _ in range(WARMUP + 1):
        step(*batch)
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(ValueError, match=r"lr of parameter group 0 must stay .* 0.1, got 0.05"):
        step(*batch)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_sides_that_are_halves_of_one_tensor(batch):
    """They are joined without a copy, others as ever: the same to every bit."""
    module = make_module(learn_scale=True)
    both = torch.randint(V, (2, batch, T))
    lengths = torch.randint(1, T + 1, (2, batch))
    assert functional._stack(both[0], both[1]).data_ptr() == both.data_ptr()
    wanted = module(both[0].clone(), both[1].clone(), lengths[0].clone(), lengths[1].clone())
    assert torch.equal(module(both[0], both[1], lengths[0], lengths[1]), wanted)
    turned = module(both[1], both[0], lengths[1], lengths[0])
    assert torch.equal(
        turned, module(both[1].clone(), both[0].clone(), lengths[1].clone(), lengths[0].clone())
    )
    square = torch.randint(V, (2, 3, 3))
    for right in (square[1].t(), square[1, :1].expand(3, 3)):
        assert torch.equal(module(square[0], right), module(square[0].clone(), right.clone()))
    twice = module(both[0], both[0], lengths[0], lengths[0])
    assert torch.equal(twice, torch.ones_like(twice))


def test_halves_that_require_gradients():
    both = torch.zeros(2, 3, T, D, dtype=torch.float64)
    left, right = both[0].requires_grad_(), both[1]
    module = SiameseLSTM(D, H, dtype=torch.float64)
    module(left, right).sum().backward()
    assert left.grad is not None
