"""What pyproject.toml cannot hold: where fastsiam.kernels lies, and the flags of its C++ files."""

import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"]
# its threads are then those of PyTorch, which brings the library of this name
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
BUILDS = {"": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    # fastsiam/engine/cpu.py loads the one that the processor can run
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    BUILDS = {"": ["-mavx2", "-mfma"], "_avx512": ["-mavx2", "-mfma", *AVX512]}
    # of which GCC 12 accuses its own header
    FLAGS += ["-Wno-maybe-uninitialized"]

# it uses nothing of Python, so one build serves every version; but a free-threaded Python refuses
# what says so
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    package_dir={"fastsiam": "fastsiam", "fastsiam.kernels": "kernels"},
    ext_modules=[
        # plain libraries for ctypes; without a compiler fastsiam does without them
        Extension(
            f"fastsiam._compiled_steps{name}",
            sources=[f"kernels/cpu/steps{name}.cpp"],
            depends=[str(file) for file in Path("kernels/cpu").iterdir()],
            extra_compile_args=FLAGS + flags + OPENMP,
            extra_link_args=OPENMP,
            py_limited_api=STABLE,
            optional=True,
        )
        for name, flags in BUILDS.items()
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
