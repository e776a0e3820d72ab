"""What the compiler makes of the kernels for GPUs that are not here: space, spills, step loops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, so there is nothing to compile")

from aot import BOUNDS_OF, GRU, KERNELS, PLAIN, SLACK, barriers_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Compile in a process of its own: this one may interpret the same kernels."""
    file = tmp_path_factory.mktemp("aot") / "aot.json"
    command = [sys.executable, str(ROOT / "tests" / "aot.py"), "--quick", "--json", str(file)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert file.exists(), done.stderr
    return json.loads(file.read_text()), done


def test_nothing_promised_is_missed(rows):
    _, done = rows
    assert done.returncode == 0, done.stderr


def test_every_target_is_compiled(rows):
    targets = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert {row["target"] for row in rows[0]} == targets


@pytest.mark.parametrize(
    ("sequences", "shape"),
    [(sequences, shape) for sequences, bounds in BOUNDS_OF.items() for shape in bounds],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value)),
)
def test_step_loop_is_as_short_as_promised(rows, sequences, shape):
    found = [
        row
        for row in rows[0]
        if (row["kernel"], row["dtype"], row["H"], row["num_warps"]) == shape
        and (row["target"], row["sequences"]) == ("sm_90", sequences)
    ]
    assert len(found) == 1, f"compiled {len(found)} times"
    (row,) = found
    assert row["loop_instructions"] <= SLACK * BOUNDS_OF[sequences][shape]
    assert row["loop_barriers"] <= barriers_of(*shape[:3])
    assert row["loop_spills"] == 0
    # a wide kernel may put away an index that it needs once a tile
    assert row["spill_bytes"] <= (8 if row["kernel"].startswith("wide_") else 0)


@pytest.mark.parametrize("kernel", [*PLAIN[:2], *GRU[:2]])
def test_recurrent_weight_is_not_read_in_the_loop(rows, kernel):
    # two matrix loads bring the state of 8 sequences; the weight would take 16 more
    found = [
        row
        for row in rows[0]
        if (row["kernel"], row["target"], row["dtype"], row["H"])
        == (kernel, "sm_90", "bfloat16", 50)
    ]
    assert {row["num_warps"] for row in found} == {4, 8}
    assert all(row["loop_shared_loads"] == 2 for row in found)


def test_hidden_sizes_of_one_block_have_rows_of_their_own(rows):
    assert {50, 64, 128} <= {row["H"] for row in rows[0]}


def test_what_is_launched_compiles():
    """With all that a launch specialises on, and for the launchers' own arguments."""
    command = [sys.executable, str(ROOT / "tests" / "launches.py"), "--quick"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    launched = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert launched == {function.__name__ for function, _ in KERNELS.values()}
