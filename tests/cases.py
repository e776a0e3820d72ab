"""The shapes and options that a test of an operator runs over, and inputs for them."""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiam.engine import reference
from fastsiam.functional import Weights, siamese_encode, siamese_similarity

# conftest.py decides it
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@dataclass(frozen=True)
class Case:
    B: int = 3
    T_left: int = 7
    T_right: int = 2
    D: int = 5
    H: int = 16
    dtype: torch.dtype = torch.float32
    lengths: str = "mixed"  # or "none", "full", "ones", "zeros"
    lengths_as: str = "int64"  # or "int32", "list"
    inputs: str = "dense"  # or "ids", "ids, trained": whether the embedding trains
    ids_dtype: torch.dtype = torch.int64
    vocabulary: str = "few"  # rows of the embedding: fewer than tokens, or "many"
    pooling: str = "last"  # or "mean", "max", "mask"
    directions: int = 1
    layers: int = 1
    bias: bool = True
    strided: bool = False
    learned_scale: bool = False
    call: str = "similarity"  # or "log_similarity", "encode": what gradients come from
    cell: str = "lstm"  # or "gru"

    @property
    def scale(self) -> float:
        # L1 grows with H, and exp(-y) has y times the relative error of y
        return 1.5 / self.H

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        words = [f"B{self.B}", f"T{self.T_left},{self.T_right}", f"H{self.H}", dtype]
        words += [self.lengths, self.inputs.replace(", ", "-"), self.call]
        words += [self.pooling] * (self.pooling != "last") + ["strided"] * self.strided
        words += ["both-ways"] * (self.directions == 2) + ["stacked"] * (self.layers > 1)
        return "-".join(words + [self.cell] * (self.cell != "lstm"))


FACTORS: dict[str, tuple[Any, ...]] = {
    "B": (1, 3, 17, 64),
    "T_left": (1, 2, 7, 31),
    "T_right": (1, 2, 7, 31),
    "D": (1, 5),
    "H": (1, 3, 16, 50, 64, 100, 128),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "lengths": ("mixed", "none", "full", "ones"),
    "lengths_as": ("int64", "int32", "list"),
    "inputs": ("dense", "ids", "ids, trained"),
    "ids_dtype": (torch.int64, torch.int32),
    "vocabulary": ("few", "many"),
    "pooling": ("last", "mask", "mean", "max"),
    "directions": (1, 2),
    "layers": (1, 2),
    "bias": (True, False),
    "strided": (False, True),
    "learned_scale": (False, True),
    "call": ("similarity", "log_similarity", "encode"),
}


def affordable(row: dict[str, Any]) -> bool:
    """Whether an interpreter gets through a row, or part of one, in seconds."""
    tokens = row.get("B", 1) * max(row.get("T_left", 1), row.get("T_right", 1))
    tokens *= row.get("directions", 1) * row.get("layers", 1)
    streamed = row.get("dtype") == torch.float32 and row.get("H", 1) > 64
    full = row.get("lengths") in ("none", "full")
    return tokens <= (64 if streamed else 130 if full else 600)


def covering_array(
    factors: dict[str, tuple[Any, ...]], allowed: Callable[[dict[str, Any]], bool]
) -> Iterator[dict[str, Any]]:
    """Yield rows until every allowed pair of values of two factors was in one of them."""
    rng = random.Random(0)
    items = [[(name, value) for value in values] for name, values in factors.items()]
    pairs = (pair for a, b in itertools.combinations(items, 2) for pair in itertools.product(a, b))
    missing = {frozenset(pair): None for pair in pairs if allowed(dict(pair))}
    while missing:
        row = dict(next(iter(missing)))
        rest = [name for name in factors if name not in row]
        rng.shuffle(rest)
        for name in rest:
            options = [(name, v) for v in factors[name] if allowed({**row, name: v})]
            rng.shuffle(options)
            new = [sum(frozenset((o, i)) in missing for i in row.items()) for o in options]
            row[name] = options[new.index(max(new))][1]
        for pair in itertools.combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
        yield row


CASES = [Case(**row) for row in covering_array(FACTORS, affordable)]
# all lengths 0 leave nothing to compute, so they would spoil any other pair of values
CASES += [
    Case(B=3, H=16, lengths="zeros"),
    Case(B=17, H=3, lengths="zeros", inputs="ids, trained", dtype=torch.float16, pooling="mask"),
    Case(B=1, H=50, lengths="zeros", inputs="ids", dtype=torch.bfloat16, call="encode"),
]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call. `leaves` are float64, rounded to the case's dtype."""

    leaves: dict[str, Tensor]  # what has a gradient, by name
    fixed: dict[str, Any]  # what has none: ids, a frozen embedding, masks, lengths
    steps: tuple[Tensor, Tensor]  # [B] lengths of both sides, int64
    upstream: Tensor  # gradient of the call's result


def make_inputs(case: Case) -> Inputs:
    """Draw inputs; what stands behind a sentence's end is NaN, or an id of no row."""
    # of a few draws, the one whose sums cancel least: no result hangs on a machine's last bit
    generator = torch.Generator().manual_seed(case.B * 1000 + case.H + 39595)
    B, D, H = case.B, case.D, case.H

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def rounded(t: Tensor) -> Tensor:
        return t.to(case.dtype).double()

    def rows(*shape: int) -> Tensor:
        # not near 0: an activation errs by eps of 1, and errors are measured by the largest entry
        return rounded(
            (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5)
            * randn(*shape).sign()
        )

    leaves = {}
    gates = {"lstm": 4, "gru": 3}[case.cell] * H
    for name, columns in weight_names(case):
        leaves[f"weight_ih{name}"] = rounded(randn(gates, columns) / columns**0.5)
        leaves[f"weight_hh{name}"] = rounded(randn(gates, H) / H**0.5)
        if case.bias:
            leaves[f"bias_ih{name}"] = rounded(randn(gates))
            leaves[f"bias_hh{name}"] = rounded(randn(gates))
    if case.learned_scale:
        leaves["scale"] = torch.tensor(case.scale, dtype=torch.float32).double()
    sides = {"left": case.T_left, "right": case.T_right}
    V = 7 if case.vocabulary == "few" else 2 * B * sum(sides.values()) + 3
    fixed: dict[str, Any] = {}
    steps = {}
    for side, T in sides.items():
        lengths = _lengths(case, T, generator)
        steps[side] = lengths
        behind = torch.arange(T) >= lengths.unsqueeze(1)
        if case.inputs == "dense":
            leaves[side] = rows(B, T, D).masked_fill(behind.unsqueeze(2), torch.nan)
        else:
            ids = torch.randint(V, (B, T), generator=generator, dtype=case.ids_dtype)
            wild = torch.tensor([-1, V, -(2**31), 2**31 - 1], dtype=case.ids_dtype)
            fixed[side] = torch.where(behind, wild[ids % 4], ids)
        if case.pooling == "mask":
            fixed[f"{side}_mask"] = rounded(randn(B, T)).masked_fill(behind, torch.nan)
        if case.lengths != "none":
            as_list, dtype = case.lengths_as == "list", getattr(torch, case.lengths_as, None)
            fixed[f"{side}_lengths"] = lengths.tolist() if as_list else lengths.to(dtype)
    if case.inputs != "dense":
        (leaves if case.inputs == "ids, trained" else fixed)["embedding"] = rows(V, D)
    # of one sign for pairs: the gradient of the scale is one number, their sum
    width = case.directions * H
    upstream = rounded(randn(B, width) if case.call == "encode" else randn(B).abs())
    return Inputs(leaves, fixed, (steps["left"], steps["right"]), upstream)


def weight_names(case: Case) -> list[tuple[str, int]]:
    """Return what nn.LSTM appends to a weight's name, and the columns of weight_ih."""
    return [
        (f"_l{layer}{direction}", case.directions * case.H if layer else case.D)
        for layer in range(case.layers)
        for direction in ("", "_reverse")[: case.directions]
    ]


def _lengths(case: Case, T: int, generator: torch.Generator) -> Tensor:
    if case.lengths in ("none", "full"):
        return torch.full((case.B,), T)
    if case.lengths in ("ones", "zeros"):
        return torch.full((case.B,), int(case.lengths == "ones"))
    # most are short, as in a corpus; one is empty and one is full where there is room
    lengths = (torch.rand(case.B, generator=generator) ** 3 * (T + 1)).long()
    lengths[0] = T
    lengths[1:2] = 0
    return lengths


def place(t: Any, case: Case, dtype: torch.dtype) -> Any:
    """Return t on the device, in dtype if it is floating point, with gaps if the case says so."""
    if not isinstance(t, Tensor):
        return t
    t = t.to(DEVICE, dtype if t.is_floating_point() else None)
    if not case.strided or t.ndim == 0:
        return t.clone()
    return torch.stack((t, torch.zeros_like(t)), dim=-1)[..., 0]


Results = dict[str, Tensor]


def compute(case: Case, inputs: Inputs, backend: str, dtype: torch.dtype) -> Results:
    """Return one backend's values and gradients by name.

    The call is made for its gradient; encode, or similarity where the call is encode, without one.
    """
    leaves = {name: place(t, case, dtype).requires_grad_() for name, t in inputs.leaves.items()}
    # a scale of half precision would be another scale
    if "scale" in leaves:
        precise = torch.promote_types(dtype, torch.float32)
        leaves["scale"] = place(inputs.leaves["scale"], case, precise).requires_grad_()
    given = {name: place(t, case, dtype) for name, t in inputs.fixed.items()} | leaves
    weights = [
        Weights(*(given.pop(field + name, None) for field in Weights._fields))
        for name, _ in weight_names(case)
    ]
    left, right = given.pop("left"), given.pop("right")
    scale = given.pop("scale", case.scale)
    options = {
        "embedding": given.pop("embedding", None),
        "backend": backend,
        "cell": case.cell,
        "bidirectional": case.directions == 2,
        "pooling": "last" if case.pooling == "mask" else case.pooling,
    }

    def score(log: bool) -> Tensor:
        return siamese_similarity(left, right, weights, scale=scale, log=log, **options, **given)

    def encode(x: Tensor, side: str) -> Tensor:
        own = {name: given.get(f"{side}_{name}") for name in ("lengths", "mask")}
        return siamese_encode(x, weights, **options, **own)

    if case.call == "encode":
        with torch.no_grad():
            results = {"similarity": score(log=False), "log_similarity": score(log=True)}
        value = encode(left, "left")
    else:
        with torch.no_grad():
            results = {"h_left": encode(left, "left"), "h_right": encode(right, "right")}
        value = score(log=case.call == "log_similarity")
    results[f"trained {case.call}"] = value.detach()
    return results | _gradients(case, value, inputs, leaves)


def _gradients(case: Case, value: Tensor, inputs: Inputs, leaves: Results) -> Results:
    if case.call == "encode":
        # the right side and the scale are not part of it
        leaves = {name: t for name, t in leaves.items() if name not in ("right", "scale")}
    upstream = inputs.upstream.to(value.device, value.dtype)
    gradients = torch.autograd.grad(value, leaves.values(), upstream)
    return {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def define(case: Case, inputs: Inputs, dtype: torch.dtype, sign: Tensor | None = None) -> Results:
    """Return the definition's results, computed in dtype; names as in `compute`.

    Args:
        sign: [B, H] signs of h_left - h_right to differentiate |h_left - h_right| with. Where the
            two are equal to rounding, either sign is right, so it is taken from what is checked.
    """
    precise = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: t.to(DEVICE, precise if name == "scale" else dtype, copy=True).requires_grad_()
        for name, t in inputs.leaves.items()
    }
    given = inputs.fixed | leaves
    h = {}
    for side, lengths in zip(("left", "right"), inputs.steps, strict=True):
        lengths = lengths.to(DEVICE)
        x, mask = given[side].to(DEVICE), given.get(f"{side}_mask")
        if case.inputs != "dense":
            valid = torch.arange(x.shape[1], device=DEVICE) < lengths.unsqueeze(1)
            x = F.embedding(torch.where(valid, x, 0), given["embedding"].to(DEVICE, dtype))
        if case.pooling == "mask":
            mask = mask.to(DEVICE, dtype)
        elif case.pooling == "mean":
            mask = (1 / lengths.clamp(min=1).to(precise)).unsqueeze(1).expand(-1, x.shape[1])
        h[side] = _encode(case, given, x, lengths, mask)
    difference = h["left"].to(precise) - h["right"].to(precise)
    sign = difference.detach().sign() if sign is None else sign
    scale = given.get("scale", case.scale)
    log_similarity = -scale * (sign * difference).sum(dim=1)
    similarity = torch.exp(log_similarity)
    value = {
        "similarity": similarity,
        "log_similarity": log_similarity,
        "encode": h["left"],
    }[case.call]
    results = {
        "h_left": h["left"],
        "h_right": h["right"],
        "similarity": similarity,
        "log_similarity": log_similarity,
        f"trained {case.call}": value,
    }
    results = {name: t.detach() for name, t in results.items()}
    return results | _gradients(case, value, inputs, leaves)


def _encode(
    case: Case, given: dict[str, Any], x: Tensor, lengths: Tensor, mask: Tensor | None
) -> Tensor:
    pooling = "mask" if case.pooling == "mean" else case.pooling
    vectors = []
    for layer in range(case.layers):
        directions = []
        vectors = []
        for reverse in (False, True)[: case.directions]:
            name = f"_l{layer}" + "_reverse" * reverse
            weights = given["weight_ih" + name], given["weight_hh" + name], _bias(case, given, name)
            states = reference.STATES[case.cell](x, lengths, *weights, reverse)
            directions.append(states)
            vectors.append(reference.pool(states, lengths, pooling, mask, reverse))
        x = torch.cat(directions, dim=2)
    return torch.cat(vectors, dim=1)


def _bias(case: Case, given: dict[str, Any], name: str) -> Tensor | None:
    if not case.bias:
        return None
    of_input, of_state = given["bias_ih" + name], given["bias_hh" + name]
    if case.cell == "lstm":
        return of_input + of_state
    both = 2 * case.H
    return torch.cat((of_input[:both] + of_state[:both], of_input[both:], of_state[both:]))


# only compiled: rows enough to be grouped by length on any GPU, long sequences, many words. No
# maxima: of so many units some have two largest states that are equal to rounding
LARGE = [
    Case(B=1024, T_left=32, T_right=32, D=300, H=128, dtype=torch.bfloat16, lengths="full"),
    Case(B=4099, T_left=24, T_right=37, D=31, H=50, dtype=torch.bfloat16, inputs="ids"),
    Case(B=4099, T_left=24, T_right=37, D=31, H=64, inputs="ids, trained"),
    Case(B=257, T_left=73, T_right=73, D=300, H=100, dtype=torch.float16, inputs="ids, trained"),
    Case(B=32, T_left=73, T_right=73, D=300, H=50, call="log_similarity", learned_scale=True),
    Case(B=33, T_left=300, T_right=3, D=7, H=128, pooling="mask", call="encode"),
    Case(B=4099, T_left=24, T_right=37, D=31, H=50, inputs="ids", directions=2, pooling="mean"),
    Case(B=257, T_left=73, T_right=20, D=31, H=100, layers=2, directions=2, inputs="ids, trained"),
]
