"""What one scored batch asks of the optimizer: disjoint parts, one per step, of (sample, slot) items."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The items of one optimizer step. sample, slot: (N,) int64 into a batch's (B, K).

    total: items in the loss's denominator; those whose gradient is 0 are not listed, yet count there.
    """

    sample: Tensor
    slot: Tensor
    total: int

    @property
    def scale(self) -> float:
        """What one item's loss is multiplied with, so that the sum over the part is the mean over its selected samples
        of the mean over their K slots."""
        return 1.0 / max(1, self.total)


def deal(group: Tensor, weight: Tensor, num_parts: int) -> Tensor:
    """Deals each group's selected samples round-robin into parts: (B,) int64, -1 where weight is 0."""
    selected = weight > 0
    before = (group[:, None] == group[None, :]).tril(-1) & selected[None, :]
    return torch.where(selected, before.sum(dim=1) % num_parts, -1)


def work_list(dealt: Tensor, active: Tensor, slots: int, num_parts: int) -> list[Part]:
    """The items of `num_parts` optimizer steps.

    dealt: (B,) int64, each sample's part, -1 = in none. active: (B,) bool, samples with a gradient; the others are not
    listed, yet count in their part's denominator. slots: K, items per sample.
    """
    parts = []
    for index in range(num_parts):
        member = dealt == index
        sample = (member & active).nonzero()[:, 0].repeat_interleave(slots)
        slot = torch.arange(slots).repeat(len(sample) // slots)
        parts.append(Part(sample, slot, int(member.sum()) * slots))
    return parts
