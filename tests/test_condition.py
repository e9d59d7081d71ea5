"""Conditions of several prompts side by side."""

from __future__ import annotations

import torch

from dancegrpo.policies import Condition


def test_shorter_sequences_are_filled_up_at_their_end_and_masked_out() -> None:
    long = Condition(
        {"text": torch.ones(1, 3, 2), "mask": torch.ones(1, 3, dtype=torch.bool), "pooled": torch.ones(1, 4)}
    )
    short = Condition(
        {"text": torch.ones(1, 1, 2), "mask": torch.ones(1, 1, dtype=torch.bool), "pooled": torch.ones(1, 4)}
    )
    both = Condition.cat([short, long])
    assert both.tensors["mask"].tolist() == [[True, False, False], [True, True, True]]
    assert both.tensors["text"][0].sum() == 2
    assert both.tensors["text"].shape == (2, 3, 2)
    assert both.tensors["pooled"].shape == (2, 4)


def test_equal_lengths_are_only_put_side_by_side() -> None:
    parts = [Condition({"text": torch.randn(2, 3, 2)}), Condition({"text": torch.randn(1, 3, 2)})]
    assert torch.equal(Condition.cat(parts).tensors["text"], torch.cat([part.tensors["text"] for part in parts]))
