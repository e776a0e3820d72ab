"""How Triton runs in this process, and the backends that tests of an operator run on."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
    # read when @triton.jit decorates, so set before the first import of fastsiam.kernels
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # cuBLAS wants it before its first call, or it is not repeatable
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# fills torch.empty with NaN too, so that an entry never written shows
torch.use_deterministic_algorithms(True)
# float32 means float32; the tests of tf32 turn it on
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False
if "PYTEST_XDIST_WORKER" in os.environ:
    # a worker a core
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        skip = pytest.mark.skip(reason="needs a CUDA device, and Triton's compiler on")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture
def triton():
    """Skips the test where triton is not installed, as on a machine without Linux."""
    return pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")


@pytest.fixture(params=["torch", "lstm", "triton"])
def backend(request):
    """Name every backend but the reference, which is what they are checked against."""
    if request.param == "triton":
        request.getfixturevalue("triton")
    return request.param


@pytest.fixture(params=["torch", "triton"])
def fused_backend(request):
    """Name the backends behind the operators."""
    if request.param == "triton":
        request.getfixturevalue("triton")
    return request.param
