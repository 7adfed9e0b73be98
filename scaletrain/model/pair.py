"""The second head of a masked language model, which answers a question about the two parts of a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

PAIR = "pair."
"""In front of the names of its parameters."""


class PairHead(nn.Module):
    """What is said of two parts: a dense layer with tanh on the first token, and two logits, as in BERT (arXiv 1810.04805)."""

    def __init__(self, config: PretrainedConfig) -> None:
        """For an encoder of this configuration: weights from a normal distribution as wide as its own, biases zero."""
        super().__init__()
        hidden, spread = int(config.hidden_size), float(getattr(config, "initializer_range", 0.02))
        self.dense = nn.Linear(hidden, hidden)
        self.answers = nn.Linear(hidden, 2)
        for layer in (self.dense, self.answers):
            nn.init.normal_(layer.weight, std=spread)
            nn.init.zeros_(layer.bias)

    def forward(self, firsts: Tensor) -> Tensor:
        """[samples, hidden] -> [samples, 2]."""
        logits: Tensor = self.answers(torch.tanh(self.dense(firsts)))
        return logits
