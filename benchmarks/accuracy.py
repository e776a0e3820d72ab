"""No green check, no number: every contender against float64 before it is timed."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import SCALE, Batch, Case, make_weights

# as in the tests: twice what nn.LSTM errs in the same precision, or 8 eps of the dtype
FACTOR = 2
FLOOR_EPS = 8


@dataclass(frozen=True)
class Result:
    """Similarities [B] and the gradients of the mean squared error, by parameter."""

    similarity: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """Largest errors against float64, each relative to the largest entry of its tensor."""

    value: float
    gradient: float


def gold(case: Case, batch: Batch) -> Result:
    """Compute a case in float64 without any padding: sentences of one length at a time."""
    rnn, table = make_weights(case, batch.device)
    rnn, table = rnn.double(), table.double()
    ends: list[Tensor] = []
    rows: list[Tensor] = []
    for length in batch.host_lengths.unique().tolist():
        some = (batch.lengths == length).nonzero()[:, 0]
        states, last = rnn(table[batch.sentences.steps[:length, some]])
        h = last[0] if isinstance(last, tuple) else last
        ends.append(states.amax(dim=0) if case.pooling == "max" else torch.cat(tuple(h), dim=1))
        rows.append(some)
    vectors = torch.cat(ends)[torch.cat(rows).argsort()]
    u, v = vectors.chunk(2)
    similarity = torch.exp(-SCALE * (u - v).abs().sum(dim=1))
    return finish(similarity, rnn, batch)


def run(model: nn.Module, batch: Batch) -> Result:
    return finish(model(batch), model, batch)


def finish(similarity: Tensor, model: nn.Module, batch: Batch) -> Result:
    loss = (similarity - batch.target.to(similarity.dtype)).square().mean()
    weights = {weight_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return Result(similarity.detach(), dict(zip(weights, gradients, strict=True)))


def weight_name(name: str) -> str:
    """Return nn.LSTM's name of a contender's weight; `one_way` numbers the directions."""
    place, _, weight = name.rpartition(".")
    return weight + "_reverse" if place.endswith("networks.1") else weight


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest entry; NaN counts as infinite."""
    difference = (actual.double() - expected).abs().max() / expected.abs().max()
    return float("inf") if difference.isnan() else difference.item()


def errors(model: nn.Module, batch: Batch, truth: Result) -> Errors:
    """Measure a contender: values with and without gradients being recorded, and gradients."""
    training = run(model, batch)
    with torch.inference_mode():
        scored = model(batch)
    if training.gradients.keys() != truth.gradients.keys():
        raise AssertionError(f"gradients of {list(training.gradients)}")
    return Errors(
        value=max(error(s, truth.similarity) for s in (scored, training.similarity)),
        gradient=max(error(training.gradients[n], truth.gradients[n]) for n in truth.gradients),
    )


def fault(found: Errors, rival: Errors, eps: float) -> str | None:
    """Say what is wrong with a contender's errors, given the main rival's; None if nothing."""
    for name in ("value", "gradient"):
        actual = getattr(found, name)
        limit = max(FACTOR * getattr(rival, name), FLOOR_EPS * eps)
        if not actual <= limit:
            return f"{name} error {actual:.1e} against float64, more than {limit:.1e}"
    return None
