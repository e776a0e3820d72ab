"""From scored sentence pairs to a trained model: the loop, its checkpoints, and what measures it.

`train` goes from files to a run folder, `run_recipe` to that of an ensemble or a calibrated model
too. `train` is made of the other names, which take a module and pairs of your own; nothing here is
needed to train a `SiameseLSTM` in a loop of your own.
"""

from fastsiam.training.checkpoint import Checkpoint
from fastsiam.training.config import Config
from fastsiam.training.data import EncodedPairs
from fastsiam.training.evaluate import evaluate, measure
from fastsiam.training.fit import fit
from fastsiam.training.loop import train
from fastsiam.training.objective import MeanSquaredError
from fastsiam.training.phase import Phase
from fastsiam.training.recipe import run_recipe
from fastsiam.training.source import PairBatches

__all__ = [
    "Checkpoint",
    "Config",
    "EncodedPairs",
    "MeanSquaredError",
    "PairBatches",
    "Phase",
    "evaluate",
    "fit",
    "measure",
    "run_recipe",
    "train",
]
