"""`SiameseLSTM` as a module: parameters, copies, precision, training, and the cached projection."""

import concurrent.futures
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence

from fastsiam import SiameseLSTM, functional

D, H, V = 5, 6, 12
NAMES = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(**options):
    return SiameseLSTM(D, H, **{"device": DEVICE, **options})


def make_embedded(**options):
    return make(embedding=torch.randn(V, D), **options)


def draw_ids(B=4, T=5):
    return torch.randint(V, (2, B, T), device=DEVICE), torch.tensor([5, 1, 0, 3], device=DEVICE)


def score(m, ids=None):
    (left, right), lengths = draw_ids() if ids is None else ids
    return m(left, right, lengths, lengths.flip(0))


# parameters


def test_nn_lstm_state_dict_loads():
    lstm = nn.LSTM(D, H, batch_first=True, device=DEVICE)
    m = make()
    assert list(m.state_dict()) == list(lstm.state_dict()) == NAMES
    assert [tuple(p.shape) for p in m.parameters()] == [tuple(p.shape) for p in lstm.parameters()]
    m.load_state_dict(lstm.state_dict())
    x, y = torch.randn(2, 3, 7, D, device=DEVICE)
    expected = torch.exp(-(lstm(x)[0][:, -1] - lstm(y)[0][:, -1]).abs().sum(dim=1))
    torch.testing.assert_close(m(x, y), expected)
    lstm.load_state_dict(m.state_dict())


def test_start_is_nn_lstms():
    """The same draws from the same seed, so that a comparison of the two starts alike."""
    torch.manual_seed(3)
    m = SiameseLSTM(D, H)
    torch.manual_seed(3)
    lstm = nn.LSTM(D, H)
    for name, tensor in lstm.state_dict().items():
        assert torch.equal(m.state_dict()[name], tensor), name


def test_strict_loading():
    lstm = nn.LSTM(D, H).state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key.*"embedding\.weight"'):
        make_embedded().load_state_dict(lstm)
    m = make_embedded()
    missing = m.load_state_dict(lstm, strict=False)
    assert missing.missing_keys == ["embedding.weight"]
    assert missing.unexpected_keys == []
    with pytest.raises(RuntimeError, match=r'Missing key.*"log_scale"'):
        make(learn_scale=True).load_state_dict(lstm)
    with pytest.raises(RuntimeError, match="size mismatch"):
        make().load_state_dict(nn.LSTM(D, H + 1).state_dict())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_to_and_from_lstm(bias, dtype):
    lstm = nn.LSTM(D, H, bias=bias, device=DEVICE, dtype=dtype)
    m = SiameseLSTM.from_lstm(lstm, scale=0.5)
    back = m.to_lstm()
    assert m.scale == 0.5
    assert back.batch_first
    for name, tensor in lstm.state_dict().items():
        for other in (m, back):
            same = other.state_dict()[name]
            assert torch.equal(same, tensor)
            assert (same.dtype, same.device) == (dtype, tensor.device)
            assert same.data_ptr() != tensor.data_ptr()
    assert list(m.state_dict()) == list(lstm.state_dict())
    x = torch.randn(3, 4, D, device=DEVICE, dtype=dtype)
    torch.testing.assert_close(m.encode(x), back(x)[0][:, -1])


@pytest.mark.parametrize(
    "change",
    [
        lambda network: nn.utils.parametrizations.weight_norm(network, "weight_hh_l0"),
        lambda network: prune.l1_unstructured(network, "weight_hh_l0", 0.5),
    ],
    ids=["parametrized", "pruned"],
)
def test_to_and_from_lstm_with_computed_weights(change):
    """Their state_dict has other names than those of the weights."""
    lstm, m = nn.LSTM(D, H, device=DEVICE), make()
    for network in (lstm, m):
        change(network)
    for name in NAMES:
        assert torch.equal(getattr(SiameseLSTM.from_lstm(lstm), name), getattr(lstm, name))
        assert torch.equal(getattr(m.to_lstm(), name), getattr(m, name))


def test_from_lstm_with_an_embedding():
    table = torch.randn(V, D)
    lstm = nn.LSTM(D, H, device=DEVICE)
    m = SiameseLSTM.from_lstm(lstm, embedding=table, learn_scale=True)
    assert list(m.state_dict()) == [*NAMES, "log_scale", "embedding.weight"]
    assert list(m.to_lstm().state_dict()) == NAMES
    ids, lengths = draw_ids()
    x, y = table.to(DEVICE)[ids]
    expected = SiameseLSTM.from_lstm(lstm)(x, y, lengths, lengths.flip(0))
    torch.testing.assert_close(score(m, (ids, lengths)), expected)


def test_scale_is_an_option_or_a_parameter():
    fixed, learned = make(scale=0.25), make(scale=0.25, learn_scale=True)
    assert list(fixed.state_dict()) == NAMES
    assert list(fixed.buffers()) == []
    assert list(learned.state_dict()) == [*NAMES, "log_scale"]
    learned.load_state_dict(fixed.state_dict(), strict=False)
    assert fixed.scale == 0.25
    assert learned.scale.item() == pytest.approx(0.25)
    x, y = torch.randn(2, 3, 4, D, device=DEVICE)
    torch.testing.assert_close(fixed(x, y), learned(x, y))
    torch.testing.assert_close(torch.log(fixed(x, y)), fixed.log_similarity(x, y))
    learned(x, y).sum().backward()
    assert learned.log_scale.grad < 0


def test_log_similarity_does_not_underflow(backend):
    m = make(scale=1000.0, backend=backend)
    x, y = torch.randn(2, 3, 4, D, device=DEVICE)
    assert not m(x, y).any()
    log_similarity = m.log_similarity(x, y)
    assert (log_similarity < -100).all()
    log_similarity.sum().backward()
    assert all(p.grad.any() for p in m.parameters())


def test_embedding_given_as_tensor_or_module():
    table = torch.randn(V, D)
    copied, frozen = make(embedding=table), make(embedding=nn.Embedding.from_pretrained(table))
    assert copied.embedding.weight.data_ptr() != table.data_ptr()
    assert torch.equal(copied.embedding.weight, frozen.embedding.weight)
    for m in (copied, frozen):
        assert not m.embedding.weight.requires_grad
        score(m).sum().backward()
        assert m.embedding.weight.grad is None
    own = nn.Embedding(V, D)
    m = make(embedding=own, freeze_embedding=False)
    assert m.embedding is own
    score(m).sum().backward()
    assert own.weight.grad.any()
    for other in (table.double(), nn.Embedding(V, D, dtype=torch.float64)):
        assert make(embedding=other).embedding.weight.dtype == torch.float32
        assert SiameseLSTM(D, H, embedding=other, device="meta").embedding.weight.is_meta
    assert make(embedding=table, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("option", ["padding_idx", "scale_grad_by_freq", "sparse"])
def test_an_embeddings_options_for_gradients_need_a_frozen_one(option):
    own = nn.Embedding(V, D, **{option: True})
    assert not make(embedding=own).embedding.weight.requires_grad
    with pytest.raises(ValueError, match=f"^SiameseLSTM: embedding must be without {option}="):
        make(embedding=own, freeze_embedding=False)
    assert not own.weight.requires_grad


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
def test_a_parametrized_embedding(freeze):
    own = nn.utils.parametrizations.weight_norm(nn.Embedding(V, D))
    m = make(embedding=own, freeze_embedding=freeze)
    ids = draw_ids()
    score(m, ids).sum().backward()
    for parameter in own.parameters():
        assert (parameter.grad is None) == freeze
    with torch.no_grad():
        own.parametrizations.weight.original0.mul_(2)
        plain = SiameseLSTM.from_lstm(m.to_lstm(), embedding=own.weight)
        torch.testing.assert_close(score(m, ids), score(plain, ids))


def test_masks_of_any_number(backend):
    m = make_embedded(backend=backend)
    (left, right), lengths = draw_ids()
    mask = torch.randint(2, left.shape, device=DEVICE)
    expected = m(left, right, left_mask=mask.float(), right_mask=mask.float())
    for dtype in (torch.bool, torch.int64, torch.float64, torch.bfloat16):
        masks = {"left_mask": mask.to(dtype), "right_mask": mask.to(dtype)}
        torch.testing.assert_close(m(left, right, **masks), expected)
    # a one at the end is the same as lengths
    last = (torch.arange(5, device=DEVICE) == lengths.unsqueeze(1) - 1).float()
    torch.testing.assert_close(
        m(left, right, left_mask=last, right_mask=last), m(left, right, lengths, lengths)
    )


def test_lengths_of_any_kind(backend):
    m = make_embedded(backend=backend)
    (left, right), lengths = draw_ids()
    expected = m(left, right, lengths, lengths)
    for given in (lengths.tolist(), tuple(lengths.tolist()), lengths.int(), lengths.cpu()):
        assert torch.equal(m(left, right, given, given), expected)
    full = torch.full_like(lengths, 5)
    assert torch.equal(m(left, right), m(left, right, full, full))
    with torch.device("meta"):
        assert torch.equal(m(left, right, lengths.tolist(), lengths), expected)


# copies


@pytest.mark.parametrize("filled", [False, True], ids=["fresh", "cached"])
def test_deepcopy_and_pickle(filled):
    m = make_embedded(scale=0.5, learn_scale=True)
    ids = draw_ids()
    if filled:
        with torch.no_grad():
            score(m, ids)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        with torch.no_grad():
            assert torch.equal(score(twin, ids), score(m, ids))
            twin.weight_hh_l0.zero_()
            assert not torch.equal(score(twin, ids), score(m, ids))


def test_save_and_load():
    m, other = make_embedded(learn_scale=True), make_embedded(learn_scale=True)
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    ids = draw_ids()
    with torch.no_grad():
        assert not torch.equal(score(other, ids), score(m, ids))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(score(other, ids), score(m, ids))


# precision


def test_half_double_and_back(backend):
    m = make_embedded(backend=backend)
    ids = draw_ids()
    expected = score(m, ids).detach()
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(m).to(dtype)
        assert half.encode(ids[0][0]).dtype == dtype
        assert score(half, ids).dtype == torch.float32
        torch.testing.assert_close(score(half, ids).detach(), expected, rtol=0, atol=0.05)
    if backend != "triton":
        double = copy.deepcopy(m).double()
        assert score(double, ids).dtype == torch.float64
        torch.testing.assert_close(score(double, ids).float(), expected)
    assert score(copy.deepcopy(m).half().float(), ids).dtype == torch.float32


@pytest.mark.parametrize("embedded", [True, False], ids=["ids", "dense"])
def test_autocast(backend, embedded):
    options = {"backend": backend, "scale": 0.5, "learn_scale": True}
    m = make_embedded(freeze_embedding=False, **options) if embedded else make(**options)
    (left, right), lengths = draw_ids()
    if not embedded:
        left, right = torch.randn(2, 4, 5, D, device=DEVICE)
    plain = m(left, right, lengths, lengths)
    plain.sum().backward()
    gradients = [p.grad for p in m.parameters()]
    m.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16):
        similarity = m(left, right, lengths, lengths)
        assert m.encode(left).dtype == torch.bfloat16
        with torch.no_grad():
            inferred = m(left, right, lengths, lengths)
    similarity.sum().backward()
    assert similarity.dtype == inferred.dtype == torch.float32
    assert not torch.equal(similarity, plain)
    torch.testing.assert_close(similarity, plain, rtol=0, atol=0.05)
    torch.testing.assert_close(inferred, similarity.detach(), rtol=0, atol=0.01)
    for p, gradient in zip(m.parameters(), gradients, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=0.1)
    # and what was cached for one precision is not used for the other
    with torch.no_grad():
        torch.testing.assert_close(m(left, right, lengths, lengths), plain.detach())


# tools


def test_train_and_eval_are_one():
    m = make_embedded()
    ids = draw_ids()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(score(m.train(), ids), score(m.eval(), ids))


def test_export_through_the_reference():
    m = make_embedded(backend="reference").eval()
    (left, right), lengths = draw_ids()
    batch = ({0: torch.export.Dim("B")},) * 4
    exported = torch.export.export(m, (left, right, lengths, lengths), dynamic_shapes=batch)
    for rows in (4, 1):
        inputs = left[:rows], right[:rows], lengths[:rows], lengths[:rows]
        torch.testing.assert_close(exported.module()(*inputs), m(*inputs))
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") or "fastsiam" not in name for name in operators)


@pytest.mark.parametrize("grad", [True, False])
def test_vmap_over_an_ensemble(grad):
    members = [make_embedded(backend="reference").requires_grad_(False) for _ in range(3)]
    (left, right), lengths = draw_ids()
    state = torch.func.stack_module_state(members)

    def member(state):
        return torch.func.functional_call(members[0], state, (left, right, lengths, lengths))

    with torch.set_grad_enabled(grad):
        together = torch.vmap(member)(state)
        each = [m(left, right, lengths, lengths) for m in members]
    torch.testing.assert_close(together, torch.stack(each))


def test_data_parallel_steps(tmp_path):
    """A process group of one."""
    group = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=group, rank=0, world_size=1)
    try:
        m = make_embedded(device="cpu", learn_scale=True, freeze_embedding=False)
        alone = copy.deepcopy(m)
        wrapped = nn.parallel.DistributedDataParallel(m)
        ids, lengths = (t.cpu() for t in draw_ids())
        for model, parameters in ((wrapped, m), (alone, alone)):
            optimizer = torch.optim.SGD(parameters.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                model(*ids, lengths, lengths).sum().backward()
                optimizer.step()
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(m.state_dict()[name], tensor)
    finally:
        torch.distributed.destroy_process_group()


def test_explain():
    m = make()
    assert f": inputs are on {DEVICE}" in m.explain()
    assert m.explain().endswith(f"(H = 6, float32 on {DEVICE})")
    assert m.explain("cpu").startswith(("cpu: inputs are on cpu", "batched: inputs are on cpu"))
    for backend in ("batched", "lstm", "reference"):
        m = make(backend=backend, dtype=torch.bfloat16)
        assert m.explain() == f"{backend}: named by the caller (H = 6, bfloat16 on {DEVICE})"
    wide = SiameseLSTM(D, 256)
    assert "up to 8 pairs" in wide.explain("cpu")
    assert wide.explain("cpu", pairs=8).startswith("lstm: ")
    assert not wide.explain("cpu", pairs=9).startswith("lstm: ")


def test_explain_on_cuda(triton):
    """What a machine with a GPU would say, asked on any."""
    assert make().explain("cuda").startswith("triton: inputs are on cuda and the kernels cover")
    assert make(dtype=torch.float64).explain("cuda").startswith("lstm: dtype must be float32,")


def test_repr():
    assert repr(make(scale=0.25)).startswith("SiameseLSTM(5, 6, bias=True, pooling='last', scale=0")
    assert "scale=learned" in repr(make_embedded(learn_scale=True, backend="torch"))
    unusual = {"recompute": True, "similarity": "cosine", "freeze_embedding": False}
    shown = repr(make_embedded(**unusual))
    assert "recompute=True" in shown
    assert "similarity='cosine'" in shown
    assert "freeze_embedding=False" in shown


def test_a_warning_names_the_callers_line():
    with pytest.warns(UserWarning, match="SiameseLSTM: dropout=0.5 acts between layers") as found:
        make(dropout=0.5)
    assert found[0].filename == __file__


# training


class Rival(nn.Module):
    """The same network out of PyTorch's parts."""

    def __init__(self, m):
        super().__init__()
        self.embedding = copy.deepcopy(m.embedding)
        self.lstm = m.to_lstm()
        self.log_scale = copy.deepcopy(m.log_scale)

    def forward(self, left, right, left_lengths, right_lengths):
        u, v = self.last(left, left_lengths), self.last(right, right_lengths)
        return torch.exp(-self.log_scale.exp() * (u - v).abs().sum(dim=1))

    def last(self, ids, lengths):
        x = self.embedding(ids)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][0][0]


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("backend", ["torch", "lstm", "reference"])
def test_training_is_nn_lstms(backend, make_optimizer):
    m = make_embedded(
        dtype=torch.float64, device="cpu", learn_scale=True, freeze_embedding=False, backend=backend
    )
    rival = Rival(m)
    batches = [
        (*torch.randint(V, (2, 8, 7)), *torch.randint(1, 8, (2, 8)), torch.rand(8).double())
        for _ in range(20)
    ]
    losses = []
    for model in (m, rival):
        optimizer = make_optimizer(model.parameters(), lr=0.05)
        losses.append([])
        for *inputs, target in batches:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(*inputs), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-9)
    own, other = m.state_dict(), rival.state_dict()
    for name in own:
        theirs = other.get(name, other.get(f"lstm.{name}"))
        torch.testing.assert_close(own[name], theirs, rtol=0, atol=1e-9, msg=name)


# the projected vocabulary, kept while no weight changes


@pytest.fixture
def prepares(monkeypatch):
    """The calls that project the vocabulary."""
    calls = []

    def counted(weights, embedding, backend, **options):
        calls.append(backend)
        return prepare(weights, embedding, backend, **options)

    prepare = functional.prepare
    monkeypatch.setattr(functional, "prepare", counted)
    return calls


def test_prepared_projects_once_while_gradients_are_off(fused_backend, prepares):
    m = make_embedded(backend=fused_backend)
    ids = draw_ids()
    expected = score(m, ids).detach()
    with torch.no_grad():
        torch.testing.assert_close(score(m, ids), expected)
    assert prepares == []
    with m.prepared() as same:
        assert same is m
        for off in (torch.no_grad, torch.inference_mode):
            with off(), m.prepared():
                torch.testing.assert_close(score(m, ids), expected)
                m.encode(ids[0][0])
                m.log_similarity(*ids[0])
    assert prepares == [fused_backend]
    with torch.no_grad(), m.prepared():
        score(m, ids)
    assert prepares == [fused_backend] * 2


def test_prepared_is_dropped_by_gradients_and_at_the_end(prepares):
    m = make_embedded(backend="batched")
    ids = draw_ids()
    with torch.no_grad(), m.prepared():
        score(m, ids)
        with torch.enable_grad():
            score(m, ids)
        score(m, ids)
    assert len(prepares) == 2
    with torch.no_grad():
        score(m, ids)
    assert len(prepares) == 2


def test_nothing_is_prepared_during_a_capture(monkeypatch, prepares):
    """A graph holds pointers: a projection made anew after a step would leave it the old one."""
    m = make_embedded(backend="batched")
    ids = draw_ids()
    with torch.no_grad(), m.prepared():
        before = score(m, ids)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        # neither taken, though it is there, nor made
        monkeypatch.setattr(functional, "check_projection", None)
        torch.testing.assert_close(score(m, ids), before)
        m.forget_projection()
        score(m, ids)
    assert len(prepares) == 1


def test_threads_share_a_projection():
    m = make_embedded(backend="torch", device="cpu")
    ids = tuple(t.cpu() for t in draw_ids())
    with torch.no_grad():
        expected = score(m, ids)

    def run(_):
        with torch.no_grad(), m.prepared():
            return score(m, ids)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(run, range(64)):
            torch.testing.assert_close(found, expected)


def test_computed_weights_have_no_cache(prepares):
    """They are others in each call: what was projected for one would never be found again."""
    m = make_embedded(backend="torch")
    nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")
    ids = draw_ids()
    with torch.no_grad(), m.prepared():
        assert torch.equal(score(m, ids), score(m, ids))
    assert prepares == []


def test_nothing_stays_behind_where_a_module_moves():
    table = torch.randn(V, D).numpy()
    memory = weakref.ref(table)
    shared = nn.Embedding.from_pretrained(torch.from_numpy(table))
    m = SiameseLSTM(D, H, embedding=shared, backend="torch", device="cpu")
    with torch.no_grad(), m.prepared():
        score(m, tuple(t.cpu() for t in draw_ids()))
    m.double()
    del table, shared
    gc.collect()
    assert memory() is None


def test_dense_inputs_have_no_cache(prepares):
    m = make()
    with torch.no_grad(), m.prepared():
        m(*torch.randn(2, 3, 4, D, device=DEVICE))
    assert prepares == []


def in_place(m):
    with torch.no_grad():
        m.bias_hh_l0.add_(1)


def take_step(m):
    optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
    with torch.enable_grad():
        score(m).sum().backward()
    optimizer.step()


def load(m):
    m.load_state_dict(make_embedded().state_dict())


def change_backend(m):
    m.backend = "lstm"


def replace_embedding(m):
    m.embedding = nn.Embedding.from_pretrained(torch.randn(V + 3, D, device=DEVICE))


def replace_weight(m):
    m.weight_hh_l0 = nn.Parameter(torch.randn(4 * H, H, device=DEVICE))


def embedding_rows(m):
    with torch.no_grad():
        m.embedding.weight[1:] = 3.0


CHANGES = [in_place, take_step, load, change_backend, replace_embedding, replace_weight]
CHANGES += [embedding_rows]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_cache_follows_every_change(fused_backend, change):
    m = make_embedded(backend=fused_backend)
    ids = draw_ids()
    with torch.no_grad(), m.prepared():
        before = score(m, ids)
        change(m)
        after = score(m, ids)
    # with gradients on nothing is prepared
    torch.testing.assert_close(after, score(m, ids).detach())
    if change is not change_backend:
        assert not torch.allclose(after, before, rtol=0, atol=1e-4)


def test_cache_follows_a_weight_that_is_turned_round():
    """In its place, by which address, shape, type and version stay the same."""
    m = SiameseLSTM(4 * H, H, embedding=torch.randn(V, 4 * H), backend="torch", device="cpu")
    ids = tuple(t.cpu() for t in draw_ids())
    with torch.no_grad(), m.prepared():
        before = score(m, ids)
        m.weight_ih_l0.data = m.weight_ih_l0.data.T
        after = score(m, ids)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, score(m, ids).detach())


def test_a_table_of_one_call_is_not_taken_for_the_next_ones():
    """It may have the address of one that is gone, the same first column and the same version."""
    m = make_embedded(device="cpu", backend="torch").requires_grad_(False)
    ids = tuple(t.cpu() for t in draw_ids())
    for _ in range(5):
        table = {"embedding.weight": torch.randn(V, D).index_fill_(1, torch.tensor([0]), 1.0)}
        arguments = *ids[0], ids[1], ids[1].flip(0)
        with torch.no_grad(), m.prepared():
            kept = torch.func.functional_call(m, table, arguments)
        torch.testing.assert_close(kept, torch.func.functional_call(m, table, arguments))
        del table


def test_a_forgotten_projection_is_made_anew(prepares):
    """After a write that PyTorch does not count: through memory that numpy shares."""
    table = torch.randn(V, D).numpy()
    shared = nn.Embedding.from_pretrained(torch.from_numpy(table))
    m = SiameseLSTM(D, H, embedding=shared, backend="torch", device="cpu")
    ids = tuple(t.cpu() for t in draw_ids())
    with torch.no_grad(), m.prepared():
        before = score(m, ids)
        table[:, 1:] = 3
        m.forget_projection()
        after = score(m, ids)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, score(m, ids).detach())
    assert len(prepares) == 2


def test_inference_mode_all_the_way(fused_backend):
    """Made, loaded and used inside it, where tensors have no version counter."""
    ids = draw_ids()
    m = make_embedded(backend=fused_backend)
    expected = score(m, ids).detach()
    with torch.inference_mode():
        twin = make_embedded(backend=fused_backend)
        twin.load_state_dict(m.state_dict())
        assert twin.weight_hh_l0.is_inference()
        for _ in range(2):
            torch.testing.assert_close(score(twin, ids), expected)
    with torch.no_grad(), twin.prepared():
        torch.testing.assert_close(score(twin, ids), expected)


# only where there is a GPU


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu(triton):
    m = make_embedded(backend="triton", freeze_embedding=False)
    ids = draw_ids()
    target = torch.rand(4, device=DEVICE)

    def step():
        nn.functional.mse_loss(score(m, ids), target).backward()
        with torch.no_grad():
            return score(m, ids)

    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_one_graph_serves_every_batch_of_a_shape(triton):
    m = make_embedded(backend="triton")
    (left, right), lengths = draw_ids()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        m(left, right, lengths, lengths)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        similarity = m(left, right, lengths, lengths)
    for _ in range(2):
        new, new_lengths = draw_ids()
        left.copy_(new[0])
        right.copy_(new[1])
        lengths.copy_(new_lengths.flip(0))
        graph.replay()
        with torch.no_grad():
            assert torch.equal(similarity, m(left, right, lengths, lengths))
