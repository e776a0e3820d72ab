"""A whole recipe: one model or an ensemble, calibrated where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from fastsiam.calibration import Calibration
from fastsiam.device import pick_device
from fastsiam.model import TextSiamese
from fastsiam.training.config import Config
from fastsiam.training.data import EncodedPairs, Inputs, load_inputs
from fastsiam.training.evaluate import Evaluation, evaluate, score_pairs
from fastsiam.training.metrics import EpochRecord, measure
from fastsiam.training.run import Result, Watcher, facts, train
from fastsiam.training.run_folder import RunFolder
from fastsiam.training.world import find_world


def run_recipe(config: Config, watcher: Watcher | None = None) -> Result:
    """Train the models of a configuration, with its ensemble and its calibration.

    One model without calibration is a run of `train`, in `config.out`. Otherwise each model is a
    run in a folder of its own below it, `members/0`, `members/1`, ... from seeds that follow one
    another, and `folds/0`, ... for the calibration; `config.out` gets the one model made of them,
    `predictions.tsv` and `run.json`. A signal ends all runs. `config.resume` goes on with the run
    that it cut off and skips the finished runs.

    The calibration is fitted on predictions for training pairs by models that have not seen them.
    The pairs are dealt into `config.folds` parts, equal ones into the same part. For each part one
    model is trained on the other parts by the same recipe, without that part's pairs in `pretrain`.
    The seeds of the members take turns. Dev and test pairs have no influence.

    Args:
        config: the settings.
        watcher: told of the progress, if given; a phase has the name of its run before its own.

    Returns:
        The model and its metrics. `best` is the first member's epoch, with the dev metrics of the
        whole model.

    Raises:
        As `train`.
    """
    if config.ensemble == 1 and not config.calibrate:
        return train(config, watcher)
    world = find_world(pick_device(config.device))
    folder = RunFolder(config.out, config.resume, many=True) if world.main else None
    inputs = load_inputs(config)
    progress = _Progress(watcher or Watcher(), inputs, config)

    results: list[Result] = []
    for number in range(config.ensemble):
        result = _run(config, number, "member", replace(inputs, test=None), progress)
        if result.signal:
            return result
        results.append(result)
    models = [result.model for result in results]
    model = models[0] if len(models) == 1 else TextSiamese.ensemble(models)

    folds: list[Result] = []
    if config.calibrate:
        pairs = inputs.phases["train"]
        assert isinstance(pairs, EncodedPairs)  # Config lets nobody calibrate on a stream
        predicted, gold = [], []
        for number in range(config.folds):
            outside, inside = pairs.split(config.folds, number)
            phases, pretrain = {"train": outside}, inputs.phases.get("pretrain")
            if isinstance(pretrain, EncodedPairs) and len(kept := pretrain.without(inside)):
                phases = {"pretrain": kept, **phases}
            # of the pairs as they stand in the file, those that are not inside are outside
            own = len(pairs) - inputs.swapped - len(inside)
            part = replace(
                inputs,
                phases=phases,
                test=None,
                swapped=len(outside) - own,
            )
            result = _run(config, number, "fold", part, progress)
            if result.signal:
                return result
            folds.append(result)
            predicted.append(result.model.score(inside.left, inside.right))
            gold.append(inside.similarity)
        model.calibration = Calibration.fit(torch.cat(predicted), torch.cat(gold))

    best = results[0].best
    assert best is not None
    dev = measure(score_pairs(model, inputs.dev, world), inputs.dev.similarity)
    best = replace(best, dev_pearson=dev.pearson, dev_spearman=dev.spearman, dev_mse=dev.mse)
    test = None if inputs.test is None else evaluate(model, inputs.test)
    if folder is not None:
        model.save_pretrained(folder.path)
        if inputs.test is not None and test is not None:
            similarity = test.similarity
            if model.calibration is not None:
                similarity = model.calibration(similarity)
            folder.write_predictions(inputs.test, similarity)
        folder.write_run(_facts(config, inputs, model, results, folds, best, test))
    return Result(model, best, inputs, test, 0)


def _run(config: Config, number: int, kind: str, inputs: Inputs, progress: _Progress) -> Result:
    """Train one member, or the model of one fold, in a folder of its own."""
    progress.name = f"{kind} {number + 1}"
    one = replace(
        config,
        out=config.out / f"{kind}s" / str(number),
        test=None,
        seed=(config.seed + number % config.ensemble) % 2**63,
    )
    return train(one, progress, inputs)


class _Progress(Watcher):
    """Tells a watcher of many runs as if they were one."""

    def __init__(self, watcher: Watcher, inputs: Inputs, config: Config) -> None:
        self.watcher, self.inputs, self.name = watcher, inputs, ""
        members, folds = config.ensemble, config.folds if config.calibrate else 0
        # each fold trains on all parts but one
        self.runs = members + folds * (config.folds - 1) / config.folds
        self.started = False

    def on_start(self, _inputs: Inputs, model: TextSiamese, pairs: int) -> None:
        if not self.started:
            self.watcher.on_start(self.inputs, model, round(pairs * self.runs))
        self.started = True

    def on_resume(self, records: Sequence[EpochRecord], step: int, pairs: int) -> None:
        self.watcher.on_resume(records, step, pairs)

    def on_batch(self, pairs: int) -> None:
        self.watcher.on_batch(pairs)

    def on_epoch(self, record: EpochRecord, best: bool) -> None:
        self.watcher.on_epoch(replace(record, phase=f"{self.name}, {record.phase}"), best)


def _facts(
    config: Config,
    inputs: Inputs,
    model: TextSiamese,
    results: Sequence[Result],
    folds: Sequence[Result],
    best: EpochRecord,
    test: Evaluation | None,
) -> dict[str, Any]:
    return {
        **facts(config, inputs, model),
        "interrupted": False,
        "members": [None if r.best is None else asdict(r.best) for r in results],
        "folds": [None if r.best is None else asdict(r.best) for r in folds],
        "best": asdict(best),
        "test": None if test is None else asdict(test.metrics),
        "test_calibrated": None
        if test is None or test.calibrated is None
        else asdict(test.calibrated),
    }
