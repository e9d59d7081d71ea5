"""Group normalisation against published numbers, and the properties that any grouping must have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dancegrpo.advantages import batch_advantage, best_of_n, combine, group_advantage

GOLDEN = Path(__file__).parent / "golden"
unhurried = settings(deadline=None, max_examples=50)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scores on a grid of 1/8 (so that shifts are exact), validity, and group ids in no order."""
    size = draw(st.integers(1, 24))
    column = lambda element: draw(st.lists(element, min_size=size, max_size=size))  # noqa: E731
    scores = torch.tensor(column(st.integers(-40, 40)), dtype=torch.float32) / 8
    return scores, torch.tensor(column(st.booleans())), torch.tensor(column(st.sampled_from([-7, 3, 10**12])))


def everyone(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


# --- group_advantage -------------------------------------------------------------------------------------------------


def test_advantages_match_the_published_implementation():
    golden = load_file(GOLDEN / "grpo_loss.safetensors")
    rewards = golden["rewards"]
    groups = torch.arange(6).repeat_interleave(12)
    advantage, weight, _ = group_advantage(rewards.flatten(), everyone(rewards).flatten(), groups)
    torch.testing.assert_close(advantage.reshape(6, 12), golden["advantages"], atol=1e-6, rtol=0)
    assert weight.tolist() == [1.0] * 72


@pytest.mark.parametrize(("estimator", "correction"), [("unbiased", 1), ("biased", 0)])
@unhurried
@given(batches())
def test_groups_are_standardised_one_by_one(estimator: str, correction: int, batch):
    """Against the definition, group by group, with an eps that shows."""
    scores, valid, groups = batch
    advantage, weight, spread = group_advantage(scores, valid, groups, estimator=estimator, eps=0.1)
    for i, group in enumerate(sorted(set(groups.tolist()))):
        members = (groups == group) & valid
        r = scores[members].double()
        if len(r) < 2:
            assert spread[i].isnan()
            assert weight[groups == group].sum() == 0
            continue
        expected = (r - r.mean()) / (r.std(correction=correction) + 0.1)
        torch.testing.assert_close(advantage[members].double(), expected, atol=1e-6, rtol=1e-6)
        assert weight[members].tolist() == [1.0] * len(r)
        assert spread[i] == r.max() - r.min()
    assert (advantage[~valid] == 0).all()
    assert (weight[~valid] == 0).all()


@unhurried
@given(batches(), st.sampled_from([0.25, 1.0, 8.0]), st.integers(-5, 5))
def test_advantage_ignores_scale_and_shift(batch, scale: float, shift: int):
    scores, valid, groups = batch
    advantage, _, _ = group_advantage(scores, valid, groups)
    moved, _, _ = group_advantage(scores * scale + shift, valid, groups)
    torch.testing.assert_close(moved, advantage, atol=1e-5, rtol=1e-5)


@unhurried
@given(batches(), st.randoms(use_true_random=False))
def test_advantage_moves_with_its_sample(batch, random):
    scores, valid, groups = batch
    order = list(range(len(scores)))
    random.shuffle(order)
    advantage, weight, spread = group_advantage(scores, valid, groups)
    permuted = group_advantage(scores[order], valid[order], groups[order])
    torch.testing.assert_close(permuted[0], advantage[order], atol=1e-6, rtol=1e-6)
    assert torch.equal(permuted[1], weight[order])
    assert torch.equal(permuted[2].nan_to_num(-1), spread.nan_to_num(-1))


@unhurried
@given(batches(), st.sampled_from(["unbiased", "biased", "none"]))
def test_advantages_of_a_group_sum_to_zero(batch, estimator: str):
    scores, valid, groups = batch
    advantage, _, _ = group_advantage(scores, valid, groups, estimator=estimator)
    sums = torch.zeros(3).index_add(0, groups.unique(return_inverse=True)[1], advantage)
    torch.testing.assert_close(sums, torch.zeros(3), atol=1e-4, rtol=0)


@unhurried
@given(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), st.integers(2, 13))
def test_equal_scores_give_exactly_zero_and_keep_their_weight(score: float, size: int):
    """0.1 has no exact float32 mean over 3: rounding over an eps of 1e-8 must not become an advantage."""
    scores = torch.full((size,), score)
    for estimator in ("unbiased", "biased", "none"):
        ids = torch.zeros(size, dtype=torch.int64)
        advantage, weight, spread = group_advantage(scores, everyone(scores), ids, estimator=estimator)
        assert advantage.tolist() == [0.0] * size
        assert weight.tolist() == [1.0] * size
        assert spread.tolist() == [0.0]


def test_a_spread_up_to_min_spread_is_no_signal():
    scores = torch.tensor([0.5, 0.5 + 1e-4, 0.5, 0.75, 0.0, 0.5])
    groups = torch.tensor([1, 1, 2, 2, 3, 3])
    advantage, weight, spread = group_advantage(scores, everyone(scores), groups, min_spread=0.25)
    assert advantage[:4].tolist() == [0.0] * 4
    torch.testing.assert_close(advantage[4:], torch.tensor([-(0.5**0.5), 0.5**0.5]))
    assert weight.tolist() == [1.0] * 6
    assert (spread <= 0.25).tolist() == [True, True, False]


def test_none_centres_without_scaling():
    scores = torch.tensor([1.0, 2.0, 6.0])
    advantage, _, _ = group_advantage(scores, everyone(scores), torch.zeros(3, dtype=torch.int64), estimator="none")
    assert advantage.tolist() == [-2.0, -1.0, 3.0]


def test_a_masked_score_may_be_anything():
    valid = torch.tensor([True, True, True, False])
    ids = torch.zeros(4, dtype=torch.int64)
    clean, _, _ = group_advantage(torch.tensor([1.0, 2.0, 6.0, 0.0]), valid, ids)
    for value in (float("nan"), float("inf"), 1e30):
        advantage, weight, _ = group_advantage(torch.tensor([1.0, 2.0, 6.0, value]), valid, ids)
        assert torch.equal(advantage, clean)
        assert weight.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_a_valid_score_that_is_not_finite_is_refused():
    scores = torch.tensor([1.0, float("nan")])
    with pytest.raises(ValueError, match="not finite"):
        batch_advantage(scores, everyone(scores))


def test_the_whole_batch_as_one_group():
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0])
    advantage, weight, spread = batch_advantage(scores, everyone(scores))
    torch.testing.assert_close(advantage, (scores - scores.mean()) / scores.std(), atol=1e-6, rtol=1e-6)
    assert weight.tolist() == [1.0] * 4
    assert spread.tolist() == [9.0]


# --- combine ---------------------------------------------------------------------------------------------------------


def test_judges_are_summed_by_weight_and_clamped_once():
    """4 * 2 - 4 = 4 stays within 5: clamping each judge before the sum would have given 1."""
    advantages = {"hps": torch.tensor([4.0, 9.0, -9.0]), "clip": torch.tensor([-4.0, 9.0, 0.0])}
    weights = {"clip": 1.0, "hps": 2.0}
    assert combine(advantages, weights, 5.0).tolist() == [4.0, 5.0, -5.0]
    assert combine(advantages, weights, None).tolist() == [4.0, 27.0, -18.0]


@pytest.mark.parametrize("weights", [{"hps": 1.0, "clip": 1.0}, {"clip": 1.0}, {}])
def test_weights_must_name_the_judges_at_hand(weights: dict[str, float]):
    with pytest.raises(ValueError, match="name the same judges"):
        combine({"hps": torch.zeros(2)}, weights, None)


# --- best_of_n -------------------------------------------------------------------------------------------------------


@unhurried
@given(batches(), st.sampled_from([2, 4, 8]))
def test_best_of_n_keeps_the_two_ends_of_every_group(batch, keep: int):
    advantage, valid, groups = batch
    weight = valid.float()
    kept = best_of_n(advantage, weight, groups, keep) > 0
    assert not (kept & ~valid).any()
    for group in groups.unique():
        running = (groups == group) & valid
        inside, outside = advantage[running & kept].sort().values, advantage[running & ~kept]
        assert len(inside) == min(keep, int(running.sum()))
        if len(outside):
            assert inside[: keep // 2].max() <= outside.min()
            assert inside[keep // 2 :].min() >= outside.max()


def test_best_of_n_breaks_ties_by_index_and_keeps_the_weights():
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    kept = best_of_n(torch.zeros(5), weight, torch.zeros(5, dtype=torch.int64), 2)
    assert kept.tolist() == [1.0, 0.0, 0.0, 0.0, 5.0]


@pytest.mark.parametrize("keep", [0, 1, 3, -2])
def test_best_of_n_needs_two_halves(keep: int):
    with pytest.raises(ValueError, match="even and at least 2"):
        best_of_n(torch.zeros(4), torch.ones(4), torch.zeros(4, dtype=torch.int64), keep)
