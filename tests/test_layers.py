"""Several layers, both directions, dropout and pooling of the module, beside nn.LSTM."""

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastsiam import SiameseLSTM

D, H, V = 5, 6, 12
LENGTHS = torch.tensor([5, 1, 3, 2])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_pair(layers, bidirectional, **options):
    """Return an nn.LSTM and a module with its weights."""
    lstm = nn.LSTM(D, H, layers, bidirectional=bidirectional, batch_first=True, device=DEVICE)
    return lstm, SiameseLSTM.from_lstm(lstm, **options)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("layers", [1, 3])
def test_parameters_are_nn_lstms(layers, bidirectional):
    torch.manual_seed(3)
    lstm = nn.LSTM(D, H, layers, bidirectional=bidirectional)
    torch.manual_seed(3)
    m = SiameseLSTM(D, H, layers, bidirectional=bidirectional)
    assert list(m.state_dict()) == list(lstm.state_dict())
    for name, tensor in lstm.state_dict().items():
        assert torch.equal(m.state_dict()[name], tensor), name
    back = SiameseLSTM.from_lstm(lstm).to_lstm()
    assert (back.num_layers, back.bidirectional) == (layers, bidirectional)
    for name, tensor in lstm.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("layers", "bidirectional", "pooling"),
    [(1, True, "max"), (2, True, "last"), (2, False, "mean")],
)
def test_vectors_are_nn_lstms_on_packed_input(backend, layers, bidirectional, pooling):
    lstm, m = make_pair(layers, bidirectional, pooling=pooling, backend=backend)
    x = torch.randn(4, 5, D, device=DEVICE)
    packed, (h, _) = lstm(pack_padded_sequence(x, LENGTHS, True, enforce_sorted=False))
    states, _ = pad_packed_sequence(packed, batch_first=True)
    behind = torch.arange(5, device=DEVICE) >= LENGTHS.to(DEVICE).unsqueeze(1)
    if pooling == "last":
        expected = torch.cat(list(h[-2:] if bidirectional else h[-1:]), dim=1)
    elif pooling == "mean":
        expected = states.sum(dim=1) / LENGTHS.to(DEVICE).unsqueeze(1)
    else:
        expected = states.masked_fill(behind.unsqueeze(2), -torch.inf).amax(dim=1)
    actual = m.encode(x, LENGTHS)
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(m.encode(x, LENGTHS), expected)
    similarity = m(x, x.flip(0), LENGTHS, LENGTHS.flip(0))
    torch.testing.assert_close(
        similarity, torch.exp(-(expected - m.encode(x.flip(0), LENGTHS.flip(0))).abs().sum(dim=1))
    )


def test_a_mask_stands_in_for_the_pooling():
    _, m = make_pair(1, True, pooling="max")
    x, mask = torch.randn(4, 5, D, device=DEVICE), torch.rand(4, 5, device=DEVICE)
    _, plain = make_pair(1, True)
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(m.encode(x, mask=mask), plain.encode(x, mask=mask))
    assert not torch.allclose(m.encode(x), plain.encode(x))


def test_the_cached_projection_of_both_directions(backend):
    table = torch.randn(V, D)
    _, m = make_pair(2, True, embedding=table, backend=backend, pooling="max")
    ids = torch.randint(V, (4, 5), device=DEVICE)
    trained = m.encode(ids, LENGTHS).detach()
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(m.encode(ids, LENGTHS), trained)
    with torch.no_grad():
        m.weight_ih_l0_reverse.mul_(2)
        changed = m.encode(ids, LENGTHS)
    assert not torch.allclose(changed[:, H:], trained[:, H:])
    torch.testing.assert_close(changed, m.encode(ids, LENGTHS).detach())


def test_dropout_has_one_mask_a_pair(backend):
    m = SiameseLSTM(D, 40, 2, dropout=0.5, backend=backend, device=DEVICE, scale=0.1)
    x, y = torch.randn(2, 4, 5, D, device=DEVICE)
    # equal sentences stay equal whatever is dropped
    torch.testing.assert_close(m(x, x), torch.ones(4, device=DEVICE))
    assert not torch.allclose(m(x, y), m(x, y))
    # pairs have masks of their own
    same = m(x[:1].expand(4, -1, -1), y[:1].expand(4, -1, -1))
    assert same.unique().numel() == 4
    m.eval()
    assert torch.equal(m(x, y), m(x, y))


def test_dropout_keeps_the_mean_and_one_mask_for_all_steps():
    from fastsiam.engine.network import _drop

    states = torch.rand(6, 7, 50) + 1
    dropped = _drop(states, 0.25, paired=True)
    kept = dropped > 0
    torch.testing.assert_close(dropped, states * kept / 0.75)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert torch.equal(kept[:3], kept[3:])
    alone = _drop(states, 0.25, paired=False) > 0
    assert not torch.equal(alone[:3], alone[3:])
    assert abs(_drop(torch.ones(2000, 1, 50), 0.25, paired=False).mean().item() - 1) < 0.01


def test_compiled_in_one_graph(fused_backend):
    m = SiameseLSTM(D, H, bidirectional=True, pooling="max", backend=fused_backend, device=DEVICE)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    x, y = torch.randn(2, 3, 5, D, device=DEVICE)
    lengths = torch.tensor([5, 0, 2], device=DEVICE)
    for call in (m, compiled):
        m.zero_grad()
        call(x, y, lengths, lengths).sum().backward()
        grads = [p.grad.clone() for p in m.parameters()]
        if call is m:
            plain = grads
    for one, other in zip(plain, grads, strict=True):
        torch.testing.assert_close(one, other)
