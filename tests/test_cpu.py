"""The compiled library against tensor operations in float64."""

import threading

import pytest
import torch

from fastsiam import SiameseLSTM, functional
from fastsiam.engine import cpu
from fastsiam.engine.batched import BATCHED
from fastsiam.engine.batched import lstm as batched_lstm
from fastsiam.engine.batched.tokens import BLOCK
from fastsiam.engine.cpu import CPU
from fastsiam.engine.layer import Call, Inputs, Options, Stacked, Upstream

COMPILED = not CPU.obstacle(Call("lstm", 1, torch.float32, torch.device("cpu"), training=False))
needs_library = pytest.mark.skipif(not COMPILED, reason="there is no compiled library here")

# around a tile's sequences, a product's rows and columns, and a vector's floats; the last has
# several blocks of tiles
SIZES = [(1, 1), (2, 3), (5, 8), (7, 17), (24, 50), (25, 16), (49, 33), (130, 5), (1500, 2)]
WORK = [("last", False), ("last", True), ("max", False), ("mask", False), ("mask", True)]


def draw(cell, N, H, P, T=6, D=4):
    """Return x, ids, lengths (some 0), a mask and stacked weights, in float64."""
    torch.manual_seed(N + H)
    gates = 4 if cell == "lstm" else 3
    lengths = torch.randint(T + 1, (N,))
    lengths[0] = T
    mask = torch.rand(N, T, dtype=torch.float64)
    size = H**-0.5
    weights = [
        size * torch.randn(P, *shape).double()
        for shape in ((gates * H, D), (gates * H, H), (4 * H,))
    ]
    # few tokens of a large table are found in another way
    V = 11 if N > 2 else 1000
    return torch.randn(V, D).double(), torch.randint(V, (N, T)), lengths, mask, weights


def objects(case, pooling="last", dtype=torch.float32):
    """Return the inputs and weights of a case as a backend takes them."""
    x, ids, lengths, mask, weights = case
    mask = mask.to(dtype) if pooling == "mask" else None
    steps = 6 if ids is None else ids.shape[1]
    inputs = Inputs(x.to(dtype), ids, lengths, mask, steps)
    return inputs, Stacked(*(w.to(dtype) for w in weights))


def infer(engine, cell, case, pooling="last", all_states=False, dtype=torch.float32):
    inputs, weights = objects(case, pooling, dtype)
    projection = engine.project(inputs.x, weights, cell)
    return engine.infer(inputs, projection, Options(cell, pooling, all_states=all_states))


def run(engine, cell, case, pooling, all_states, dtype=torch.float32):
    """Return all that a forward, a scoring and a backward give."""
    inputs, weights = objects(case, pooling, dtype)
    options = Options(cell, pooling, all_states=all_states, training=True)
    outputs, kept = engine.forward(inputs, weights, options)
    scored = infer(engine, cell, case, pooling, all_states, dtype)
    torch.manual_seed(0)
    dvectors, dstates = (
        None if t is None else torch.randn(t.shape, dtype=torch.float64).to(dtype)
        for t in (outputs.vectors, outputs.states)
    )
    upstream = Upstream(dvectors, dstates, None, None)
    grads = [backward(engine, inputs, weights, options, outputs, kept, upstream) for _ in range(2)]
    # a backward leaves what was saved for another one
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)
    found = [outputs.vectors, outputs.states, scored.vectors, scored.states, kept.peaks, *grads[0]]
    return [t for t in found if t is not None]


def backward(engine, inputs, weights, options, outputs, kept, upstream):
    found = engine.backward(inputs, weights, options, outputs, kept, upstream, need_dx=True)
    return found.x, found.weight_ih, found.weight_hh, found.bias


@needs_library
@pytest.mark.parametrize(("pooling", "keep_outputs"), WORK)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("N", "H"), SIZES)
def test_against_tensor_operations(cell, N, H, pooling, keep_outputs):
    case = draw(cell, N, H, P=1 + N % 2)
    truth = run(BATCHED, cell, case, pooling, keep_outputs, torch.float64)
    found = run(CPU, cell, case, pooling, keep_outputs)
    for ours, theirs in zip(found, truth, strict=True):
        if theirs.dtype == torch.float64:
            largest = theirs.abs().max().item() if theirs.numel() else 0.0
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=3e-6 * max(1, largest))
        elif theirs.numel():
            # a maximum's step may be another one where two states differ in rounding alone
            assert (ours != theirs).double().mean() < 0.02


@needs_library
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_threads_change_no_bit(cell):
    """Not of results nor of gradients; and scoring gives the bits of a training."""
    # the backward goes through several blocks of tiles
    case = draw(cell, N=1500, H=50, P=1, T=9)
    assert case[2].sum() > 3 * BLOCK
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(CPU, cell, case, "last", True))
            vectors, _, scored, *_ = found[-1]
            assert torch.equal(scored, vectors)
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], others, strict=True))


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_thread_that_begins_meanwhile_has_all_of_torchs_threads(monkeypatch, name):
    """A thread takes torch's number when it begins, and keeps it."""
    seen, inner = [], getattr(batched_lstm, name)

    def watched(*args):
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return inner(*args)

    monkeypatch.setattr(batched_lstm, name, watched)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        SiameseLSTM(5, 6, dtype=torch.float64, backend="torch")(x, x).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {2}


def one_step(x, weight_ih, bias=None):
    """Run an LSTM's first step over x, [N, D]; return vectors [N, H] and gates [N, 4H]."""
    G, lengths = weight_ih.shape[0], torch.ones(len(x), dtype=torch.long)
    weights = weight_ih[None], x.new_zeros(1, G, G // 4), None if bias is None else bias[None]
    inputs = Inputs(x, None, lengths, None, 1)
    outputs, kept = CPU.forward(inputs, Stacked(*weights), Options("lstm", training=True))
    return outputs.vectors, kept.gates[0]


@needs_library
@pytest.mark.parametrize(
    "value", [0.0, 1e-30, 0.7, 20.0, 43.6, 87.5, 90.0, 1e4, torch.inf, torch.nan]
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("H", [3, 9, 17])  # fewer than a vector, and more
def test_gates_of_any_size(value, sign, H):
    """One step from a zero state: h = sigmoid(o) tanh(sigmoid(i) tanh(g))."""
    bias = torch.full((4 * H,), sign * value)
    vectors, _ = one_step(torch.zeros(1, 0), torch.zeros(4 * H, 0), bias)
    gate = torch.tensor(sign * value).double()
    o = i = torch.sigmoid(gate)
    truth = o * torch.tanh(i * torch.tanh(gate))
    torch.testing.assert_close(
        vectors.double(), truth.expand(1, H), rtol=0, atol=1.5e-7, equal_nan=True
    )


@needs_library
@pytest.mark.parametrize("H", [1, 16])  # single numbers, and a vector
def test_gates_are_right_to_rounding(H):
    """Those that a forward leaves, i, f, g and o."""
    x = torch.linspace(-90, 90, 20032).view(-1, 4 * H)
    gates = one_step(x, torch.eye(4 * H))[1].double().view(-1, 4, H)
    x = x.double().view(-1, 4, H)
    error = (gates - torch.sigmoid(x)).abs()
    assert error[:, [0, 1, 3]].max() < 1e-7
    assert (gates - torch.tanh(x))[:, 2].abs().max() < 2e-7


@needs_library
def test_a_nan_stays_in_its_sequence():
    case = draw("lstm", N=30, H=8, P=1)
    x, ids, lengths, mask, weights = case
    x[3] = torch.nan
    case = x, ids, torch.full_like(lengths, 6), mask, weights
    for pooling in ("last", "max"):
        vectors = infer(CPU, "lstm", case, pooling).vectors
        assert torch.equal(vectors.isnan().any(dim=1), (ids == 3).any(dim=1))
        assert torch.equal(vectors.isnan().any(dim=1), vectors.isnan().all(dim=1))


@needs_library
def test_obstacles(monkeypatch):
    """What "torch" means for a call, and why the library does not take it."""
    assert SiameseLSTM(3, 2, backend="torch").explain("cpu").startswith("cpu: ")
    for options, obstacle in (
        ({"dtype": torch.float64}, "takes float32, and the weights are float64"),
        ({"hidden_size": 513}, "takes H up to 512, got 513"),
    ):
        arguments = {"input_size": 3, "hidden_size": 2, **options}
        assert SiameseLSTM(**arguments, backend="torch").explain("cpu").startswith("batched: ")
        with pytest.raises(ValueError, match=f"the compiled library {obstacle}; pass backend='to"):
            SiameseLSTM(**arguments, backend="cpu").explain("cpu")
    monkeypatch.setattr(CPU, "why_not", "left out")
    with pytest.raises(ValueError, match="left out; pass backend='torch'"):
        SiameseLSTM(3, 2, backend="cpu").explain("cpu")


@needs_library
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_lengths_that_nobody_checked(cell):
    """They count as the nearest ones that there are."""
    x, ids, _, _, weights = draw(cell, N=7, H=5, P=2)
    found = [
        run(CPU, cell, (x, ids, torch.tensor(lengths), None, weights), "max", True)
        for lengths in ([3, 0, 6, 7, 1, -2, 9], [3, 0, 6, 6, 1, 0, 6])
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_library
def test_no_sequences():
    x, ids, lengths, _, weights = draw("lstm", N=3, H=5, P=1)
    for rows, some in ((x, ids[:0]), (x[:0], ids[:0])):
        found = run(CPU, "lstm", (rows, some, lengths[:0], None, weights), "max", True)
        assert all(not each.any() for each in found)


@needs_library
def test_no_memory():
    case = draw("lstm", N=1, H=2, P=1)
    inputs, weights = objects(case)
    projection = CPU.project(inputs.x, weights, "lstm")
    endless = Inputs(inputs.x, inputs.ids, inputs.lengths, None, 2**60)
    with pytest.raises(MemoryError, match=r"1 sequences of up to \d+ steps"):
        CPU.infer(endless, projection, Options("lstm"))


BUILDS = sorted(cpu.FOLDER.glob("_compiled_steps*.so"))


@needs_library
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("N", "H"), [(3, 3), (5, 9), (25, 16), (100, 50)])
def test_builds_for_other_processors(build, cell, N, H):
    """They give the same bits."""
    if "avx512" in build.name and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor cannot run it")
    case = draw(cell, N, H, P=2)
    expected = run(CPU, cell, case, "max", True)
    library, why_not = cpu.load_library(build)
    assert not why_not
    found = run(cpu.Cpu(library, ""), cell, case, "max", True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@needs_library
def test_ids_out_of_the_table():
    """They would be read from anywhere; only an unchecked call brings them."""
    x, ids, lengths, mask, weights = draw("lstm", N=3, H=5, P=1)
    for bad in (-1, len(x)):
        some = ids.clone()
        some[lengths < 6, -1] = bad  # behind an end nobody reads it
        infer(CPU, "lstm", (x, some, lengths, mask, weights))
        some[0, 5] = bad
        case = x, some, lengths, mask, weights
        with pytest.raises(IndexError, match="an id is not from 0 to 10"):
            infer(CPU, "lstm", case)
        with pytest.raises(IndexError, match="an id is not from 0 to 10"):
            CPU.forward(*objects(case), Options("lstm", training=True))


@needs_library
@pytest.mark.skipif(len(BUILDS) < 2, reason="there is one build")
def test_the_processor_picks_the_build(monkeypatch):
    for capability, name in (("AVX2", "_compiled_steps"), ("AVX512", "_compiled_steps_avx512")):
        monkeypatch.setattr(cpu.torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        monkeypatch.setattr(cpu, "load_library", lambda file: (file.name, ""))
        assert cpu._load().library.partition(".")[0] == name


@needs_library
def test_why_there_is_no_library(monkeypatch, tmp_path):
    def why():
        found = cpu._load()
        assert found.library is None
        return found.why_not

    monkeypatch.setattr(cpu, "VERSION", 0)
    assert why() == "the compiled library is of another version; install fastsiam again"
    monkeypatch.setattr(cpu.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    assert why() == "the compiled library needs AVX2, and this processor has DEFAULT"
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(cpu, "FOLDER", tmp_path)
    assert why().startswith("fastsiam was installed without a C++ compiler")
    (tmp_path / "_compiled_steps.abi3.so").write_bytes(b"no library")
    assert why().startswith("the compiled library could not be loaded: ")


def test_prepared_of_another_network():
    """It would be read beyond its end."""
    torch.manual_seed(0)
    table, ids = torch.randn(9, 3), torch.randint(9, (2, 4))
    lstm, gru, larger = torch.nn.LSTM(3, 5), torch.nn.GRU(3, 5), torch.nn.LSTM(3, 7)
    weights = {
        name: functional.Weights(*(p.detach() for p in network.parameters()))
        for name, network in {"lstm": lstm, "gru": gru, "larger": larger}.items()
    }
    for other, cell in (("gru", "gru"), ("larger", "lstm")):
        prepared = functional.prepare(weights[other], table, "torch", cell=cell)
        with pytest.raises(ValueError, match=r"siamese_encode: prepared must be .* got one for "):
            functional.siamese_encode(
                ids, weights["lstm"], embedding=table, backend="torch", prepared=prepared
            )


@needs_library
@pytest.mark.parametrize("own_rows", [False, True])
def test_word_vectors_with_gaps(own_rows):
    """Columns of a wider table, with ids (wild ones behind an end), or of wider rows."""
    wide, ids, lengths, _, weights = draw("lstm", N=30, H=8, P=1, D=5)
    ids[lengths < 6, -1] = 99
    if own_rows:
        wide, ids = wide[torch.randint(11, (ids.numel(),))], None
    wide = torch.cat((wide, wide), dim=1).float()
    options, found = Options("lstm", training=True), []
    for x in (wide[:, :5], wide[:, :5].contiguous()):
        inputs, weights_ = objects((x, ids, lengths, None, weights))
        outputs, kept = CPU.forward(inputs, weights_, options)
        upstream = Upstream(outputs.vectors, None, None, None)
        grads = backward(CPU, inputs, weights_, options, outputs, kept, upstream)
        projection = CPU.project(x, weights_, "lstm")
        found.append([projection.table, projection.weight, outputs.vectors, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_library
def test_a_build_that_does_not_load_leaves_the_other(monkeypatch, tmp_path):
    name = f"_compiled_steps{cpu.EXTENSION_SUFFIXES[-1]}"
    monkeypatch.setattr(cpu, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert "without a C++ compiler" in cpu._load().why_not
    (tmp_path / name.replace("steps", "steps_avx512")).write_bytes(b"")
    assert "could not be loaded" in cpu._load().why_not
    plain = next(build for build in BUILDS if "avx512" not in build.name)
    (tmp_path / name).write_bytes(plain.read_bytes())
    assert cpu._load().why_not == ""
