"""The benchmark's own parts: its check can fail, its clock takes turns, its report is in step."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, clock, report, results
from benchmarks.baselines import CONTENDERS, MAIN_RIVAL, build
from benchmarks.cases import CPU_CASES, GPU_CASES, Batch, Case, sick_lengths
from fastsiam.graph import WARMUP

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CASES = [
    Case("odd", H=5, D=7, B=3, T=6, lengths=lengths, V=11) for lengths in ("full", "outlier")
] + [
    Case("one", H=3, D=2, B=4, T=1, lengths="sick", V=2),
    Case("both", H=3, D=5, B=9, T=7, lengths="sick", V=4, bidirectional=True, pooling="max"),
    Case("gru", H=3, D=5, B=5, T=7, lengths="outlier", V=4, cell="gru"),
]
HERE = [c for c in CONTENDERS if c.why_not(CASES[0], "cpu", "1 thread", "scoring") is None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.lengths}")
@pytest.mark.parametrize("contender", HERE, ids=lambda c: c.name)
def test_every_contender_passes_its_check(contender, case):
    batch = Batch(case, CPU)
    truth = accuracy.gold(case, batch)
    assert len(truth.gradients) == (8 if case.bidirectional else 4)
    rivals = {c.name: build(c, case, CPU) for c in (contender, *HERE) if c.name == MAIN_RIVAL}
    limits = accuracy.errors(rivals[MAIN_RIVAL], batch, truth)
    found = accuracy.errors(build(contender, case, CPU), batch, truth)
    assert accuracy.fault(found, limits, case.eps) is None


@pytest.mark.parametrize("what", ["lengths", "weights", "gradient", "nan"])
def test_the_check_can_fail(what):
    case = CASES[1]
    batch = Batch(case, CPU)
    truth = accuracy.gold(case, batch)
    (rival,) = [c for c in CONTENDERS if c.name == MAIN_RIVAL]
    model = build(rival, case, CPU)
    limits = accuracy.errors(model, batch, truth)
    wrong = copy.copy(batch)
    if what == "lengths":
        last = batch.sentences.last.clone()
        last[2] -= 1
        wrong.sentences = batch.sentences._replace(last=last)
    elif what == "weights":
        with torch.no_grad():
            model.networks[0].weight_hh_l0[0, 0] += 1e-3
    elif what == "gradient":
        model.networks[0].weight_hh_l0.register_hook(lambda grad: grad * 1.001)
    else:
        with torch.no_grad():
            model.networks[0].bias_hh_l0[0] = torch.nan
    fault = accuracy.fault(accuracy.errors(model, wrong, truth), limits, case.eps)
    assert fault is not None
    assert ("gradient" in fault) == (what == "gradient")


@pytest.mark.parametrize("contender", HERE, ids=lambda c: c.name)
def test_scoring_may_come_before_training(contender):
    """What a batch works out once serves both, whoever asks first."""
    batch = Batch(CASES[1], CPU)
    model = build(contender, CASES[1], CPU)
    clock.work_of(model, batch, "scoring")()
    clock.work_of(model, batch, "step")()


def test_the_graphed_step_is_the_step_of_the_others():
    case = CASES[1]
    batch = Batch(case, CPU)
    contenders = {c.name: c for c in CONTENDERS}
    graphed, plain = (build(contenders[n], case, CPU) for n in ("fastsiam graphed", "fastsiam"))
    work = clock.work_of(graphed, batch, "step")  # which has run to warm up
    work()
    step = clock.work_of(plain, batch, "step")
    for _ in range(WARMUP + 2):
        step()
    for ours, theirs in zip(graphed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_lengths_are_as_stated():
    lengths = sick_lengths(100_000, 73, torch.Generator().manual_seed(1))
    assert abs(lengths.double().mean().item() - 9.7) < 0.1
    assert lengths.min() == 3
    assert lengths.max() == 36
    for case in CPU_CASES + GPU_CASES[:6]:
        batch = Batch(dataclasses.replace(case, V=3), CPU)
        assert batch.host_lengths.min() >= 1
        assert (batch.longest == case.T) == (case.lengths != "sick" or case.T < 36)


def test_contenders_take_turns():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "abc"}
    effort = clock.Effort(seconds=0, least_rounds=3, most_rounds=9, least_sample_s=0)
    times = clock.measure(works, CPU, effort)
    # first calls, then rounds of an untimed call and a sample each
    assert "".join(order) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert [len(t.samples_s) for t in times.values()] == [3, 3, 3]


def test_a_time_is_of_one_call():
    effort = clock.Effort(seconds=0, least_rounds=2, most_rounds=2, least_sample_s=0.2)
    (times,) = clock.measure({"sleep": lambda: time.sleep(0.005)}, CPU, effort).values()
    assert times.iterations > 1
    assert all(0.005 <= sample < 0.2 for sample in times.samples_s)
    assert times.of_graph(4).samples_s == [s / 4 for s in times.samples_s]
    assert times.of_graph(4).iterations == 4 * times.iterations


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Run the benchmark on its tiny case; return pytest-benchmark's JSON."""
    file = tmp_path_factory.mktemp("quick") / "out.json"
    options = ["--benchmark-only", "--quick", f"--benchmark-json={file}", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text(encoding="utf-8"))


def test_one_command_times_every_contender(quick):
    rows = [entry["extra_info"] for entry in quick["benchmarks"]]
    if not torch.cuda.is_available():
        assert {row["contender"] for row in rows} == {c.name for c in HERE}
        assert {row["setting"] for row in rows} == {"1 thread", "2 threads"}
    assert {row["pass"] for row in rows} == set(clock.PASSES)
    for entry, row in zip(quick["benchmarks"], rows, strict=True):
        assert entry["stats"]["median"] == pytest.approx(row["median_s"])
        assert entry["stats"]["rounds"] == row["rounds"]
    assert quick["machine_info"]["torch"] == torch.__version__


@pytest.fixture
def machine(quick, tmp_path):
    """A results folder with the quick run in it."""
    facts = {k: quick["machine_info"][k] for k in ("cores", "torch", "triton", "commit", "dirty")}
    facts |= {"cpu": "some cpu", "python": "3"}
    rows = [entry["extra_info"] for entry in quick["benchmarks"]]
    results.save(tmp_path / "some-cpu.json", facts, rows)
    return tmp_path


HEADLINE = f"{report.HEADLINE_BEGIN}\nold\n{report.HEADLINE_END}"
TEXT = f"above\n{HEADLINE}\n{report.BEGIN}\nold\n{report.END}\nbelow\n"


def test_report_is_the_same_twice_and_notices_a_change(machine):
    files = report.render(TEXT, machine)
    assert files == report.render(TEXT, machine)
    names = {path.name for path in files if path.parent == machine}
    assert names == {"some-cpu.md", "some-cpu-speedup.svg", "some-cpu-error.svg"}
    pages = {path: text for path, text in files.items() if path != report.README}
    assert sorted(report.out_of_step(pages, machine)) == sorted(names)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    assert report.out_of_step(pages, machine) == []
    (machine / "some-cpu.md").write_text("typed by hand", encoding="utf-8")
    (machine / "gone.svg").write_text("", encoding="utf-8")
    assert report.out_of_step(pages, machine) == ["some-cpu.md", "gone.svg"]


def test_report_shows_a_loss(machine):
    file = machine / "some-cpu.json"
    data = results.load(file)
    for row in data["rows"]:
        row["median_s"] = {True: 0.004, False: 0.002}[row["ours"]]
        if row["contender"] == MAIN_RIVAL:
            row["median_s"] = 0.010
    results.save(file, data["machine"], data["rows"])
    text = report.render(TEXT, machine)[report.README]
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "| 4 ms | 2 ms (trimmed) | **0.50x, slower** | 2.50x |" in text
    cores = data["machine"]["cores"]
    assert f"On some cpu, {cores} cores, it scores 0.5 to 0.5 times as fast and makes" in text


def test_the_floor_is_drawn_for_a_gpu(machine):
    """Of headline shape A on 132 multiprocessors at 1980 MHz: about 0.1 us a step."""
    shape = {"H": 50, "cell": "lstm", "bidirectional": False, "longest": 73, "tokens": 73 * 64}
    gpu = {"multiprocessors": 132, "clock_mhz": 1980}
    assert 73 * 0.10e-6 < report.floor_s(shape, gpu) < 73 * 0.11e-6
    # 16k pairs of B': all tokens' special functions count
    many = shape | {"H": 128, "longest": 32, "tokens": 32 * 32768}
    assert 150e-6 < report.floor_s(many, gpu) < 170e-6
    assert report.floor_s(shape | {"H": 256}, gpu) is None
    assert report.floor_s(shape, {}) is None

    file = machine / "some-cpu.json"
    data = results.load(file)
    for row in data["rows"]:
        named = {"1 thread": "eager", "2 threads": "graph"}
        row["setting"] = named.get(row["setting"], row["setting"])
    facts = data["machine"] | gpu | {"gpu": "Some GPU", "cuda": "13", "cudnn": 9}
    results.save(machine / "some-gpu.json", facts, data["rows"])
    files = report.render(TEXT, machine)
    assert report.FLOOR in files[machine / "some-gpu.md"]
    assert "microseconds a time step" in files[machine / "some-gpu-floor.svg"]
    assert machine / "some-cpu-floor.svg" not in files
    assert "floor" not in files[machine / "some-cpu.md"]


def test_report_without_results(tmp_path):
    files = report.render(TEXT, tmp_path)
    assert report.NOTHING in files[report.README]
    assert len(files) == 1
    with pytest.raises(ValueError, match="once each"):
        report.render("no markers", tmp_path)


def test_results_of_another_commit_are_replaced(tmp_path):
    file = tmp_path / "m.json"
    row = dict.fromkeys(results.KEY, "x") | {"median_s": 1.0}
    other = row | {"pass": "y"}
    results.save(file, {"commit": "1"}, [row])
    results.save(file, {"commit": "1"}, [other, row | {"median_s": 2.0}])
    assert results.load(file)["rows"] == [row | {"median_s": 2.0}, other]
    results.save(file, {"commit": "2"}, [other])
    assert results.load(file) == {"machine": {"commit": "2"}, "rows": [other]}


def test_a_gpu_machine_runs_every_test_that_needs_one():
    """Files with tests of the kernels, which `make gpu` names one by one."""
    done = subprocess.run(
        ["make", "-n", "gpu-test"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ours = re.compile(r"mark\.gpu|def \w+\([^)]*\b(backend|fused_backend|triton)\b", re.DOTALL)
    files = (ROOT / "tests").glob("test_*.py")
    wanted = {f.name for f in files if ours.search(f.read_text(encoding="utf-8"))}
    assert "test_siamese_lstm.py" in wanted
    # these compile without a GPU, in an environment or process of their own
    wanted -= {"test_aot.py", "test_packaging.py"}
    assert wanted <= set(re.findall(r"test_\w+\.py", done.stdout))


def test_public_kernels_are_skipped_where_they_are_not_installed():
    (public, *_) = [c for c in CONTENDERS if c.name == "TorchRL"]
    case = next(case for case in GPU_CASES if case.name == "A" and case.dtype == "tf32")
    missing = dataclasses.replace(public, needs="no_such_package")
    assert "is not installed" in missing.why_not(case, "cuda", "eager", "scoring")
    here = dataclasses.replace(public, needs="torch")
    assert here.why_not(case, "cuda", "eager", "scoring") is None
    assert "tf32 only" in here.why_not(
        dataclasses.replace(case, dtype="bfloat16"), "cuda", "eager", "scoring"
    )
    assert "one direction" in here.why_not(
        dataclasses.replace(case, bidirectional=True), "cuda", "eager", "scoring"
    )
