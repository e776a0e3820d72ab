"""`recompute`: the same gradients without keeping the activations."""

import pytest
import torch
from cases import DEVICE

from fastsiam import SiameseLSTM
from fastsiam.engine import autograd

D, H, V, B = 5, 6, 12, 7


def train_once(m, left, right, lengths):
    m.zero_grad()
    loss = m(left, right, lengths, lengths.flip(0)).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in m.parameters())]


@pytest.mark.parametrize(
    ("name", "embedded"),
    [
        ("torch", True),
        ("torch", False),
        ("lstm", True),
        ("reference", False),
        # the parts are cut above the kernels, so one case does
        ("triton", True),
    ],
)
def test_same_gradients_part_by_part(request, name, embedded, monkeypatch):
    if name == "triton":
        request.getfixturevalue("triton")
    # three sequences a part, so that the last one is smaller
    monkeypatch.setattr(autograd, "PART_SEQUENCES", 3)
    monkeypatch.setattr(autograd, "PART_TOKENS", 1)
    torch.manual_seed(0)
    options = {"bidirectional": name != "triton", "pooling": "max", "learn_scale": True}
    if embedded:
        options |= {"embedding": torch.randn(V, D), "freeze_embedding": False}
    else:
        options["num_layers"] = 2 if name == "torch" else 1
    m = SiameseLSTM(D, H, backend=name, device=DEVICE, **options)
    lengths = torch.tensor([5, 0, 1, 3, 5, 2, 4], device=DEVICE)
    if embedded:
        left, right = torch.randint(V, (2, B, 5), device=DEVICE)
    else:
        left, right = torch.randn(2, B, 5, D, device=DEVICE)
    plain = train_once(m, left, right, lengths)
    m.recompute = True
    for one, other in zip(plain, train_once(m, left, right, lengths), strict=True):
        torch.testing.assert_close(one, other)
    vectors = m.encode(left, lengths)
    m.recompute = False
    torch.testing.assert_close(vectors, m.encode(left, lengths))


def test_nothing_of_every_step_is_kept():
    """What autograd holds for the backward does not grow with the steps but for the inputs."""

    def kept_bytes(recompute, T):
        sizes = []

        def count(t):
            sizes.append(t.numel() * t.element_size())
            return t

        m = SiameseLSTM(D, H, embedding=torch.randn(V, D), recompute=recompute, backend="torch")
        ids = torch.randint(V, (2, B, T))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            m(*ids)
        return sum(sizes)

    ids_bytes = 2 * B * 8  # a step's
    assert kept_bytes(True, 40) - kept_bytes(True, 20) == 20 * ids_bytes
    assert kept_bytes(False, 40) - kept_bytes(False, 20) == 20 * (ids_bytes + 2 * B * 6 * H * 4)


def test_dropout_draws_the_same_mask_again():
    torch.manual_seed(0)
    m = SiameseLSTM(D, H, 2, dropout=0.5, backend="torch")
    left, right = torch.randn(2, B, 5, D)
    lengths = torch.full((B,), 5)
    results = []
    for m.recompute in (False, True):
        torch.manual_seed(1)
        results.append(train_once(m, left, right, lengths))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
