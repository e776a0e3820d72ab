"""How wrong a result may be: measured against the reference, never typed into a test."""

from torch import Tensor

# a kernel sums in another order than the reference, so it may be unlucky where that is lucky
TIMES_THE_REFERENCE = 2.5
# and so it may where both are nearly exact
EPS = 10


def largest_error(actual: Tensor, gold: Tensor) -> float:
    """Return the largest entry of |actual - gold|; NaN where there is a NaN."""
    return float((actual.double() - gold).abs().max()) if gold.numel() else 0.0


def bound(same_dtype: Tensor, gold: Tensor, eps: float) -> float:
    """Return the largest error that is allowed.

    Args:
        same_dtype: what the reference gives in the dtype under test.
        gold: what it gives in float64.
        eps: of the dtype that inputs and weights were rounded to.
    """
    largest = float(gold.abs().max()) if gold.numel() else 0.0
    return max(TIMES_THE_REFERENCE * largest_error(same_dtype, gold), EPS * eps * largest)


def assert_accurate(
    name: str, actual: Tensor, same_dtype: Tensor, gold: Tensor, eps: float, times: float = 1
) -> None:
    """Fail unless `actual` is as good as the reference in its dtype; see `bound`."""
    assert actual.shape == gold.shape, f"{name}: {list(actual.shape)}, not {list(gold.shape)}"
    error, allowed = largest_error(actual, gold), times * bound(same_dtype, gold, eps)
    # false where either is NaN
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"
