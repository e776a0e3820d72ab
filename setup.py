"""What pyproject.toml cannot hold: where fastsiam.kernels lies, and the flags of its C++ file."""

import platform
import sys

from setuptools import Extension, setup

FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
# its threads are then those of PyTorch, which brings the library of this name
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
if platform.machine().lower() in ("x86_64", "amd64"):
    # fastsiam/_steps.py does not load it on a processor without AVX2
    FLAGS.append("-march=x86-64-v3")

setup(
    package_dir={"fastsiam": "fastsiam", "fastsiam.kernels": "kernels"},
    ext_modules=[
        # a plain library for ctypes, which asks nothing of Python; without a compiler fastsiam
        # does without it
        Extension(
            "fastsiam._compiled_steps",
            sources=["kernels/steps.cpp"],
            extra_compile_args=FLAGS + OPENMP,
            extra_link_args=OPENMP,
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
