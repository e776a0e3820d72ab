"""From scored sentence pairs to a trained model: the loop, its checkpoints and its metrics.

`train` goes from files to a run folder. `run_recipe` does so for an ensemble or a calibrated model
too. The other names take a module and pairs of your own. A loop of your own needs none of them.
"""

from fastsiam.training.batches import PairBatches
from fastsiam.training.checkpoint import Checkpoint
from fastsiam.training.config import Config
from fastsiam.training.data import EncodedPairs
from fastsiam.training.evaluate import evaluate
from fastsiam.training.fit import Observer, Phase, fit
from fastsiam.training.metrics import measure
from fastsiam.training.objective import MeanSquaredError
from fastsiam.training.recipe import run_recipe
from fastsiam.training.run import train

__all__ = [
    "Checkpoint",
    "Config",
    "EncodedPairs",
    "MeanSquaredError",
    "Observer",
    "PairBatches",
    "Phase",
    "evaluate",
    "fit",
    "measure",
    "run_recipe",
    "train",
]
