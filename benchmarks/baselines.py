"""The contenders: fastsiam, and nn.LSTM in every way a good engineer would call it.

All of them do the same work from the same ids: look the words up, run the LSTM over both sides,
take the state at each sentence's last word, score the pairs. A rival's `vectors` function returns
those states, [2B, H].
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import SCALE, Batch, Case, make_weights
from fastsiam import SiameseLSTM, functional

Vectors = Callable[[nn.LSTM, Tensor, Batch], Tensor]


def padded(lstm: nn.LSTM, table: Tensor, batch: Batch) -> Tensor:
    """Run both sides in one call over all T steps, then gather the last valid ones."""
    states, _ = lstm(F.embedding(batch.steps, table))
    return states[batch.last, batch.rows]


def trimmed(lstm: nn.LSTM, table: Tensor, batch: Batch) -> Tensor:
    """Do as `padded`, cut to the batch's longest sentence."""
    states, _ = lstm(F.embedding(batch.steps[: batch.longest], table))
    return states[batch.last, batch.rows]


def bucketed(lstm: nn.LSTM, table: Tensor, batch: Batch) -> Tensor:
    """Do as `trimmed` for each quarter of the sentences by length."""
    parts = [lstm(F.embedding(ids, table))[0][last, rows] for ids, last, rows in batch.buckets]
    return torch.cat(parts)[batch.by_length[2]]


def packed(lstm: nn.LSTM, table: Tensor, batch: Batch) -> Tensor:
    """Run both sides as one packed sequence, sorted beforehand."""
    steps, lengths, back = batch.by_length
    sequence = nn.utils.rnn.pack_padded_sequence(F.embedding(steps, table), lengths)
    _, (h, _) = lstm(sequence)
    return h[0, back]


def two_calls(lstm: nn.LSTM, table: Tensor, batch: Batch) -> Tensor:
    """Run each side over all T steps in a call of its own."""
    sides = (batch.left_steps, batch.right_steps)
    left, right = (lstm(F.embedding(steps, table))[0] for steps in sides)
    return torch.cat((left, right), dim=1)[batch.last, batch.rows]


def step_by_step(lstm: nn.LSTM, table: Tensor, batch: Batch) -> Tensor:
    """Project all words in one product, then one product and PyTorch's fused cell a step."""
    gates = F.linear(F.embedding(batch.steps[: batch.longest], table), lstm.weight_ih_l0)
    h = c = gates.new_zeros(gates.shape[1], lstm.hidden_size)
    states = []
    for gate in gates:
        h, c, _ = torch.ops.aten._thnn_fused_lstm_cell(
            gate, F.linear(h, lstm.weight_hh_l0), c, lstm.bias_ih_l0, lstm.bias_hh_l0
        )
        states.append(h)
    return torch.stack(states)[batch.last, batch.rows]


class Rival(nn.Module):
    """A siamese model around nn.LSTM."""

    def __init__(self, lstm: nn.LSTM, table: Tensor, vectors: Vectors) -> None:
        super().__init__()
        self.lstm = copy.deepcopy(lstm)
        self.table = table
        self.vectors = vectors

    def forward(self, batch: Batch) -> Tensor:
        u, v = self.vectors(self.lstm, self.table, batch).float().chunk(2)
        return torch.exp(-SCALE * (u - v).abs().sum(dim=1))


class Compiled(Rival):
    """`padded` with everything around nn.LSTM compiled; nn.LSTM itself stays a library call."""

    def __init__(self, lstm: nn.LSTM, table: Tensor) -> None:
        super().__init__(lstm, table, padded)
        self.compiled = torch.compile(super().forward)

    def forward(self, batch: Batch) -> Tensor:
        return self.compiled(batch)


class Ours(nn.Module):
    """SiameseLSTM as a user calls it."""

    def __init__(self, lstm: nn.LSTM, table: Tensor, backend: str) -> None:
        super().__init__()
        self.model = SiameseLSTM.from_lstm(lstm, embedding=table, scale=SCALE, backend=backend)

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch.left, batch.right, batch.left_lengths, batch.right_lengths)

    def explain(self) -> str:
        return self.model.explain()


class OursCold(Ours):
    """The same without the table of projected words that a module keeps between calls."""

    def forward(self, batch: Batch) -> Tensor:
        model = self.model
        return functional.siamese_similarity(
            batch.left,
            batch.right,
            functional.Weights(
                model.weight_ih_l0, model.weight_hh_l0, model.bias_ih_l0, model.bias_hh_l0
            ),
            embedding=model.embedding.weight,
            left_lengths=batch.left_lengths,
            right_lengths=batch.right_lengths,
            scale=SCALE,
        )


@dataclass(frozen=True)
class Contender:
    """A way to do the work, and where it cannot or need not run."""

    name: str
    build: Callable[[nn.LSTM, Tensor], nn.Module]
    ours: bool = False
    only_on: str | None = None  # a device type
    only_in: str | None = None  # a setting
    only_for: str | None = None  # a pass
    not_in_graph: str | None = None  # the reason

    def why_not(self, case: Case, device: str, setting: str, work: str) -> str | None:
        """Return why there is nothing to time here, or None."""
        if self.only_on not in (None, device):
            return f"{self.name} runs on {self.only_on} only"
        if self.only_in not in (None, setting):
            return f"{self.name} is of use in a {self.only_in} only"
        if self.only_for not in (None, work):
            return f"{self.name} differs in {self.only_for} only"
        if setting == "graph" and self.not_in_graph:
            return f"{self.name} in a CUDA graph: {self.not_in_graph}"
        if self.name == "fastsiam triton" and case.H > 128:
            return "fastsiam triton covers H up to 128"
        if self.name == "compiled" and device == "cpu":
            return (
                "compiled: on a CPU nn.LSTM is nearly all of the time, and compiling leaves it be"
            )
        if self.name == "compiled" and shutil.which("cc") is None:
            return "compiled: torch.compile needs a C compiler"
        return None


def rival(vectors: Vectors) -> Callable[[nn.LSTM, Tensor], nn.Module]:
    return lambda lstm, table: Rival(lstm, table, vectors)


def ours(backend: str) -> Callable[[nn.LSTM, Tensor], nn.Module]:
    return lambda lstm, table: Ours(lstm, table, backend)


MAIN_RIVAL = "padded"
CONTENDERS = [
    Contender("fastsiam", ours("auto"), ours=True),
    Contender("fastsiam torch", ours("torch"), ours=True),
    Contender("fastsiam triton", ours("triton"), ours=True, only_on="cuda"),
    Contender(
        "fastsiam cold",
        lambda lstm, table: OursCold(lstm, table, "auto"),
        ours=True,
        only_for="scoring",
    ),
    Contender("padded", rival(padded)),
    Contender("trimmed", rival(trimmed)),
    Contender("bucketed", rival(bucketed)),
    Contender("packed", rival(packed), not_in_graph="packing works on the host"),
    Contender("two calls", rival(two_calls)),
    Contender("compiled", Compiled, not_in_graph="torch.compile may recompile in a capture"),
    Contender("step by step", rival(step_by_step), only_on="cuda", only_in="graph"),
]


def build(contender: Contender, case: Case, device: torch.device) -> nn.Module:
    """Make a contender with the case's weights, the same for all of them."""
    return contender.build(*make_weights(case, device))
