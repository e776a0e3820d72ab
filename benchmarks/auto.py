"""Measure where nn.LSTM beats fastsiam's own backends: `python -m benchmarks.auto`.

Writes this device's part of fastsiam/measured.json, by which backend="auto" picks. A CPU stands for
every CPU, a GPU for those of its name. The machine has to be idle, above all for two threads: those
of nn.LSTM wait for each other at every step.
"""

import argparse
import itertools
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import clock, machine
from benchmarks.baselines import Ours
from benchmarks.cases import Batch, Case, make_weights
from fastsiam import _steps
from fastsiam._measured import Row
from fastsiam._network import machine_name

FILE = Path(__file__).parents[1] / "fastsiam" / "measured.json"
EFFORT = clock.Effort(seconds=0.5, least_rounds=5, most_rounds=25, least_sample_s=1e-3)
LONGEST_S = 2.0  # a larger batch is not measured where one call would take longer than this
WORKS = {"scoring": False, "gradients": True}


@dataclass(frozen=True)
class Plan:
    """What is measured on a kind of device."""

    other: str  # the backend beside "lstm"
    hidden: tuple[int, ...]
    pairs: tuple[int, ...]
    dtypes: tuple[str, ...]
    threads: tuple[int, ...]
    cells: tuple[str, ...] = ("lstm", "gru")


CPU = Plan("torch", (50, 128, 256, 512, 1024), (1, 8, 32, 256), ("float32",), (1, 2))
HIDDEN = (50, 64, 100, 128, 256, 512, 1024)
GPU = Plan("triton", HIDDEN, (1, 32, 256, 1024, 4096), ("float32", "bfloat16"), (1,))
QUICK = Plan("torch", (5, 300), (1, 2), ("float32",), (1,))


def compare(case: Case, work: str, plan: Plan, device: torch.device) -> tuple[Row, float]:
    """Time both backends in turn; return the row, and the seconds of the slower one."""
    batch = Batch(case, device)
    models = {name: Ours(case, *make_weights(case, device), name) for name in ("lstm", plan.other)}
    times = clock.measure(
        {name: clock.work_of(model, batch, work) for name, model in models.items()}, device, EFFORT
    )
    lstm_s, other_s = (times[name].samples_s for name in models)
    steps = batch.longest if device.type == "cpu" else case.T
    row = Row(
        cell=case.cell,
        dtype=case.dtype,
        training=WORKS[work],
        threads=torch.get_num_threads() if device.type == "cpu" else 1,
        H=case.H,
        sequences=2 * case.B,
        steps=steps,
        filled=round(batch.host_lengths.double().mean().item() / steps, 3),
        other=plan.other,
        # round by round: what slows one down slows the other down
        ratio=round(statistics.median(a / b for a, b in zip(lstm_s, other_s, strict=True)), 3),
    )
    return row, max(statistics.median(lstm_s), statistics.median(other_s))


def measure(plan: Plan, device: torch.device) -> list[Row]:
    """Measure the plan; print each row as it comes."""
    rows = []
    for cell, threads, dtype, H, lengths, work in itertools.product(
        plan.cells, plan.threads, plan.dtypes, plan.hidden, ("full", "sick"), WORKS
    ):
        if device.type == "cpu":
            torch.set_num_threads(threads)
        call_s, before = 0.0, 1
        for pairs in plan.pairs:
            if call_s * pairs / before > LONGEST_S:
                break
            case = Case("", H=H, D=300, B=pairs, T=73, lengths=lengths, dtype=dtype, cell=cell)
            row, call_s = compare(case, work, plan, device)
            before = pairs
            rows.append(row)
            print(f"{row.threads} threads, {dtype}, {lengths} lengths: {row}", flush=True)
    return rows


def save(file: Path, device: str, rows: list[Row]) -> None:
    """Replace one device's part of the file; a row a line."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    facts = {name: fact for name, fact in machine.facts().items() if name != "dirty"}
    known[device] = {"machine": facts, "rows": [row._asdict() for row in rows]}
    parts = []
    for name, found in known.items():
        lines = ",\n".join(f"   {json.dumps(row)}" for row in found["rows"])
        parts.append(
            f' {json.dumps(name)}: {{\n  "machine": {json.dumps(found["machine"])},\n'
            f'  "rows": [\n{lines}\n  ]\n }}'
        )
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rows of tiny networks")
    parser.add_argument("--threads", type=int, nargs="+", help="on a CPU; default: 1 2")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument(
        "--uncompiled", action="store_true", help="a CPU's steps as tensor operations"
    )
    options = parser.parse_args()
    if options.uncompiled:
        _steps._WHY_NOT = "left out"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = QUICK if options.quick else GPU if device.type == "cuda" else CPU
    if options.threads and device.type == "cpu":
        plan = replace(plan, threads=tuple(options.threads))
    save(options.out, machine_name(device, torch.float32, H=1), measure(plan, device))


if __name__ == "__main__":
    main()
