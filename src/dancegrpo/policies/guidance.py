"""Classifier-free guidance with both branches in one forward pass, the negative one first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NEGATIVE = "negative_"
"""Before a condition's name: the same of the negative prompt."""


def both_branches(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B conditions, each `name` beside its `negative_name` -> the 2 B rows of one pass: B negative, B positive."""
    return {
        name: torch.cat([tensors[NEGATIVE + name], positive])
        for name, positive in tensors.items()
        if not name.startswith(NEGATIVE)
    }


def combine(out: Tensor, scale: float) -> Tensor:
    """Predictions (2 B, *S) -> negative + scale (positive - negative), (B, *S): arXiv:2207.12598."""
    negative, positive = out.chunk(2)
    return guide(negative, positive, scale)


def guide(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """As `combine`, of two passes."""
    return negative + scale * (positive - negative)
