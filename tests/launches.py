"""Launch what the operators launch, with a driver that compiles for a GPU and runs nothing.

    python tests/launches.py [--quick] [--target 90]

A launch makes constants of its arguments' types, of integers that are 1 and of multiples of 16,
which neither the interpreter nor `aot.py` knows. Results mean nothing: memory stays as it was.
Prints how many variants of each kernel were compiled; what does not compile raises.
"""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # the launchers' own path, whatever the tests do
    os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastsiam import functional
from fastsiam.engine import triton as engine
from fastsiam.kernels import tiling

cases.DEVICE = "cpu"
# few at first: ones wherever a launch may turn them into constants, both cells and directions
QUICK = [
    cases.Case(B=1, T_left=1, T_right=1, D=1, H=1, inputs="ids, trained"),
    cases.Case(D=16, H=50, dtype=torch.bfloat16, inputs="ids", directions=2, pooling="max"),
    cases.Case(D=1, H=65, dtype=torch.float16, cell="gru", pooling="mask", learned_scale=True),
    cases.Case(D=1, H=256, dtype=torch.float16, inputs="ids", pooling="max", directions=2),
    cases.Case(B=1, T_left=1, T_right=2, D=1, H=129, dtype=torch.float16, inputs="ids, trained"),
    cases.Case(D=1, H=256, dtype=torch.bfloat16, pooling="mask", cell="gru"),
    cases.Case(B=1, T_left=1, T_right=2, H=129, dtype=torch.float16, directions=2, cell="gru"),
]


class CompilingDriver:
    """As much of a driver as a launch asks before it would run."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="what a test run has time for")
    parser.add_argument("--target", type=int, default=90, help="compute capability, as in sm_90")
    arguments = parser.parse_args()
    driver.set_active(CompilingDriver(arguments.target))
    compiled: defaultdict[str, set[int]] = defaultdict(set)
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, warmup=True, **options)
        compiled[self.__name__].add(id(kernel))
        return kernel

    JITFunction.run = compile_only
    # tensors of the host stand for a GPU's
    engine.interpreted = lambda: True
    tiling.target_of = lambda _: f"sm_{arguments.target}"
    tiling.multiprocessors = lambda *_: 132
    for case in QUICK if arguments.quick else QUICK + cases.CASES:
        cases.compute(case, cases.make_inputs(case), "triton", case.dtype)
    vectors = torch.randn(3, 1)
    functional.manhattan_topk(vectors, vectors, 2, backend="triton")
    for name, variants in sorted(compiled.items()):
        print(f"{name}: {len(variants)}")


if __name__ == "__main__":
    main()
