"""Timing: contenders in turn, round after round, so that a slow minute hits all of them alike.

Before each sample the contender runs once untimed, so that it finds code, data and memory as it
left them, like a training or scoring loop, and not as the contender before it did.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.cases import Batch

PASSES = ("scoring", "gradients", "step")
CLIP = 5.0
# calls in a graph, so that launching it does not count; fewer of long ones
CALLS_A_GRAPH = 20
LONG_GRAPH_S = 4e-3
SLOW_S = 0.5  # what takes longer needs no second call to warm up
MIB = 2**20

Work = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure a group of contenders."""

    seconds: float
    least_rounds: int
    most_rounds: int
    least_sample_s: float  # a sample repeats its work until it lasts this long


FULL = Effort(seconds=2.0, least_rounds=3, most_rounds=40, least_sample_s=1e-2)
QUICK = Effort(seconds=0.0, least_rounds=2, most_rounds=2, least_sample_s=0.0)


@dataclass(frozen=True)
class Times:
    """Seconds a call, one entry a round, and the peak of CUDA memory above what was there."""

    samples_s: list[float]
    iterations: int
    peak_mib: float | None

    def quartiles(self) -> dict[str, float]:
        q1, median, q3 = statistics.quantiles(self.samples_s, n=4, method="inclusive")
        return {"q1_s": q1, "median_s": median, "q3_s": q3}

    def of_graph(self, calls: int) -> "Times":
        """Turn times of a graph into times of a call; a replay allocates nothing to speak of."""
        samples_s = [sample / calls for sample in self.samples_s]
        return Times(samples_s, self.iterations * calls, peak_mib=None)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def work_of(model: nn.Module, batch: Batch, what: str, capturable: bool = False) -> Work:
    """Return the work to time: scoring, loss and gradients, or a whole training step.

    `capturable` says whether a CUDA graph will hold it. A model with a `whole_step` makes its own
    training step.
    """
    if what == "scoring":
        return torch.inference_mode()(lambda: model(batch))
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = what == "step" and hasattr(model, "whole_step")
    capturable = capturable or (whole and batch.device.type == "cuda")
    optimizer = torch.optim.Adam(parameters, lr=1e-3, capturable=capturable)
    if whole:
        return model.whole_step(batch, optimizer, CLIP)

    def gradients() -> None:
        optimizer.zero_grad(set_to_none=True)
        (model(batch) - batch.target).square().mean().backward()

    def step() -> None:
        gradients()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    return gradients if what == "gradients" else step


def in_graph(work: Work) -> tuple[Work, int]:
    """Capture the work several times in one CUDA graph; return its replay, and how many times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        # an optimizer for graphs warns where it steps without one
        warnings.filterwarnings("ignore", ".*capturable=True", UserWarning)
        for _ in range(3):
            start = now(torch.device("cuda"))
            work()
            call_s = now(torch.device("cuda")) - start
    torch.cuda.current_stream().wait_stream(stream)
    calls = max(1, min(CALLS_A_GRAPH, round(LONG_GRAPH_S / call_s)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            work()
    return graph.replay, calls


def measure(works: dict[str, Work], device: torch.device, effort: Effort) -> dict[str, Times]:
    """Time the works in turn; each round starts one further on."""
    first_s, peaks = {}, {}
    for name, work in works.items():
        for _ in range(2):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            start = now(device)
            work()
            first_s[name] = now(device) - start
            if device.type == "cuda":
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / MIB
            if first_s[name] > SLOW_S:
                break
    calls = {n: max(1, round(effort.least_sample_s / s)) for n, s in first_s.items()}
    samples: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    end = time.perf_counter() + effort.seconds
    for number in range(effort.most_rounds):
        if number >= effort.least_rounds and time.perf_counter() > end:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            work = works[name]
            if first_s[name] < SLOW_S:
                work()  # not timed: it takes the memory that the one before gave back
            start = now(device)
            for _ in range(calls[name]):
                work()
            samples[name].append((now(device) - start) / calls[name])
    return {n: Times(samples[n], calls[n], peaks.get(n)) for n in names}


class Replay:
    """A clock for pytest-benchmark that shows it the samples taken in turn by `measure`.

    pytest-benchmark runs one contender to its end before the next begins. Its rounds here run
    nothing, and its clock moves on by one sample from a round's begin to its end.
    """

    def __init__(self) -> None:
        self.ticks = [0.0]

    def load(self, samples_s: list[float]) -> None:
        self.ticks = [tick for sample in samples_s for tick in (0.0, sample)]

    def __call__(self) -> float:
        return self.ticks.pop(0)


REPLAY = Replay()
