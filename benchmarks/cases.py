"""The shapes that are timed, and the sentence lengths they are timed with."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

SCALE = 0.25  # of L1 in the exponent: keeps the similarities of untrained weights away from 0
BUCKETS = 4


@dataclass(frozen=True)
class Case:
    """A shape: B pairs of T padded steps, D features of V distinct words, H hidden units."""

    name: str
    H: int
    D: int
    B: int
    T: int
    lengths: str  # "full", "sick" or "outlier"
    V: int = 2400
    dtype: str = "float32"  # or "tf32" (CUDA), "bfloat16", "float16"
    cell: str = "lstm"  # or "gru"
    bidirectional: bool = False
    pooling: str = "last"  # or "max"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def eps(self) -> float:
        """Of the numbers that products are made of; tf32 has 11 bits, the hidden one included."""
        return 2.0**-10 if self.dtype == "tf32" else torch.finfo(self.torch_dtype).eps


def sick_lengths(count: int, T: int, generator: torch.Generator) -> Tensor:
    """Draw lengths like those of SICK's sentences: mean 9.7, from 3 to 36, and at most T.

    Log-normal with sigma 0.37, rounded; the location makes the mean.
    """
    normal = torch.randn(count, generator=generator)
    return torch.exp(2.2 + 0.37 * normal).round().clamp(3, min(36, T)).long()


def make_lengths(case: Case, generator: torch.Generator) -> Tensor:
    """Return the lengths of 2B sentences: all T, like SICK's, or like SICK's and one of T."""
    if case.lengths == "full":
        return torch.full((2 * case.B,), case.T)
    lengths = sick_lengths(2 * case.B, case.T, generator)
    if case.lengths == "outlier":
        lengths[0] = case.T
    return lengths


class Sentences(NamedTuple):
    """Some of a batch's sentences as a network without batch_first takes them."""

    steps: Tensor  # [T, S] ids
    turned: Tensor  # [T, S] ids, each sentence from its last word to its first
    last: Tensor  # [S] number of the last step
    rows: Tensor  # [S] 0, 1, 2, ...


class Batch:
    """A batch of pairs as a loader hands it over, left sentences first, then right ones.

    What a loader can work out beforehand on the host is worked out once and is not timed: the
    longest length, an order by length, buckets, and ids step by step as nn.LSTM works on them
    without batch_first, in both directions. All of these are gifts to the rivals; fastsiam has no
    use for them.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.case = case
        self.device = device
        self.host_lengths = make_lengths(case, generator)
        ids = torch.randint(case.V, (2 * case.B, case.T), generator=generator).to(device)
        self.lengths = self.host_lengths.to(device)
        self.target = torch.rand(case.B, generator=generator).to(device)
        # as fastsiam takes them
        self.left, self.right = ids.chunk(2)
        self.left_lengths, self.right_lengths = self.lengths.chunk(2)
        # as the rivals do
        time = torch.arange(case.T, device=device)
        ends = self.lengths.unsqueeze(1)
        turned = ids.gather(1, torch.where(time < ends, ends - 1 - time, time))
        rows = torch.arange(2 * case.B, device=device)
        # [T, 2B], a step's ids side by side
        steps, turned = (side.t().contiguous() for side in (ids, turned))
        self.sentences = Sentences(steps, turned, self.lengths - 1, rows)
        self.longest = int(self.host_lengths.max())

    @cached_property
    def trimmed(self) -> Sentences:
        """All sentences, cut to the longest."""
        return cut(self.sentences, slice(None), self.longest)

    @cached_property
    def halves(self) -> list[Sentences]:
        """The left sentences and the right ones."""
        B = self.case.B
        return [cut(self.sentences, half, self.case.T) for half in (slice(B), slice(B, None))]

    @cached_property
    def by_length(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [longest, 2B] sorted by length, longest first; host lengths; the way back."""
        # whoever comes first: a tensor made in inference mode cannot take part in a backward
        with torch.inference_mode(False):
            lengths, order = self.host_lengths.sort(descending=True, stable=True)
            steps = self.sentences.steps[: self.longest, order.to(self.device)].contiguous()
            return steps, lengths, order.argsort().to(self.device)

    @cached_property
    def buckets(self) -> list[Sentences]:
        """The sentences by length in equal parts, each cut to its longest."""
        with torch.inference_mode(False):
            lengths, order = self.host_lengths.sort(descending=True, stable=True)
            parts = zip(order.chunk(BUCKETS), lengths.chunk(BUCKETS), strict=True)
            return [cut(self.sentences, o.to(self.device), int(some[0])) for o, some in parts]


def cut(sentences: Sentences, which: Tensor | slice, steps: int) -> Sentences:
    """Return some sentences, the first steps of them."""
    with torch.inference_mode(False):
        last = sentences.last[which]
        return Sentences(
            sentences.steps[:steps, which].contiguous(),
            sentences.turned[:steps, which].contiguous(),
            last,
            torch.arange(len(last), device=last.device),
        )


def make_weights(case: Case, device: torch.device, seed: int = 0) -> tuple[nn.RNNBase, Tensor]:
    """Return an nn.LSTM or nn.GRU with its own initial weights, and the word vectors [V, D]."""
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}[case.cell]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rnn = kind(case.D, case.H, bidirectional=case.bidirectional)
        table = torch.randn(case.V, case.D)
    options = {"device": device, "dtype": case.torch_dtype}
    return rnn.to(**options), table.to(**options)


# what the recipe "best" trains, but for its size
BOTH_WAYS = {"H": 75, "D": 300, "B": 64, "T": 73, "bidirectional": True, "pooling": "max"}

CPU_CASES = [
    Case("32 pairs", H=50, D=300, B=32, T=73, lengths="full"),
    Case("32 pairs", H=50, D=300, B=32, T=73, lengths="sick"),
    Case("32 pairs", H=50, D=300, B=32, T=73, lengths="outlier"),
    Case("256 pairs", H=50, D=300, B=256, T=73, lengths="sick"),
    Case("2048 pairs", H=50, D=300, B=2048, T=73, lengths="sick"),
    Case("both ways", lengths="sick", **BOTH_WAYS),
    Case("GRU", H=50, D=300, B=256, T=73, lengths="sick", cell="gru"),
]

HEADLINE = [
    ("A", {"H": 50, "D": 300, "B": 32, "T": 73}),
    ("B", {"H": 128, "D": 300, "B": 1024, "T": 32}),
    ("B'", {"H": 128, "D": 300, "B": 16384, "T": 32}),
    ("C", {"H": 512, "D": 512, "B": 256, "T": 128, "V": 10000}),
    ("D", {"H": 1024, "D": 1024, "B": 256, "T": 128, "V": 10000}),
    ("both ways", BOTH_WAYS),
    ("GRU", {"H": 50, "D": 300, "B": 32, "T": 73, "cell": "gru"}),
]
GPU_CASES = [
    Case(name, lengths=lengths, dtype=dtype, **sizes)
    for name, sizes in HEADLINE
    for lengths in ("full", "sick", "outlier")
    for dtype in ("tf32", "bfloat16")
]

QUICK_CASES = [Case("quick", H=5, D=7, B=3, T=6, lengths="sick", V=11)]
