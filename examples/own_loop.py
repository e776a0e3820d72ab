"""Train `SiameseLSTM` in a plain PyTorch loop: it is a module like any other."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn import functional as F

from fastsiam import SiameseLSTM
from fastsiam.text.pairs import read_pairs
from fastsiam.text.sample import write_sample
from fastsiam.text.tokens import tokenize
from fastsiam.text.vectors import load_vectors
from fastsiam.text.vocabulary import Vocabulary
from fastsiam.training import measure

paths = write_sample(Path("sample"))
train, test = read_pairs(paths.train), read_pairs(paths.test)
words = Counter(
    word for part in (train, test) for side in (part.left, part.right) for text in side
    for word in tokenize(text)
)  # fmt: skip
vectors = load_vectors([paths.vectors], words)
vocabulary = Vocabulary(vectors.words)
left, right = vocabulary.encode(train.left), vocabulary.encode(train.right)
gold = torch.tensor(train.similarity)

torch.manual_seed(0)
model = SiameseLSTM(vectors.table.shape[1], 32, embedding=vectors.table, scale=0.25)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=4e-3)
for epoch in range(6):
    total = 0.0
    for rows in torch.randperm(len(gold)).split(32):
        similarity = model(left.ids[rows], right.ids[rows], left.lengths[rows], right.lengths[rows])
        loss = F.mse_loss(similarity, gold[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    print(f"epoch {epoch + 1}: loss {total / len(gold):.4f}")

left, right = vocabulary.encode(test.left), vocabulary.encode(test.right)
with torch.no_grad():
    similarity = model(left.ids, right.ids, left.lengths, right.lengths)
print(json.dumps(asdict(measure(similarity, torch.tensor(test.similarity)))))
