"""The rival of the stream: class-incremental learning as one would write it in plain PyTorch, on one process.

::

    python tools/bench/rivals/plain_loop.py SETTINGS.json

The settings name the encoder's folder, the files of the tasks, and all that both sides are to have alike. Mean pooling, a linear
head that gets rows as labels come, AdamW anew for every task. ``replay`` keeps a reservoir of the stream and mixes as many old
samples into every batch as there are new ones; ``joint`` sees all tasks as one. The last line is one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

Encoded = tuple[list[int], int]
"""Token ids, special ones included, and the number of the label."""


class Classifier(nn.Module):
    """Encoder, mean over real tokens, dropout, one linear layer."""

    def __init__(self, folder: str, dropout: float) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.encoder.config.hidden_size, 0)

    def grow(self, labels: int) -> None:
        """As many more outputs; those that are there keep their weights."""
        old = self.head
        self.head = nn.Linear(old.in_features, old.out_features + labels)
        nn.init.normal_(self.head.weight, std=self.encoder.config.initializer_range)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight[: old.out_features] = old.weight
            self.head.bias[: old.out_features] = old.bias

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        real = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head(self.dropout((hidden * real).sum(1) / real.sum(1)))


class Reservoir:
    """A uniform sample of all that was offered (Vitter, "Random sampling with a reservoir", 1985)."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.seen, self.kept = capacity, 0, list[Encoded]()

    def offer(self, sample: Encoded) -> None:
        self.seen += 1
        if len(self.kept) < self.capacity:
            self.kept.append(sample)
        elif (place := random.randrange(self.seen)) < self.capacity:
            self.kept[place] = sample

    def draw(self, count: int) -> list[Encoded]:
        return random.sample(self.kept, min(count, len(self.kept)))


def batch_of(samples: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask, padded to the longest sample (BERT's padding is 0), and labels."""
    longest = max(len(ids) for ids, _ in samples)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in samples])
    return ids, (ids != 0).long(), torch.tensor([label for _, label in samples])


def learn(model: Classifier, train: list[Encoded], memory: Reservoir, settings: dict[str, Any]) -> list[tuple[float, int]]:
    """One task. Returns (CPU seconds, samples) of every step."""
    rate, batch = settings["learning_rate"], settings["batch_size"]
    head, encoder = list(model.head.parameters()), list(model.encoder.parameters())
    groups = [{"params": encoder}, {"params": head, "lr": rate * settings["head_factor"]}]
    # Fused: on CPU a fifth of a step is saved by this word alone, which an able rival knows.
    optimizer = torch.optim.AdamW(
        groups, lr=rate, betas=settings["betas"], eps=settings["epsilon"], weight_decay=settings["weight_decay"], fused=True
    )
    steps = -(-len(train) // batch)
    warmup, final = settings["warmup_share"] * steps, settings["final_ratio"]

    def factor(step: int) -> float:
        falling = final + (1 - final) * max(0.0, (steps - step) / max(1.0, steps - warmup))
        return min((step + 1) / warmup, falling) if step < warmup else min(1.0, falling)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order = random.sample(train, len(train))
    spent = []
    model.train()
    for start in range(0, len(order), batch):
        began = time.process_time()
        new = order[start : start + batch]
        samples = new + memory.draw(batch)
        ids, mask, labels = batch_of(samples)
        loss = cross_entropy(model(ids, mask), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()
        schedule.step()
        loss.item()
        spent.append((time.process_time() - began, len(samples)))
    for sample in order:
        memory.offer(sample)
    return spent


@torch.no_grad()
def accuracy(model: Classifier, test: list[Encoded]) -> float:
    model.eval()
    right = 0
    for start in range(0, len(test), 256):
        ids, mask, labels = batch_of(test[start : start + 256])
        right += int((model(ids, mask).argmax(1) == labels).sum())
    return right / len(test)


def main(settings: dict[str, Any]) -> dict[str, Any]:
    random.seed(settings["seed"])
    torch.manual_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    numbers: dict[str, int] = {}

    def read(file: str) -> list[Encoded]:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=settings["max_tokens"])["input_ids"]
        return [(own, numbers.setdefault(row["label"], len(numbers))) for own, row in zip(ids, rows, strict=True)]

    data = [(read(task["train"]), read(task["test"])) for task in settings["tasks"]]
    stages = (
        [[sample for train, _ in data for sample in train]] if settings["method"] == "joint" else [train for train, _ in data]
    )
    model = Classifier(settings["model"], settings["dropout"])
    memory = Reservoir(settings["memory"] if settings["method"] == "replay" else 0)
    results, steps = [], []
    for number, train in enumerate(stages):
        model.grow(len({label for _, label in train}))
        steps.append(learn(model, train, memory, settings))
        results.append([accuracy(model, test) for _, test in (data if len(stages) == 1 else data[: number + 1])])
    spent = [[cpu_s for cpu_s, _ in stage] for stage in steps]
    return {"R": results, "samples": sum(samples for stage in steps for _, samples in stage), "step_cpu_s": spent}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), flush=True)
