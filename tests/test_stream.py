import csv
import json
import signal
from dataclasses import replace

import pytest
import torch
from test_checkpoint import Stopper, make_config, what_a_run_left
from tiny import SICK_HEADER, make_pairs, write_files, write_pairs

from fastsiam.text.pair_file import scan_pairs
from fastsiam.text.pairs import DataError, read_pairs, stream_pairs
from fastsiam.text.vocabulary import Vocabulary
from fastsiam.training.batches import POOL, StreamBatches, shuffle
from fastsiam.training.data import EncodedPairs, load_inputs
from fastsiam.training.run import train

PAIRS = [("a cat", "the dog, slow", 1.5), ('so "quoted"', "NA", 5), ("007", "", 2.25)]


def write(path, pairs):
    if path.suffix == ".tsv":
        return write_pairs(path, pairs)
    rows = [dict(zip(SICK_HEADER, pair, strict=True)) for pair in pairs]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, SICK_HEADER)
            table.writeheader()
            table.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [{**row, SICK_HEADER[2]: float(row[SICK_HEADER[2]])} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path / "data")


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_a_stream_holds_what_the_file_does(tmp_path, kind):
    path = write(tmp_path / f"pairs.{kind}", PAIRS)
    expected = [(left, right, (score - 1) / 4) for left, right, score in PAIRS]
    assert list(stream_pairs(path)) == expected
    pairs = read_pairs(path)
    assert list(zip(pairs.left, pairs.right, pairs.similarity, strict=True)) == expected
    wide = list(stream_pairs(path, score_range=(0, 10)))
    assert [similarity for *_, similarity in wide] == [0.15, 0.5, 0.225]
    names = {"columns": (*SICK_HEADER[1::-1], SICK_HEADER[2])}
    assert next(stream_pairs(path, **names))[:2] == PAIRS[0][1::-1]
    bad = write(tmp_path / f"bad.{kind}", [*PAIRS, ("a", "b", 5.5)])
    where = "row 4" if kind == "parquet" else rf"line {len(PAIRS) + 2 - (kind == 'jsonl')}"
    with pytest.raises(DataError, match=rf"bad.{kind}, {where}: the score must be from 1 to 5"):
        list(stream_pairs(bad))
    with pytest.raises(DataError, match="no column 'x'"):
        list(stream_pairs(path, columns=("x", *SICK_HEADER[1:])))
    with pytest.raises(ValueError, match="the lower first, got 5 1"):
        list(stream_pairs(path, score_range=(5, 1)))


def test_a_damaged_parquet_file(tmp_path):
    path = write(tmp_path / "pairs.parquet", PAIRS)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(stream_pairs(path))


@pytest.mark.parametrize(("count", "buffer"), [(0, 4), (3, 4), (4, 4), (100, 1), (500, 40)])
def test_a_shuffle_holds_no_more_than_its_buffer(count, buffer):
    taken = 0

    def rows():
        nonlocal taken
        for i in range(count):
            taken += 1
            yield (str(i), "", 0.0)

    given = []
    for row in shuffle(rows(), buffer, seed=1):
        given.append(int(row[0]))
        assert taken - len(given) <= buffer
    assert sorted(given) == list(range(count))
    again = [int(row[0]) for row in shuffle(rows(), buffer, seed=1)]
    assert given == again
    if buffer == 40:
        assert given != [int(row[0]) for row in shuffle(rows(), buffer, seed=2)]
        # far from its place, and not always
        moves = [abs(i - row) for i, row in enumerate(given)]
        assert sum(moves) / count > buffer / 4
    assert (given == list(range(count))) == (count <= 1 or buffer == 1)


def test_batches_hold_each_pair_once_and_few_at_a_time(tmp_path):
    pairs = make_pairs(700, seed=3)
    path = write_pairs(tmp_path / "pairs.tsv", pairs)
    dev = read_pairs(write_pairs(tmp_path / "dev.tsv", [pairs[5], (*pairs[600][1::-1], 3.0)]))
    file = scan_pairs(path, [dev], 4)
    kept = read_pairs(path)
    keys = {frozenset(pair[:2]) for pair in (pairs[5], pairs[600])}
    rows = [i for i in range(700) if frozenset((kept.left[i], kept.right[i])) not in keys]
    kept = kept.take(rows)
    assert len(file) == len(kept) < 700
    words = sorted(file.words)
    vocabulary = Vocabulary(["<unk>", *words[1:]])  # one word is unknown
    expected = EncodedPairs.of(kept, vocabulary, 4)
    assert file.truncated == expected.left.truncated + expected.right.truncated

    def flat(batch):
        left, right, *lengths = batch.inputs
        sides = zip(
            left.tolist(), right.tolist(), *(part.tolist() for part in lengths), strict=True
        )
        return [
            (a[:n], b[:m], round(y, 6))
            for (a, b, n, m), y in zip(sides, batch.target.tolist(), strict=True)
        ]

    taken = 0

    class Counted(type(file)):
        def rows(self):
            nonlocal taken
            for row in super().rows():
                taken += 1
                yield row

    source = StreamBatches(Counted(**vars(file)), vocabulary, 4, batch_size=6, buffer=50)
    generator = torch.Generator().manual_seed(0)
    seen, given, widths = [], 0, []
    for rows in source.batches(generator):
        assert taken - given <= 50 + POOL * 6
        batch = source.batch(rows, torch.device("cpu"))
        seen += flat(batch)
        given += len(rows)
        widths.append(batch.inputs[0].shape[1])
        assert len(rows[1::2]) == len(rows) // 2
    everything = flat(expected.batch(torch.arange(len(expected)), torch.device("cpu")))
    assert sorted(seen) == sorted(everything)
    assert seen != everything
    assert len(widths) == source.steps() == -(-len(file) // 6)
    with pytest.raises(DataError, match="each of its 2 pairs"):
        scan_pairs(tmp_path / "dev.tsv", [dev], 4)


def test_a_streamed_run_resumes_bit_for_bit(files, tmp_path):
    pretrain = write(tmp_path / "pre.jsonl", make_pairs(60, seed=6))
    options = {"stream": True, "shuffle_buffer": 16, "pretrain": pretrain, "columns": SICK_HEADER}
    whole = make_config(files, tmp_path / "whole", **options)
    memory = load_inputs(replace(whole, stream=False))
    result = train(whole)
    assert {name: len(p) for name, p in memory.phases.items()} == {
        name: len(p) for name, p in result.inputs.phases.items()
    }
    assert result.inputs.dropped == memory.dropped
    assert result.inputs.truncated == memory.truncated
    assert sorted(result.inputs.vocabulary.words) == sorted(memory.vocabulary.words)
    parts = replace(whole, out=tmp_path / "parts", resume=True)
    for steps in (3, 25, 8):
        assert train(parts, Stopper(steps)).signal == signal.SIGINT
    train(parts)
    assert what_a_run_left(parts.out) == what_a_run_left(whole.out)


def test_what_needs_all_pairs_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"stream must go without calibrate, for which all pairs"):
        make_config(files, tmp_path / "run", stream=True, calibrate=True)
