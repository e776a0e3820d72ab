"""The contenders: fastsiam, and nn.LSTM in every way a good engineer would call it.

All of them do the same work from the same ids: look the words up, run the network over both sides,
pool each sentence's states, score the pairs. A rival's `vectors` function returns the sentence
vectors, [2B, H] for each direction.
"""

import contextlib
import copy
import importlib.util
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import public
from benchmarks.cases import SCALE, Batch, Case, Sentences, make_weights
from fastsiam import SiameseGRU, SiameseLSTM
from fastsiam.engine.layer import Call
from fastsiam.engine.select import BACKENDS
from fastsiam.graph import WARMUP, GraphedStep

Build = Callable[[Case, nn.RNNBase, Tensor], nn.Module]
Vectors = Callable[[nn.ModuleList, Tensor, Batch], Tensor]


def one_way(rnn: nn.RNNBase) -> nn.ModuleList:
    """Return a network of each direction, the second for sentences that are turned round.

    On padded input nn.LSTM's own second direction would begin in the padding.
    """
    made = nn.ModuleList()
    for suffix in ("", "_reverse")[: 2 if rnn.bidirectional else 1]:
        weights = rnn.state_dict()
        alone = type(rnn)(rnn.input_size, rnn.hidden_size)
        alone.to(rnn.weight_hh_l0)
        alone.load_state_dict({name: weights[name + suffix] for name in alone.state_dict()})
        made.append(alone)
    return made


def pool(states: Tensor, last: Tensor, rows: Tensor, pooling: str) -> Tensor:
    """Return the sentence vectors, [S, H], from the states of all steps, [T, S, H]."""
    if pooling == "last":
        return states[last, rows]
    time = torch.arange(states.shape[0], device=last.device).unsqueeze(1)
    return states.masked_fill((time > last).unsqueeze(2), -torch.inf).amax(dim=0)


def encode(networks: nn.ModuleList, table: Tensor, some: Sentences, pooling: str) -> Tensor:
    """Run over padded sentences, all steps of them."""
    parts = []
    for network, ids in zip(networks, (some.steps, some.turned), strict=False):
        states, _ = network(F.embedding(ids, table))
        parts.append(pool(states, some.last, some.rows, pooling))
    return torch.cat(parts, dim=1)


def padded(networks: nn.ModuleList, table: Tensor, batch: Batch) -> Tensor:
    """Run both sides in one call over all T steps."""
    return encode(networks, table, batch.sentences, batch.case.pooling)


def trimmed(networks: nn.ModuleList, table: Tensor, batch: Batch) -> Tensor:
    """Do as `padded`, cut to the batch's longest sentence."""
    return encode(networks, table, batch.trimmed, batch.case.pooling)


def bucketed(networks: nn.ModuleList, table: Tensor, batch: Batch) -> Tensor:
    """Do as `trimmed` for each quarter of the sentences by length."""
    parts = [encode(networks, table, some, batch.case.pooling) for some in batch.buckets]
    return torch.cat(parts)[batch.by_length[2]]


def two_calls(networks: nn.ModuleList, table: Tensor, batch: Batch) -> Tensor:
    """Run each side over all T steps in a call of its own."""
    return torch.cat([encode(networks, table, half, batch.case.pooling) for half in batch.halves])


def step_by_step(networks: nn.ModuleList, table: Tensor, batch: Batch) -> Tensor:
    """Project all words in one product, then one product and PyTorch's fused cell a step."""
    (lstm,), some = networks, batch.trimmed
    gates = F.linear(F.embedding(some.steps, table), lstm.weight_ih_l0)
    h = c = gates.new_zeros(gates.shape[1], lstm.hidden_size)
    states = []
    for gate in gates:
        h, c, _ = torch.ops.aten._thnn_fused_lstm_cell(
            gate, F.linear(h, lstm.weight_hh_l0), c, lstm.bias_ih_l0, lstm.bias_hh_l0
        )
        states.append(h)
    return pool(torch.stack(states), some.last, some.rows, batch.case.pooling)


class Rival(nn.Module):
    """A siamese model around nn.LSTM or nn.GRU."""

    def __init__(self, rnn: nn.RNNBase, table: Tensor, vectors: Vectors) -> None:
        super().__init__()
        self.networks = one_way(rnn)
        self.table = table
        self.vectors = vectors

    def forward(self, batch: Batch) -> Tensor:
        return score(self.vectors(self.networks, self.table, batch))


class Compiled(Rival):
    """`padded` with everything around nn.LSTM compiled; nn.LSTM itself stays a library call."""

    def __init__(self, rnn: nn.RNNBase, table: Tensor) -> None:
        super().__init__(rnn, table, padded)
        self.compiled = torch.compile(super().forward)

    def forward(self, batch: Batch) -> Tensor:
        # while it compiles, torch uses what torch warns of
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.compiled(batch)


class Packed(nn.Module):
    """All sentences as one packed sequence, sorted beforehand."""

    def __init__(self, rnn: nn.RNNBase, table: Tensor) -> None:
        super().__init__()
        self.rnn = copy.deepcopy(rnn)
        self.rnn.flatten_parameters()  # cuDNN wants them in one piece, which a copy is not
        self.table = table

    def forward(self, batch: Batch) -> Tensor:
        steps, lengths, back = batch.by_length
        sequence = nn.utils.rnn.pack_padded_sequence(F.embedding(steps, self.table), lengths)
        states, last = self.rnn(sequence)
        if batch.case.pooling == "last":
            h = last[0] if isinstance(last, tuple) else last
            return score(torch.cat(tuple(h), dim=1)[back])
        padding, _ = nn.utils.rnn.pad_packed_sequence(states, padding_value=-torch.inf)
        return score(padding.amax(dim=0)[back])


def score(vectors: Tensor) -> Tensor:
    u, v = vectors.float().chunk(2)
    return torch.exp(-SCALE * (u - v).abs().sum(dim=1))


class Ours(nn.Module):
    """SiameseLSTM or SiameseGRU as a user calls it."""

    def __init__(self, case: Case, rnn: nn.RNNBase, table: Tensor, backend: str = "auto") -> None:
        super().__init__()
        make = SiameseLSTM.from_lstm if case.cell == "lstm" else SiameseGRU.from_gru
        options = {"embedding": table, "scale": SCALE, "pooling": case.pooling}
        self.model = make(rnn, **options, backend=backend)

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch.left, batch.right, batch.left_lengths, batch.right_lengths)

    def explain(self, batch: Batch, work: str) -> str:
        with torch.set_grad_enabled(work != "scoring"):
            return self.model.explain(pairs=batch.case.B)


class OursPrepared(Ours):
    """The same inside `prepared`, as whoever scores many batches calls it."""

    def __init__(self, case: Case, rnn: nn.RNNBase, table: Tensor, backend: str = "auto") -> None:
        super().__init__(case, rnn, table, backend)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.model.prepared())
            self.stay = stack.pop_all()


class OursGraphed(Ours):
    """The whole training step as the one call that the library offers."""

    def whole_step(
        self, batch: Batch, optimizer: torch.optim.Optimizer, clip: float
    ) -> Callable[[], object]:
        step = GraphedStep(self.model, optimizer, batch.case.B, batch.case.T, clip=clip)
        inputs = (batch.left, batch.right, batch.left_lengths, batch.right_lengths, batch.target)
        for _ in range(WARMUP + 1):
            step(*inputs)
        return lambda: step(*inputs)


@dataclass(frozen=True)
class Contender:
    """A way to do the work, and where it cannot or need not run."""

    name: str
    build: Build
    ours: bool = False
    only_on: str | None = None  # a device type
    only_in: str | None = None  # a setting
    only_for: str | None = None  # a pass
    not_in_graph: str | None = None  # the reason
    needs: str | None = None  # a package that is no dependency
    dtypes: tuple[str, ...] | None = None

    def why_not(self, case: Case, device: str, setting: str, work: str) -> str | None:
        """Return why there is nothing to time here, or None."""
        if self.only_on not in (None, device):
            return f"{self.name} runs on {self.only_on} only"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.name} is not installed; benchmarks/rivals.md says how"
        if self.dtypes and case.dtype not in self.dtypes:
            return f"{self.name} is set up for {' and '.join(self.dtypes)} only"
        if self.only_in not in (None, setting):
            return f"{self.name} is of use in a {self.only_in} only"
        if self.only_for not in (None, work):
            return f"{self.name} differs in {self.only_for} only"
        if setting == "graph" and self.not_in_graph:
            return f"{self.name} in a CUDA graph: {self.not_in_graph}"
        if self.name == "fastsiam triton":
            dtype = torch.float32 if case.dtype == "tf32" else getattr(torch, case.dtype)
            call = Call(case.cell, case.H, dtype, torch.device(device), work != "scoring")
            if obstacle := BACKENDS["triton"].obstacle(call):
                return obstacle
        one_lstm = case.cell == "lstm" and not case.bidirectional and case.pooling == "last"
        if (self.name == "step by step" or self.needs) and not one_lstm:
            return f"{self.name} is written for the last state of an LSTM in one direction"
        if self.name == "compiled" and device == "cpu":
            return (
                "compiled: on a CPU nn.LSTM is nearly all of the time, and compiling leaves it be"
            )
        if self.name == "compiled" and shutil.which("cc") is None:
            return "compiled: torch.compile needs a C compiler"
        return None


def rival(vectors: Vectors) -> Build:
    return lambda _, rnn, table: Rival(rnn, table, vectors)


def ours(backend: str) -> Build:
    return lambda case, rnn, table: Ours(case, rnn, table, backend)


MAIN_RIVAL = "padded"
CONTENDERS = [
    Contender("fastsiam", ours("auto"), ours=True),
    Contender(
        "fastsiam torch", ours("torch"), ours=True, not_in_graph="it reads lengths on the host"
    ),
    Contender("fastsiam triton", ours("triton"), ours=True, only_on="cuda"),
    Contender("fastsiam prepared", OursPrepared, ours=True, only_for="scoring"),
    Contender(
        "fastsiam graphed", OursGraphed, ours=True, only_on="cuda", only_in="eager", only_for="step"
    ),
    Contender("padded", rival(padded)),
    Contender("trimmed", rival(trimmed)),
    Contender("bucketed", rival(bucketed)),
    Contender(
        "packed", lambda _, rnn, table: Packed(rnn, table), not_in_graph="packing works on the host"
    ),
    Contender("two calls", rival(two_calls)),
    Contender(
        "compiled",
        lambda _, rnn, table: Compiled(rnn, table),
        not_in_graph="torch.compile may recompile in a capture",
    ),
    Contender("step by step", rival(step_by_step), only_on="cuda", only_in="graph"),
    Contender(
        "TorchRL",
        rival(public.torchrl_padded),
        only_on="cuda",
        needs="torchrl",
        dtypes=("tf32",),  # it takes float32 alone
    ),
    Contender(
        "FlashRNN",
        rival(public.flashrnn_padded),
        only_on="cuda",
        only_in="eager",
        needs="flashrnn",
        dtypes=("bfloat16",),
    ),
    Contender(
        "FastLSTM",
        rival(public.fastlstm_padded),
        only_on="cuda",
        only_in="eager",  # where it pays, it replays graphs of its own
        needs="fastlstm",
        dtypes=("tf32", "bfloat16"),
    ),
]


def build(contender: Contender, case: Case, device: torch.device) -> nn.Module:
    """Make a contender with the case's weights, the same for all of them."""
    return contender.build(case, *make_weights(case, device))
