"""Encoder pretraining at scale: a training step is a pure function of a plan, whatever the number of ranks.

Nothing runs on import, and importing the package does not import torch.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
