"""docs/article.md names what is there, and the faults that it lists do not come back."""

import gc
import importlib
import re
from pathlib import Path

import pytest
import torch
from test_training import make_config
from tiny import D, write_files, write_pairs
from torch.profiler import ProfilerActivity, profile

from fastsiam.model import TextSiamese
from fastsiam.modules import SiameseLSTM
from fastsiam.text.pairs import read_pairs
from fastsiam.text.vocabulary import Vocabulary
from fastsiam.training.data import load_inputs
from fastsiam.training.evaluate import evaluate
from fastsiam.training.metrics import RunningMetrics, measure
from fastsiam.training.objective import MeanSquaredError, Output
from fastsiam.training.start import initialize

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "article.md"
BEHAVIOURS, FAULTS = "## What it does", "## What is wrong with it"
REFUSED = "Refused:"


def table(heading):
    """Return the rows of the table below a heading: number, text, ours, test."""
    part = PAGE.read_text(encoding="utf-8").split(heading, 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in part.splitlines()
        if re.match(r"\| \d+ \|", line)
    ]
    assert all(len(row) == 4 for row in rows)
    return rows


ROWS = [(heading, row) for heading in (BEHAVIOURS, FAULTS) for row in table(heading)]


def test_both_tables_are_whole():
    for heading in (BEHAVIOURS, FAULTS):
        assert [row[0] for row in table(heading)] == [str(n) for n in range(1, 28)]


@pytest.mark.parametrize(
    ("heading", "row"),
    ROWS,
    ids=[("behaviour", "fault")[h is FAULTS] + f" {r[0]}" for h, r in ROWS],
)
def test_a_row_names_what_is_there(heading, row):
    _, _, ours, tests = row
    names = re.findall(r"`(fastsiam[\w.]*)`", ours)
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", tests)
    assert (names and named) or REFUSED in ours
    for name in names:
        module, rest = name, []
        while True:
            try:
                thing = importlib.import_module(module)
                break
            except ModuleNotFoundError:
                module, _, last = module.rpartition(".")
                rest.insert(0, last)
        for attribute in rest:
            # a field of a dataclass without a default is in its annotations alone
            known = attribute in getattr(thing, "__annotations__", {})
            assert known or hasattr(thing, attribute), name
            thing = getattr(thing, attribute, None)
    for file, test in named:
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source, f"{file}.{test}"


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path / "data")


# the faults, by their number in the second table


def test_3_a_split_is_one_for_the_whole_run(files):
    pairs = load_inputs(make_config(files)).phases["train"]
    parts = [pairs.split(5, 2) for _ in range(2)]
    for one, other in zip(*parts, strict=True):
        assert torch.equal(one.left.ids, other.left.ids)
        assert torch.equal(one.similarity, other.similarity)


def test_4_a_long_sentence_is_its_first_words_and_not_the_first_one_again():
    words = [f"w{n}" for n in range(80)]
    vocabulary = Vocabulary(["<unk>", *words])
    encoded = vocabulary.encode([" ".join(words)])
    assert encoded.ids.tolist() == [list(range(1, 74))]
    assert encoded.lengths.tolist() == [73]
    assert encoded.truncated == 1


def test_6_and_7_correlations_are_floats_without_the_p_value():
    gold = torch.linspace(0, 1, 8)
    predicted = gold + 0.1 * torch.tensor([1.0, -1, 0, 1, -1, 0, 1, -1])
    metrics = measure(predicted, gold)
    expected = float(torch.corrcoef(torch.stack([predicted, gold]).double())[0, 1])
    assert metrics.pearson == pytest.approx(expected)
    for value in (metrics.pearson, metrics.spearman, metrics.mse):
        assert type(value) is float
        assert float(f"{value:f}") == pytest.approx(value, abs=1e-6)


def test_8_measuring_again_and_again_leaves_nothing_behind(files):
    config = make_config(files)
    inputs = load_inputs(config)
    model = TextSiamese(inputs.vocabulary, inputs.table, 7, device="cpu")
    test = read_pairs(files.test)

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    evaluate(model, test)
    before = tensors()
    for _ in range(5):
        evaluate(model, test)
    assert tensors() == before


def test_12_sentences_are_ids_and_a_word_has_one_vector(files):
    inputs = load_inputs(make_config(files))
    sides = [side for pairs in inputs.phases.values() for side in (pairs.left, pairs.right)]
    held = sum(side.ids.nbytes for side in sides) + inputs.table.nbytes
    dense = sum(len(side.lengths) for side in sides) * 73 * D * 8
    assert held < dense / 30
    assert len(inputs.table) == len(set(inputs.vocabulary.words))


def test_13_a_batch_is_as_wide_as_its_longest_sentence(files):
    write_pairs(files.train, [("a", "the cat", 2.0), ("a dog", "a " * 70, 3.0), ("kid", "a", 1.0)])
    pairs = load_inputs(make_config(files)).phases["train"]
    left, right, *_ = pairs.batch(torch.tensor([0, 2]), torch.device("cpu")).inputs
    assert (left.shape, right.shape) == ((2, 1), (2, 2))
    assert pairs.batch(torch.tensor([1]), torch.device("cpu")).inputs[1].shape == (1, 70)


def test_14_both_sides_are_one_call(files):
    inputs = load_inputs(make_config(files))
    model = TextSiamese(inputs.vocabulary, inputs.table, 7, backend="torch", device="cpu")
    batch = inputs.phases["train"].batch(torch.arange(8), torch.device("cpu"))
    objective = MeanSquaredError(model.lstm)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        objective(batch).loss.backward()
    calls = {event.key: event.count for event in watched.key_averages()}
    assert (calls["_Layer"], calls["_LayerBackward"]) == (1, 1)


@pytest.mark.parametrize("last", [1, 2], ids=lambda n: f"{n} in the last batch")
def test_18_correlation_is_of_the_epoch_and_not_of_a_batch(last):
    generator = torch.Generator().manual_seed(0)
    gold = torch.rand(32 + last, generator=generator)
    predicted = (gold + 0.3 * torch.rand(32 + last, generator=generator)).clamp(0, 1)
    running = RunningMetrics(torch.device("cpu"))
    for rows in (slice(0, 32), slice(32, 32 + last)):
        output = Output(torch.tensor(0.1), predicted[rows], gold[rows])
        running.update(output, torch.tensor(1.0), torch.tensor(True))
    figures = running.compute()
    whole = measure(predicted, gold)
    assert figures.pearson == pytest.approx(whole.pearson, abs=1e-6)
    assert figures.spearman == pytest.approx(whole.spearman, abs=1e-6)
    constant = RunningMetrics(torch.device("cpu"))
    constant.update(
        Output(torch.tensor(0.1), gold[:1], gold[:1]), torch.tensor(1.0), torch.tensor(True)
    )
    assert constant.compute().pearson is None


def test_25_there_is_a_gradient_beyond_the_articles_clip_and_clipped_pairs_are_counted():
    torch.manual_seed(0)
    lstm = SiameseLSTM(D, 50, scale=30.0).double()
    left, right = torch.randn(2, 4, 5, D, dtype=torch.float64)
    # exp(-L1) is far below the 1e-7 at which the article's gradient ends
    assert float(lstm(left, right).detach().max()) < 1e-7
    lstm.log_similarity(left, right).sum().backward()
    assert float(lstm.weight_hh_l0.grad.abs().max()) > 1e-3
    running = RunningMetrics(torch.device("cpu"))
    similarity = torch.tensor([1e-9, 0.5, 1.0, 0.999])
    running.update(
        Output(torch.tensor(0.1), similarity, similarity), torch.tensor(1.0), torch.tensor(True)
    )
    assert running.compute().clamped == 2


def test_27_the_gradient_of_shared_weights_is_the_sum_of_both_sides():
    torch.manual_seed(0)
    lstm = SiameseLSTM(D, 4, dtype=torch.float64)
    left, right = torch.randn(2, 3, 5, D, dtype=torch.float64)
    lstm(left, right).sum().backward()
    towers = [torch.nn.LSTM(D, 4, batch_first=True).double() for _ in range(2)]
    for tower in towers:
        tower.load_state_dict(lstm.state_dict())
    u, v = (tower(x)[0][:, -1] for tower, x in zip(towers, (left, right), strict=True))
    torch.exp(-(u - v).abs().sum(dim=1)).sum().backward()
    expected = sum(tower.weight_hh_l0.grad for tower in towers)
    torch.testing.assert_close(lstm.weight_hh_l0.grad, expected, rtol=1e-10, atol=1e-14)


def test_20_one_seed_decides_start_order_split_and_swaps(files, tmp_path):
    synonyms = tmp_path / "synonyms.json"
    synonyms.write_text('{"dog": ["cat"], "cat": ["dog"], "kid": ["dog", "cat"]}')

    def drawn(seed):
        torch.manual_seed(int(torch.randint(2**31, ())))  # the caller's own numbers do not matter
        inputs = load_inputs(make_config(files, synonyms=synonyms, seed=seed))
        lstm = SiameseLSTM(D, 7)
        initialize(lstm, None, torch.Generator().manual_seed(seed))
        return inputs.phases["train"].left.ids, lstm.weight_ih_l0.detach()

    first, second = drawn(3), drawn(3)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
