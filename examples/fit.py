"""Train with fastsiam's loop: checkpoints, dev pairs and statistics, and an optimizer of your own.

Run it twice: the second run finds the checkpoints of the first, and has nothing left to do.
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from fastsiam import TextSiamese
from fastsiam.text.pairs import read_pairs
from fastsiam.text.sample import write_sample
from fastsiam.text.tokens import tokenize
from fastsiam.text.vectors import load_vectors
from fastsiam.text.vocabulary import Vocabulary
from fastsiam.training import (
    Checkpoint,
    EncodedPairs,
    MeanSquaredError,
    PairBatches,
    Phase,
    evaluate,
    fit,
)

paths = write_sample(Path("sample"))
train, dev, test = (read_pairs(path) for path in (paths.train, paths.dev, paths.test))
words = Counter(
    word for part in (train, dev, test) for side in (part.left, part.right) for text in side
    for word in tokenize(text)
)  # fmt: skip
vectors = load_vectors([paths.vectors], words)
torch.manual_seed(0)
model = TextSiamese(Vocabulary(vectors.words), vectors.table, hidden_size=32)

objective = MeanSquaredError(model.lstm)
source = PairBatches(EncodedPairs.of(train, model.vocabulary, model.max_len), batch_size=32)
optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=4e-3)
epochs = 6
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * source.steps())
outcome = fit(
    objective,
    [Phase("train", source, epochs, optimizer, schedule)],
    dev=lambda: evaluate(model, dev).metrics,
    clip=5.0,
    checkpoint=Checkpoint("checkpoints", every=20),
)
for record in outcome.records:
    print(f"epoch {record.epoch}: loss {record.loss:.4f}, dev Pearson {record.dev_pearson:.4f}")
model.save_pretrained("model")
print(json.dumps(asdict(evaluate(model, test).metrics)))
