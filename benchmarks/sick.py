"""Train and time on the SICK files: `python -m benchmarks.sick --data DIR`.

Prints the test correlations of the default recipe by seed, and the seconds that one epoch takes
with fastsiam and with the same recipe on torch.nn.LSTM.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastsiam.model import TextSiamese
from fastsiam.modules import SiameseLSTM
from fastsiam.text.batches import grouped_batches
from fastsiam.text.datasets import DataError
from fastsiam.training.config import Config
from fastsiam.training.data import EncodedPairs, Inputs, load_inputs
from fastsiam.training.epoch import run_epoch
from fastsiam.training.evaluate import Metrics
from fastsiam.training.loop import train
from fastsiam.training.objective import MeanSquaredError
from fastsiam.training.start import initialize, make_optimizer

TIMED_EPOCHS = 9


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


def score_seeds(config: Config, seeds: int) -> None:
    """Train once a seed and print what the test part says."""
    print(
        f"{'seed':>4}  {'epoch':>5}  {'trial r':>7}  {'test r':>7}  {'rho':>7}  {'MSE':>7}  seconds"
    )
    found: list[Metrics] = []
    for seed in range(seeds):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = train(replace(config, seed=seed, out=Path(folder)))
        time_s = time.perf_counter() - start
        if result.interrupted or result.best is None or result.test is None:
            raise SystemExit(130)
        test = result.test.metrics
        found.append(test)
        print(
            f"{seed:>4}  {result.best.epoch:>5}  {result.best.dev_pearson:7.4f}  "
            f"{test.pearson:7.4f}  {test.spearman:7.4f}  {test.mse:7.4f}  {time_s:7.1f}",
            flush=True,
        )
    pearson, spearman, mse = (
        statistics.fmean(getattr(metrics, name) for metrics in found)
        for name in ("pearson", "spearman", "mse")
    )
    print(f"mean                  {pearson:7.4f}  {spearman:7.4f}  {mse:7.4f}\n")


def time_epochs(config: Config, inputs: Inputs) -> None:
    """Time epochs of the contenders in turn, from one start and on the same batches."""
    pairs = inputs.phases["train"]
    ours = TextSiamese(inputs.vocabulary, inputs.table, config.hidden_size, scale=config.scale).lstm
    initialize(ours, config.forget_bias, torch.Generator().manual_seed(config.seed))
    contenders: dict[str, nn.Module] = {
        "fastsiam": ours,
        "nn.LSTM, packed": Rival(ours, packed),
        "nn.LSTM, padded to the batch's longest": Rival(ours, trimmed),
    }
    device = ours.weight_hh_l0.device
    contenders = {name: module.to(device) for name, module in contenders.items()}
    check_agreement(contenders, pairs, config)

    steps = (1 + TIMED_EPOCHS) * -(-len(pairs) // config.batch_size)
    tools = {name: make_optimizer(module, config, steps) for name, module in contenders.items()}
    objectives = {name: MeanSquaredError(module) for name, module in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for epoch in range(1 + TIMED_EPOCHS):
        batches = epoch_batches(pairs, config, epoch)
        names = list(contenders)
        # each takes its turn to be first
        for name in names[epoch % 3 :] + names[: epoch % 3]:
            start = time.perf_counter()
            run_epoch(objectives[name], pairs, batches, *tools[name], clip=config.clip)
            if epoch > 0:  # the first warms up
                times[name].append(time.perf_counter() - start)
    print(
        f"seconds an epoch of {len(pairs)} pairs, median of {TIMED_EPOCHS} (fastest, slowest), and "
        f"the median of its ratios to fastsiam's in the same round; torch {torch.__version__}, "
        f"{device}, threads: {torch.get_num_threads()}"
    )
    for name, seconds in times.items():
        ratios = [
            time_s / ours_s for time_s, ours_s in zip(seconds, times["fastsiam"], strict=True)
        ]
        print(
            f"  {name:<38}  {statistics.median(seconds):.3f} ({min(seconds):.3f}, "
            f"{max(seconds):.3f})  {statistics.median(ratios):.2f}x"
        )
    print(f"fastsiam ran as {ours.explain()}")


def check_agreement(contenders: dict[str, nn.Module], pairs: EncodedPairs, config: Config) -> None:
    """Stop unless every contender has fastsiam's loss on the first batch."""
    device = next(contenders["fastsiam"].parameters()).device
    inputs, target, _ = pairs.batch(epoch_batches(pairs, config, 0)[0], device)
    with torch.no_grad():
        losses = {name: F.mse_loss(m(*inputs), target) for name, m in contenders.items()}
    for name, loss in losses.items():
        # two float32 programs of one formula; 1e-5 is a hundred roundings
        if not torch.allclose(loss, losses["fastsiam"], rtol=1e-5, atol=0):
            raise SystemExit(
                f"{name}: loss {float(loss)}, but fastsiam {float(losses['fastsiam'])}"
            )


def epoch_batches(pairs: EncodedPairs, config: Config, epoch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(epoch)
    return grouped_batches(pairs.left.lengths, pairs.right.lengths, config.batch_size, generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="holds sick/ and vectors/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Config.epochs)
    options = parser.parse_args()
    sick = options.data / "sick"
    config = Config(
        train=sick / "SICK_train.txt",
        dev=sick / "SICK_trial.txt",
        test=sick / "SICK_test_annotated.txt",
        vectors=(options.data / "vectors" / "glove840b-plus-300.bin.gz",),
        out=Path("unused"),  # each seed has a folder of its own
        epochs=options.epochs,
    )
    try:
        inputs = load_inputs(config)
    except DataError as error:
        raise SystemExit(f"sick: {error}") from error
    print(
        f"SICK: {len(inputs.phases['train'])} training pairs ({inputs.dropped['train']} repeats of "
        f"a trial or test pair dropped), {len(inputs.dev)} trial, "
        f"{0 if inputs.test is None else len(inputs.test)} test; "
        f"{inputs.coverage.token_share:.1%} of the tokens have a vector\n"
    )
    score_seeds(config, options.seeds)
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        torch.set_num_threads(threads)
        time_epochs(config, inputs)


if __name__ == "__main__":
    main()
