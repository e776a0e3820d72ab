"""Both sides through the LSTM to a similarity: scoring, gradients, a training step."""

import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

from benchmarks import accuracy, clock
from benchmarks.baselines import CONTENDERS, MAIN_RIVAL, Contender, build
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


@contextlib.contextmanager
def one_may_fail(contender: Contender, faults: dict[str, str]) -> Iterator[None]:
    """Note why a contender does not run: its own test fails then, and the others are timed."""
    try:
        yield
    except Exception as error:
        faults[contender.name] = f"raised {type(error).__name__}: {error}"


@lru_cache(maxsize=1)
def checked(case: Case) -> tuple[Batch, dict[str, accuracy.Errors], dict[str, str]]:
    """Return the batch, each contender's errors, and what is wrong with those that fail."""
    batch = Batch(case, DEVICE)
    truth = accuracy.gold(case, batch)
    found, faults = {}, {}
    for contender in CONTENDERS:
        ways = itertools.product(SETTINGS, clock.PASSES)
        if any(contender.why_not(case, DEVICE.type, *way) is None for way in ways):
            with one_may_fail(contender, faults):
                model = build(contender, case, DEVICE)
                found[contender.name] = accuracy.errors(model, batch, truth)
    limits = found[MAIN_RIVAL]
    for name, errors in found.items():
        if fault := accuracy.fault(errors, limits, case.eps):
            faults[name] = fault
    return batch, found, faults


@lru_cache(maxsize=1)
def measured(
    case: Case, setting: str, work: str, effort: clock.Effort
) -> tuple[dict[str, clock.Times], dict[str, str]]:
    """Time all contenders of a group in turn, and say why for those that cannot be."""
    batch, _, wrong = checked(case)
    faults = dict(wrong)
    works, calls = {}, {}
    for contender in CONTENDERS:
        if contender.name in faults or contender.why_not(case, DEVICE.type, setting, work):
            continue
        with one_may_fail(contender, faults):
            model = build(contender, case, DEVICE)
            call = clock.work_of(model, batch, work, capturable=setting == "graph")
            if setting == "graph":
                call, calls[contender.name] = clock.in_graph(call)
            works[contender.name] = call
    gc.collect()
    times = clock.measure(works, DEVICE, effort)
    return {n: t.of_graph(calls[n]) if n in calls else t for n, t in times.items()}, faults


@pytest.mark.benchmark(timer=clock.REPLAY)
def test_siamese(benchmark, rows, request, case, setting, work, contender):
    reason = contender.why_not(case, DEVICE.type, setting, work)
    if reason:
        pytest.skip(reason)
    prepare(case, setting)
    effort = clock.QUICK if request.config.getoption("--quick") else clock.FULL
    batch, errors, _ = checked(case)
    every, faults = measured(case, setting, work, effort)
    if contender.needs and contender.name in faults:
        pytest.skip(f"{contender.name}: {faults[contender.name]}")
    assert contender.name not in faults, faults[contender.name]
    times = every[contender.name]

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
