"""What pyproject.toml cannot hold: where fastsiam.kernels lies, and the flags of its C++ file."""

import platform
import sys
import sysconfig

from setuptools import Extension, setup

FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
# its threads are then those of PyTorch, which brings the library of this name
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
if platform.machine().lower() in ("x86_64", "amd64"):
    # fastsiam/_steps.py does not load it on a processor without these
    FLAGS += ["-mavx2", "-mfma"]

# it uses nothing of Python, so one build serves every version; but a free-threaded Python refuses
# what says so
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    package_dir={"fastsiam": "fastsiam", "fastsiam.kernels": "kernels"},
    ext_modules=[
        # a plain library for ctypes; without a compiler fastsiam does without it
        Extension(
            "fastsiam._compiled_steps",
            sources=["kernels/steps.cpp"],
            extra_compile_args=FLAGS + OPENMP,
            extra_link_args=OPENMP,
            py_limited_api=STABLE,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
