"""Both sides through the LSTM to a similarity: scoring, gradients, a training step."""

import dataclasses
import gc
import itertools
from functools import lru_cache

import pytest
import torch

from benchmarks import accuracy, clock
from benchmarks.baselines import CONTENDERS, MAIN_RIVAL, build
from benchmarks.cases import CPU_CASES, GPU_CASES, QUICK_CASES, Batch, Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = ("eager", "graph") if DEVICE.type == "cuda" else ("1 thread", "2 threads")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = GPU_CASES if DEVICE.type == "cuda" else CPU_CASES
    if metafunc.config.getoption("--quick"):
        cases = QUICK_CASES
    names = metafunc.config.getoption("--cases")
    if names is not None:
        known = {case.name for case in cases}
        if not set(names.split(",")) <= known:
            raise pytest.UsageError(f"--cases takes names of {sorted(known)}, got {names}")
        cases = [case for case in cases if case.name in names.split(",")]
    # the first varies slowest: the contenders of a group come one after the other
    metafunc.parametrize("case", cases, ids=lambda c: f"{c.name}-{c.lengths}-{c.dtype}")
    metafunc.parametrize("setting", SETTINGS)
    metafunc.parametrize("work", clock.PASSES)
    metafunc.parametrize("contender", CONTENDERS, ids=lambda c: c.name)


def prepare(case: Case, setting: str) -> None:
    """Set what holds for the whole process: threads, and TF32 for all contenders alike."""
    if setting.endswith(("thread", "threads")):
        torch.set_num_threads(int(setting.split()[0]))
    torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"


@lru_cache(maxsize=1)
def checked(case: Case) -> tuple[Batch, dict[str, accuracy.Errors], dict[str, str]]:
    """Return the batch, each contender's errors, and what is wrong with those that fail."""
    batch = Batch(case, DEVICE)
    truth = accuracy.gold(case, batch)
    found = {}
    for contender in CONTENDERS:
        ways = itertools.product(SETTINGS, clock.PASSES)
        if any(contender.why_not(case, DEVICE.type, *way) is None for way in ways):
            found[contender.name] = accuracy.errors(build(contender, case, DEVICE), batch, truth)
    limits = found[MAIN_RIVAL]
    faults = {name: accuracy.fault(e, limits, case.torch_dtype) for name, e in found.items()}
    return batch, found, {name: fault for name, fault in faults.items() if fault}


@lru_cache(maxsize=1)
def measured(case: Case, setting: str, work: str, effort: clock.Effort) -> dict[str, clock.Times]:
    """Time all contenders of a group in turn; those that failed the check are left out."""
    batch, _, faults = checked(case)
    works, calls = {}, {}
    for contender in CONTENDERS:
        if contender.name in faults or contender.why_not(case, DEVICE.type, setting, work):
            continue
        model = build(contender, case, DEVICE)
        call = clock.work_of(model, batch, work, capturable=setting == "graph")
        if setting == "graph":
            call, calls[contender.name] = clock.in_graph(call)
        works[contender.name] = call
    gc.collect()
    times = clock.measure(works, DEVICE, effort)
    return {n: t.of_graph(calls[n]) if n in calls else t for n, t in times.items()}


@pytest.mark.benchmark(timer=clock.REPLAY)
def test_siamese(benchmark, rows, request, case, setting, work, contender):
    reason = contender.why_not(case, DEVICE.type, setting, work)
    if reason:
        pytest.skip(reason)
    prepare(case, setting)
    batch, errors, faults = checked(case)
    assert contender.name not in faults, faults[contender.name]
    effort = clock.QUICK if request.config.getoption("--quick") else clock.FULL
    times = measured(case, setting, work, effort)[contender.name]

    row = dataclasses.asdict(case)
    row |= {"case": row.pop("name"), "setting": setting, "pass": work, "contender": contender.name}
    row |= {"longest": batch.longest, "tokens": int(batch.host_lengths.sum())}
    row |= {"ours": contender.ours, "rounds": len(times.samples_s), "calls": times.iterations}
    row |= {"peak_mib": times.peak_mib, **times.quartiles()}
    row |= {f"{k}_error": v for k, v in dataclasses.asdict(errors[contender.name]).items()}
    if contender.ours:
        row["explain"] = build(contender, case, DEVICE).explain(batch, work)
    rows.append(row)

    benchmark.group = f"{case.name}, {case.lengths} lengths, {case.dtype}, {setting}: {work}"
    benchmark.extra_info |= row
    clock.REPLAY.load(times.samples_s)
    benchmark.pedantic(lambda: None, rounds=len(times.samples_s))
