"""The monotone map, against a brute-force fit and numpy's interpolation."""

import itertools

import numpy as np
import pytest
import torch

from fastsiam.calibration import Calibration


def best_rising_steps(y):
    """The rising sequence nearest to y, by trying every cut of it into blocks of equal value."""
    n, best = len(y), None
    for cuts in itertools.product([False, True], repeat=n - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut]
        blocks = [y[a:b] for a, b in zip([0, *ends], [*ends, n], strict=True)]
        means = [block.mean() for block in blocks]
        if all(a <= b for a, b in itertools.pairwise(means)):
            error = sum(((block - m) ** 2).sum() for block, m in zip(blocks, means, strict=True))
            if best is None or error < best[0]:
                best = error, blocks, means
    return best[1], best[2]


@pytest.mark.parametrize("seed", range(5))
def test_fit_is_the_nearest_rising_map(seed):
    rng = np.random.default_rng(seed)
    x = np.sort(rng.uniform(0.05, 0.95, 9))
    y = np.clip(x**2 + rng.normal(0, 0.2, 9), 0, 1)
    blocks, means = best_rising_steps(np.concatenate([[0.0], y, [1.0]]))
    ends = np.cumsum([0, *map(len, blocks)])
    all_x = np.concatenate([[0.0], x, [1.0]])
    middles = [all_x[a:b].mean() for a, b in itertools.pairwise(ends)]
    order = rng.permutation(9)
    made = Calibration.fit(torch.tensor(x[order]), torch.tensor(y[order]))
    # blocks of one value may be cut anywhere: the map is compared, not its knots
    grid = np.linspace(0, 1, 101)
    np.testing.assert_allclose(
        made(torch.tensor(grid)), np.interp(grid, middles, means), atol=1e-12
    )


def test_equal_predictions_get_one_value():
    x, y = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.0, 0.2, 0.4, 0.6])
    assert float(Calibration.fit(x, y)(torch.tensor(0.5))) == pytest.approx(0.3)


def test_it_lowers_the_error_and_keeps_the_order():
    generator = torch.Generator().manual_seed(0)
    gold = torch.rand(4000, generator=generator)
    predicted = (gold.sqrt() + 0.1 * torch.randn(4000, generator=generator)).clamp(0, 0.98)
    made = Calibration.fit(predicted[:2000], gold[:2000])
    x, y = predicted[2000:], gold[2000:]
    assert (made(x) - y).square().mean() < 0.8 * (x - y).square().mean()
    order = made(torch.linspace(0, 1, 1000)).diff()
    assert (order >= 0).all()
    assert (order > 0).float().mean() > 0.95
    # the score of equal sentences stays
    assert made(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.0, 1.0], abs=0.05)


def test_shape_and_dtype_are_kept():
    made = Calibration([0.2, 0.4], [0.1, 0.9])
    out = made(torch.tensor([[0.0, 0.3], [0.4, 1.0]], dtype=torch.float32))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.tensor([[0.1, 0.5], [0.9, 0.9]]))
    assert made(torch.empty(0)).shape == (0,)


def test_to_dict_and_back():
    made = Calibration.fit(torch.rand(50), torch.rand(50))
    again = Calibration.from_dict(made.to_dict())
    assert torch.equal(again.predicted, made.predicted)
    assert torch.equal(again.gold, made.gold)


def test_nothing_that_rises_is_the_mean_everywhere():
    made = Calibration.fit(torch.tensor([0.0, 1.0] * 50), torch.tensor([1.0, 0.0] * 50))
    assert made(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize(
    ("predicted", "gold"),
    [
        ([0.5], [0.5]),
        ([0.1, 0.2], [0.5]),
        ([0.2, 0.1], [0.1, 0.2]),
        ([0.1, 0.1], [0.1, 0.2]),
        ([0.1, 0.2], [0.2, 0.1]),
        ([-0.1, 0.2], [0.1, 0.2]),
        ([0.1, float("nan")], [0.1, 0.2]),
    ],
)
def test_what_is_no_such_map_is_refused(predicted, gold):
    with pytest.raises(ValueError, match="predicted must rise and gold must not fall"):
        Calibration(predicted, gold)


@pytest.mark.parametrize("knots", [[[0.1], [0.2]], [0, 10**400], [0, None], "ab", 0.5])
def test_what_holds_no_numbers_is_refused(knots):
    with pytest.raises(ValueError, match="predicted and gold must be lists of numbers"):
        Calibration(knots, [0.1, 0.2])


@pytest.mark.parametrize(
    ("predicted", "gold", "match"),
    [
        (torch.rand(3), torch.rand(4), "of one size"),
        (torch.rand(0), torch.rand(0), "at least 1"),
        (torch.tensor([0.5, float("nan")]), torch.rand(2), "within 0..1"),
        (torch.rand(2), torch.tensor([0.5, 1.5]), "within 0..1"),
    ],
)
def test_fit_refuses(predicted, gold, match):
    with pytest.raises(ValueError, match=match):
        Calibration.fit(predicted, gold)
