"""What "auto" picks: its rule, and the measurement nearest to a call where there is one."""

import pytest
import torch

from fastsiam import SiameseLSTM, _measured, _network
from fastsiam._backend import resolve_backend
from fastsiam._measured import Call, Row, nearest

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU = "Some GPU"
FEW = Row("lstm", "float32", False, 1, 64, 2, 64, 1.0, "torch", 0.5)
FEW_SHORT = FEW._replace(filled=0.25, ratio=0.8)
MANY = FEW._replace(sequences=512, ratio=4.0)
TWO_THREADS = FEW._replace(threads=2, ratio=1.5)
TRAINING = FEW._replace(training=True, ratio=0.4)
ON_GPU = FEW._replace(other="triton", sequences=64, ratio=2.0)
ON_GPU_LARGE = ON_GPU._replace(sequences=2048, ratio=0.9)
ON_GPU_LARGE_SHORT = ON_GPU_LARGE._replace(filled=0.25, ratio=3.0)
ON_GPU_WIDE = ON_GPU._replace(H=256, sequences=512, ratio=1.2)
ON_GPU_WIDEST = ON_GPU_WIDE._replace(H=1024, ratio=0.7)
CALL = Call(*FEW[:8])


@pytest.fixture(autouse=True)
def measurements(monkeypatch):
    on_cpu = [FEW, FEW_SHORT, MANY, TWO_THREADS, TRAINING]
    rows = {
        "cpu": on_cpu,
        "cpu without compiled steps": on_cpu,
        GPU: [ON_GPU, ON_GPU_LARGE, ON_GPU_LARGE_SHORT, ON_GPU_WIDE, ON_GPU_WIDEST],
    }
    monkeypatch.setattr(_measured, "table", lambda: rows)
    _measured._nearest.cache_clear()
    yield
    _measured._nearest.cache_clear()


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({}, FEW),
        ({"H": 50, "sequences": 3, "steps": 50}, FEW),
        ({"filled": 0.2}, FEW_SHORT),
        ({"sequences": 300}, MANY),
        ({"sequences": 1000000, "steps": 1, "H": 1}, MANY),
        ({"threads": 2}, TWO_THREADS),
        ({"threads": 64}, TWO_THREADS),
        ({"training": True, "sequences": 512}, TRAINING),
        ({"filled": 0.0}, FEW_SHORT),
        # nn.LSTM has to win whatever the lengths are
        ({"filled": None}, FEW_SHORT),
        ({"cell": "gru"}, None),
        ({"dtype": "float64"}, None),
    ],
    ids=str,
)
def test_the_nearest_measurement(changes, row):
    assert nearest("cpu", CALL._replace(**changes)) == row
    assert nearest("another GPU", CALL._replace(**changes)) is None


def resolve(device, call=None, **options):
    return resolve_backend("f", "auto", device, torch.float32, 64, call, **options)


def test_auto_on_the_cpu():
    assert resolve(CPU).backend == "torch"
    backend, reason = resolve(CPU, CALL, machine="cpu")
    assert backend == "lstm"
    assert reason.startswith("nn.LSTM took 0.50 times as long as torch in the nearest measurement")
    assert reason.endswith("(scoring, H = 64, 2 sequences of up to 64 steps, 100% filled)")
    backend, reason = resolve(CPU, CALL._replace(sequences=512), machine="cpu")
    assert backend == "torch"
    assert "nn.LSTM took 4.0 times as long as torch" in reason


def test_auto_on_a_gpu(triton):
    assert resolve(CUDA, CALL).backend == "triton"
    assert resolve(CUDA, CALL, machine="another GPU").backend == "triton"
    few, many = (CALL._replace(sequences=n, filled=None) for n in (64, 2048))
    assert resolve(CUDA, few, machine=GPU).backend == "triton"
    # of full batches nn.LSTM won, of others it lost
    backend, reason = resolve(CUDA, many, machine=GPU)
    assert backend == "triton"
    assert "nn.LSTM took 3.0 times as long as triton" in reason
    assert resolve(CUDA, many._replace(filled=1.0), machine=GPU).backend == "lstm"


def test_auto_on_a_gpu_where_the_kernels_do_not_run():
    for dtype, H in ((torch.float64, 64), (torch.float32, 129)):
        choice = resolve_backend("f", "auto", CUDA, dtype, H)
        assert choice.backend == "lstm"
        assert resolve_backend("f", "auto", CUDA, dtype, H, otherwise="torch").backend == "torch"


def test_auto_on_a_gpu_above_the_narrow_hidden_sizes(triton):
    """cuDNN, unless triton was measured to be faster: at such an H, not at a narrow one."""

    def resolve_wide(H, machine, cell="lstm"):
        call = CALL._replace(H=H, cell=cell)
        return resolve_backend("f", "auto", CUDA, torch.float32, H, call, machine)

    backend, reason = resolve_wide(256, machine="another GPU")
    assert backend == "lstm"
    assert reason.startswith("H is above 128")
    for H in (129, 200, 256, 400):
        backend, reason = resolve_wide(H, machine=GPU)
        assert backend == "triton"
        assert "nn.LSTM took 1.2 times as long as triton" in reason
    assert resolve_wide(1024, machine=GPU).backend == "lstm"
    assert resolve_wide(128, machine=GPU).reason.endswith(
        "H = 64, 64 sequences of up to 64 steps, 100% filled)"
    )
    # the GRU was not measured
    assert resolve_wide(200, machine=GPU, cell="gru").reason.startswith("H is above 128")
    assert resolve_wide(2049, machine=GPU).reason.startswith("H must be at most 2048")


@pytest.mark.parametrize("backend", ["torch", "reference", "lstm"])
def test_a_named_backend_is_not_measured(backend):
    choice = resolve_backend("f", backend, CPU, torch.float32, 64, CALL)
    assert choice == (backend, "named by the caller")


def test_a_call_takes_what_explain_says(monkeypatch):
    """One pair alone goes to nn.LSTM, cut to its longest sentence; 256 pairs do not."""
    asked = []

    def run(*arguments):
        asked.append(arguments[2].shape)
        return real(*arguments)

    real = _network._plain_layer
    monkeypatch.setattr(_network, "_plain_layer", run)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        m = SiameseLSTM(5, 64)
        for pairs, backend in ((1, "lstm"), (256, "torch")):
            x = torch.randn(pairs, 60, 5)
            lengths = [40] * pairs
            asked.clear()
            with torch.no_grad():
                m(x, x, lengths, lengths)
                assert m.explain(pairs=pairs, steps=40, filled=1.0).startswith(f"{backend}: ")
            assert asked == ([(2, 40, 5)] if backend == "lstm" else [])
        # with gradients it is another measurement
        assert "0.40 times" in m.explain(pairs=1, steps=40, filled=1.0)
        assert m.explain().startswith("torch: ")
    finally:
        torch.set_num_threads(threads)


def test_lengths_of_zero_and_padding_that_is_cut():
    torch.manual_seed(0)
    m = SiameseLSTM(5, 64, dtype=torch.float64, backend="lstm", bidirectional=True, pooling="mean")
    right = SiameseLSTM(
        5, 64, dtype=torch.float64, backend="reference", bidirectional=True, pooling="mean"
    )
    right.load_state_dict(m.state_dict())
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    x[:, 4:] = torch.nan
    for lengths in ([4, 0, 1], [0, 0, 0]):
        torch.testing.assert_close(m.encode(x, lengths), right.encode(x, lengths))
    mask = torch.rand(3, 9, dtype=torch.float64)
    expected = right.encode(x, [4, 2, 1], mask=mask)
    torch.testing.assert_close(m.encode(x, [4, 2, 1], mask=mask), expected)
