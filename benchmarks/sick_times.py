"""Seconds of an epoch: `python -m benchmarks.sick_times --data DIR`.

Times epochs of the article's recipe on SICK and on the STS pairs, with fastsiam and with the same
recipe on torch.nn.LSTM, packed, padded to the batch's longest, and padded to 73 words in two calls
as the article does, and stores them below benchmarks/results/sick/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks import machine
from benchmarks.sick import SICK_RESULTS, recipe
from fastsiam.model import TextSiamese
from fastsiam.modules import SiameseLSTM
from fastsiam.text.pairs import DataError
from fastsiam.training.batches import grouped_batches
from fastsiam.training.config import PRESETS, Config
from fastsiam.training.data import EncodedPairs, Inputs, load_inputs
from fastsiam.training.metrics import RunningMetrics
from fastsiam.training.objective import MeanSquaredError
from fastsiam.training.start import initialize, make_optimizer
from fastsiam.training.step import Guard, train_step

MAX_LEN = 73
OURS = "fastsiam"


class Rival(nn.Module):
    """The same model on torch.nn.LSTM, both towers in one call of 2B sentences.

    Ids and embeddings are laid out [T, 2B], the order in which nn.LSTM works.

    Args:
        ours: gives the start weights and the frozen word vectors.
        last_state: ids [T, 2B], lengths [2B], word vectors and LSTM to the last states [2B, H].
    """

    def __init__(
        self,
        ours: SiameseLSTM,
        last_state: Callable[[Tensor, Tensor, Tensor, nn.LSTM], Tensor],
    ) -> None:
        super().__init__()
        self.lstm = ours.to_lstm()
        self.lstm.batch_first = False
        self.lstm.bias_hh_l0.requires_grad_(False)
        assert ours.embedding is not None
        self.register_buffer("table", ours.embedding.weight.detach())
        self.scale = float(ours.scale)
        self.last_state = last_state

    def forward(
        self, left: Tensor, right: Tensor, left_lengths: Tensor, right_lengths: Tensor
    ) -> Tensor:
        """Score the pairs, [B], from ids [B, T] and lengths [B] of both sides."""
        T = max(left.shape[1], right.shape[1])
        ids = torch.cat([F.pad(side, (0, T - side.shape[1])) for side in (left, right)]).T
        lengths = torch.cat([left_lengths, right_lengths])
        vectors = self.last_state(ids, lengths, self.get_buffer("table"), self.lstm)
        u, v = vectors.chunk(2)
        return torch.exp(-self.scale * (u - v).abs().sum(dim=1))


def packed(ids: Tensor, lengths: Tensor, table: Tensor, lstm: nn.LSTM) -> Tensor:
    """Pack the ids, so that only real words are embedded, and let nn.LSTM skip the padding."""
    rows = pack_padded_sequence(ids, lengths.cpu(), enforce_sorted=False)
    _, (h, _) = lstm(PackedSequence(F.embedding(rows.data, table), *rows[1:]))
    last: Tensor = h[-1]
    return last


def trimmed(ids: Tensor, lengths: Tensor, table: Tensor, lstm: nn.LSTM) -> Tensor:
    """Pad to the longest sentence of the batch and pick the last states afterwards."""
    states, _ = lstm(F.embedding(ids, table))
    last: Tensor = states[lengths - 1, torch.arange(len(lengths), device=ids.device)]
    return last


def article(ids: Tensor, lengths: Tensor, table: Tensor, lstm: nn.LSTM) -> Tensor:
    """Run all MAX_LEN steps of every sentence, one call a side; masks pick the last words."""
    last = []
    for side, ends in zip(ids.chunk(2, dim=1), lengths.chunk(2), strict=True):
        states, _ = lstm(F.embedding(F.pad(side, (0, 0, 0, MAX_LEN - len(side))), table))
        mask = F.one_hot(ends - 1, MAX_LEN).T.to(table.dtype)
        last.append((states * mask[:, :, None]).sum(dim=0))
    return torch.cat(last)


def time_epochs(config: Config, inputs: Inputs, phase: str, rounds: int) -> dict[str, Any]:
    """Time epochs of the contenders in turn, from one start and on the same batches."""
    pairs = inputs.phases[phase]
    ours = TextSiamese(inputs.vocabulary, inputs.table, config.hidden_size, scale=config.scale).lstm
    # the start that all share; "orig", so that no similarity is so small that rounding shows
    initialize(ours, None, torch.Generator().manual_seed(config.seed))
    contenders: dict[str, nn.Module] = {
        OURS: ours,
        "nn.LSTM, packed": Rival(ours, packed),
        "nn.LSTM, padded to the batch's longest": Rival(ours, trimmed),
        "nn.LSTM, padded to 73, two calls": Rival(ours, article),
    }
    device = ours.weight_hh_l0.device
    contenders = {name: module.to(device) for name, module in contenders.items()}
    check_agreement(contenders, pairs, config)

    steps = (1 + rounds) * -(-len(pairs) // config.batch_size)
    tools = {name: make_optimizer(module, config, steps) for name, module in contenders.items()}
    objectives = {name: MeanSquaredError(module) for name, module in contenders.items()}
    # a few batches warm everything up
    for name in contenders:
        warm = epoch_batches(pairs, config, 0)[:10]
        run_steps(objectives[name], pairs, warm, *tools[name], config.clip)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for epoch in range(1, 1 + rounds):
        batches = epoch_batches(pairs, config, epoch)
        names = list(contenders)
        first = epoch % len(names)  # each takes its turn to be first
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            run_steps(objectives[name], pairs, batches, *tools[name], config.clip)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    found = {
        name: {
            "median_s": statistics.median(seconds),
            "fastest_s": min(seconds),
            "slowest_s": max(seconds),
            "ratio": statistics.median(s / o for s, o in zip(seconds, times[OURS], strict=True)),
        }
        for name, seconds in times.items()
    }
    return {
        "phase": phase,
        "pairs": len(pairs),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "explain": ours.explain(),
        "contenders": found,
    }


def run_steps(
    objective: nn.Module,
    pairs: EncodedPairs,
    batches: list[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    clip: float,
) -> None:
    device = next(objective.parameters()).device
    guard, metrics = Guard(device), RunningMetrics(device)
    for rows in batches:
        batch = pairs.batch(rows, device)
        metrics.update(*train_step(objective, batch, optimizer, schedule, guard, clip=clip))


def check_agreement(contenders: dict[str, nn.Module], pairs: EncodedPairs, config: Config) -> None:
    """Stop unless every contender has fastsiam's loss on the first batch."""
    device = next(contenders[OURS].parameters()).device
    inputs, target, _ = pairs.batch(epoch_batches(pairs, config, 0)[0], device)
    with torch.no_grad():
        losses = {name: F.mse_loss(m(*inputs), target) for name, m in contenders.items()}
    for name, loss in losses.items():
        # two float32 programs of one formula; 1e-5 is a hundred roundings
        if not torch.allclose(loss, losses[OURS], rtol=1e-5, atol=0):
            raise SystemExit(
                f"{name}: loss {float(loss)}, but fastsiam {float(losses['fastsiam'])}"
            )


def epoch_batches(pairs: EncodedPairs, config: Config, epoch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(epoch)
    return grouped_batches(pairs.left.lengths, pairs.right.lengths, config.batch_size, generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="holds sick/, vectors/, sts/, seed/"
    )
    parser.add_argument("--rounds", type=int, default=5, help="epochs of SICK; of STS a third")
    options = parser.parse_args()
    config = recipe("article", options.data, Path("unused"))
    try:
        inputs = load_inputs(config)
    except DataError as error:
        raise SystemExit(f"sick_times: {error}") from error
    rows = []
    for phase, rounds in (("train", options.rounds), ("pretrain", -(-options.rounds // 3))):
        rows.append(time_epochs(config, inputs, phase, rounds))
        print(
            f"{phase}: seconds an epoch of {rows[-1]['pairs']} pairs, median of {rounds} (fastest, "
            f"slowest), and the median of its ratios to fastsiam's in the same round"
        )
        for name, of in rows[-1]["contenders"].items():
            print(
                f"  {name:<40}  {of['median_s']:.3f} ({of['fastest_s']:.3f}, "
                f"{of['slowest_s']:.3f})  {of['ratio']:.2f}x"
            )
    passes = PRESETS["article"]
    print(
        f"the whole recipe, {passes['pretrain_epochs']} + {passes['epochs']} epochs, extrapolated:"
    )
    for name in rows[0]["contenders"]:
        print(f"  {name:<40}  {whole_recipe(rows, name):.0f} s")
    SICK_RESULTS.mkdir(parents=True, exist_ok=True)
    found = {"rows": rows, "load": os.getloadavg()[0], "machine": machine.facts()}
    file = SICK_RESULTS / "times.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"stored: {file}")


def whole_recipe(rows: list[dict[str, Any]], contender: str) -> float:
    """Return the seconds of all the article's epochs, from those of one epoch of each phase."""
    epochs = {
        "train": PRESETS["article"]["epochs"],
        "pretrain": PRESETS["article"]["pretrain_epochs"],
    }
    return sum(row["contenders"][contender]["median_s"] * epochs[row["phase"]] for row in rows)


if __name__ == "__main__":
    main()
