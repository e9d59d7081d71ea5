import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.algorithms import GRPO, Advantage, Learning, gather
from dancegrpo.algorithms.work import Part, deal
from dancegrpo.config import load_config
from dancegrpo.distributed import ALONE, World
from dancegrpo.errors import ModelError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores
from dancegrpo.update import Updater
from toy import ToyPolicy

PROMPTS = [Prompt(i, "word" * (i + 1)) for i in range(3)]


def run_config(**overrides):
    base = {
        "name": "toy",
        "model": {"path": "toy"},
        "prompts": {"train": "none.txt", "per_iteration": 3},
        "rewards": {"bright": {"judge": "python:bright"}},
        "rollout": {"group_size": 4, "num_steps": 6, "noise_level": 0.5, "timesteps": {"fraction": 0.8}},
        "optimizer": {"learning_rate": 1e-3},
        "update": {"micro_batch_size": 7},
    }
    return load_config(base, [f"{key}={value}" for key, value in overrides.items()])


def prepared(config, seed=0):
    policy = ToyPolicy(seed=seed)
    algorithm = GRPO(config)
    if algorithm.needs_reference:
        policy.keep_reference()
    updater = Updater(policy, config)
    trajectory = algorithm.collect(policy, policy.encode(PROMPTS), 0)
    values = policy.decode(trajectory.x0, trajectory.condition).mean(dim=(1, 2, 3, 4)).detach()
    return policy, algorithm, updater, trajectory, values


def advantage_of(algorithm, trajectory, values, valid=None):
    valid = torch.ones(len(values), dtype=torch.bool) if valid is None else valid
    return algorithm.advantage({"bright": Scores(values, valid)}, trajectory.group)


def paper_loss(policy, trajectory, advantage, samples):
    """Mean over samples of mean over steps of max(-A ratio, -A clip(ratio)), written out one pair at a time."""
    total = 0.0
    for i in samples:
        for k in range(trajectory.step.shape[1]):
            row = slice(i, i + 1)
            condition = trajectory.condition[trajectory.group[row]]
            velocity = policy.predict(trajectory.x_t[row, k], trajectory.step[row, k], condition)
            step, level = trajectory.step[row, k], trajectory.noise_level[row, k]
            gaussian = policy.dynamics.transition(trajectory.x_t[row, k], velocity, step, level)
            normal = torch.distributions.Normal(gaussian.mean, gaussian.std.reshape(-1, 1))
            ratio = (normal.log_prob(trajectory.x_next[row, k]).mean() - trajectory.log_prob[i, k]).exp()
            a = advantage.value[i]
            total = total + torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-4, 1 + 1e-4)) / trajectory.step.shape[1]
    return total / len(samples)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 48])
def test_the_accumulated_gradient_is_the_papers_whatever_the_micro_batch(micro_batch_size):
    config = run_config(**{"update.micro_batch_size": micro_batch_size})
    policy, algorithm, updater, trajectory, values = prepared(config)
    advantage = advantage_of(algorithm, trajectory, values)
    expected = torch.autograd.grad(
        paper_loss(policy, trajectory, advantage, range(12)), list(policy.trainable().values())
    )
    learning = algorithm.learning(policy, trajectory, advantage)
    updater.accumulate(learning.parts[0], learning)
    for parameter, gradient in zip(policy.trainable().values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-7, rtol=1e-4)


def test_zero_advantage_pairs_are_skipped_yet_stay_in_the_denominator():
    policy, algorithm, updater, trajectory, values = prepared(run_config())
    values[:4] = 0.5
    advantage = advantage_of(algorithm, trajectory, values)
    part = algorithm.learning(policy, trajectory, advantage).parts[0]
    assert len(part.sample) == 8 * 4
    assert part.scale == 1 / (12 * 4)
    assert advantage.silent.tolist() == [True, False, False]


def test_masked_samples_leave_the_denominator():
    policy, algorithm, updater, trajectory, values = prepared(run_config())
    valid = torch.ones(12, dtype=torch.bool)
    valid[[0, 5]] = False
    advantage = advantage_of(algorithm, trajectory, values, valid)
    part = algorithm.learning(policy, trajectory, advantage).parts[0]
    assert part.scale == 1 / (10 * 4)
    assert not {0, 5} & set(part.sample.tolist())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40), st.integers(1, 4))
def test_dealing_is_disjoint_complete_and_even(rows, num_parts):
    group, weight = torch.tensor([g for g, _ in rows]), torch.tensor([float(w) for _, w in rows])
    part = deal(group, weight, num_parts)
    assert torch.equal(part >= 0, weight > 0)
    for g in group.unique():
        counts = part[(group == g) & (weight > 0)].bincount(minlength=num_parts)
        assert counts.max() - counts.min() <= 1


def test_the_first_ratio_is_exactly_one_and_the_second_update_uses_the_rollouts():
    config = run_config(**{"update.updates_per_rollout": 2})
    policy, algorithm, updater, trajectory, values = prepared(config)
    metrics = updater.update(algorithm.learning(policy, trajectory, advantage_of(algorithm, trajectory, values)))
    assert metrics["train/ratio_first"] == 1.0
    assert metrics["train/ratio_max_deviation"] > 0
    assert metrics["train/updates"] == 2
    assert metrics["train/replay_difference"] < 1e-6


def test_an_update_raises_the_probability_of_what_was_rewarded():
    config = run_config(**{"optimizer.learning_rate": 1e-4})
    policy, algorithm, updater, trajectory, values = prepared(config)
    advantage = advantage_of(algorithm, trajectory, values)
    before = algorithm_log_prob(policy, algorithm, trajectory, advantage)
    updater.update(algorithm.learning(policy, trajectory, advantage))
    gain = (algorithm_log_prob(policy, algorithm, trajectory, advantage) - before).mean(dim=1)
    assert (gain * advantage.value).mean() > 0


def algorithm_log_prob(policy, algorithm, trajectory, advantage):
    sample, slot = (index.flatten() for index in torch.meshgrid(torch.arange(12), torch.arange(4), indexing="ij"))
    with torch.no_grad():
        return algorithm.log_prob(policy, gather(trajectory, advantage, sample, slot, None)).reshape(12, 4)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    policy, algorithm, updater, trajectory, values = prepared(run_config(**{"advantage.clamp": "null"}))
    advantage = advantage_of(algorithm, trajectory, values)
    broken = Advantage(advantage.value * float("inf"), advantage.weight, advantage.valid, {}, advantage.silent)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    metrics = updater.update(algorithm.learning(policy, trajectory, broken))
    assert metrics["train/skipped_updates"] == 1
    assert metrics["train/updates"] == 0
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())


def test_a_rollout_without_signal_makes_no_update():
    policy, algorithm, updater, trajectory, values = prepared(run_config())
    metrics = updater.update(
        algorithm.learning(policy, trajectory, advantage_of(algorithm, trajectory, torch.ones(12)))
    )
    assert metrics["train/updates"] == 0
    assert metrics["train/weight_change"] == 0
    assert metrics["train/grad_norm"] is None


def test_a_schedule_shifted_by_one_step_is_refused():
    policy, algorithm, updater, trajectory, values = prepared(run_config())
    shifted = copy.copy(trajectory)
    object.__setattr__(shifted, "step", trajectory.step + 1)
    with pytest.raises(ModelError, match="misses the rollout's log-probs"):
        updater.update(algorithm.learning(policy, shifted, advantage_of(algorithm, trajectory, values)))


def test_kl_pulls_towards_the_start():
    def drift(weight):
        config = run_config(**{"algorithm.kl_weight": weight, "optimizer.learning_rate": 3e-3})
        policy, algorithm, updater, trajectory, values = prepared(config)
        advantage = advantage_of(algorithm, trajectory, values)
        for _ in range(20):
            metrics = updater.update(algorithm.learning(policy, trajectory, advantage))
            trajectory = algorithm.collect(policy, policy.encode(PROMPTS), 0)
        return metrics["train/weight_change"], metrics["train/kl"]

    free, pulled = drift(1e-9), drift(100.0)
    assert pulled[1] < 0.5 * free[1]


def test_kl_is_zero_at_the_start_and_trains_silent_groups_too():
    policy, algorithm, updater, trajectory, values = prepared(run_config(**{"algorithm.kl_weight": 1.0}))
    values[:4] = 0.5
    metrics = updater.update(algorithm.learning(policy, trajectory, advantage_of(algorithm, trajectory, values)))
    assert metrics["train/kl"] == 0
    assert metrics["pairs/trained"] == 48


def test_the_moving_average_follows_its_closed_form():
    policy, algorithm, updater, trajectory, values = prepared(run_config(**{"ema.decay": 0.9}))
    advantage, name = advantage_of(algorithm, trajectory, values), "0.weight"
    expected = policy.trainable()[name].detach().clone()
    for _ in range(3):
        updater.update(algorithm.learning(policy, trajectory, advantage))
        expected = 0.9 * expected + 0.1 * policy.trainable()[name].detach()
        trajectory = algorithm.collect(policy, policy.encode(PROMPTS), 0)
    torch.testing.assert_close(updater.ema[name], expected)


def test_warm_up_is_linear():
    config = run_config(**{"optimizer.warmup_updates": 4, "optimizer.learning_rate": 0.004})
    policy, algorithm, updater, trajectory, values = prepared(config)
    advantage, rates = advantage_of(algorithm, trajectory, values), []
    for _ in range(5):
        rates.append(updater._learning_rate())
        updater.update(algorithm.learning(policy, trajectory, advantage))
        trajectory = algorithm.collect(policy, policy.encode(PROMPTS), 0)
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004])


def test_weights_by_judge_add_normalised_advantages():
    config = run_config()
    both = config.model_copy(update={"rewards": {"a": config.rewards["bright"], "b": config.rewards["bright"]}})
    a, b, group = torch.randn(8), 100 * torch.randn(8), torch.arange(2).repeat_interleave(4)
    valid = torch.ones(8, dtype=torch.bool)
    value = GRPO(both).advantage({"a": Scores(a, valid), "b": Scores(b, valid)}, group).value

    def normal(x):
        x = x.reshape(2, 4)
        return ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-8)).flatten()

    torch.testing.assert_close(value, normal(a) + normal(b))


def test_a_sample_that_one_judge_failed_on_is_not_trained():
    config = run_config()
    both = config.model_copy(update={"rewards": {"a": config.rewards["bright"], "b": config.rewards["bright"]}})
    valid = torch.ones(8, dtype=torch.bool)
    broken = valid.clone()
    broken[3] = False
    group = torch.arange(2).repeat_interleave(4)
    weight = (
        GRPO(both).advantage({"a": Scores(torch.randn(8), valid), "b": Scores(torch.randn(8), broken)}, group).weight
    )
    assert weight.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


@given(st.integers(1, 5), st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_micro_batches_hold_every_pair_once_and_never_mix_buckets(size, names):
    """Two networks (Wan 2.2) share no forward pass."""
    learning = Learning(ALONE)
    learning.bucket, learning.owner = torch.tensor(names)[:, None], torch.zeros(len(names), dtype=torch.int64)
    part = Part(torch.arange(len(names)), torch.zeros(len(names), dtype=torch.int64), len(names))
    told = list(learning.micro_batches(part, size))
    batches = [batch.sample for batch in told]
    assert all(batch.counts for batch in told)
    assert [batch.bucket for batch in told if batch.last] == sorted(set(names))
    assert sorted(torch.cat(batches).tolist()) == list(range(len(names)))
    assert all(len(batch) <= size and len(learning.bucket[batch].unique()) == 1 for batch in batches)


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=30),
    st.integers(2, 4),
)
def test_ranks_that_forward_together_make_equally_many_micro_batches_of_each_bucket(size, rows, ranks):
    """Whatever was masked, skipped or left out: sharded weights would wait for ever for a rank that makes fewer."""
    bucket = torch.tensor([name for name, _ in rows])[:, None]
    listed = torch.tensor([active for _, active in rows]).nonzero()[:, 0]
    part = Part(listed, torch.zeros_like(listed), len(rows))
    owner = torch.arange(len(rows)) * ranks // len(rows)
    told = []
    for rank in range(ranks):
        learning = Learning(World(rank=rank, size=ranks, fsdp=ranks))
        learning.bucket, learning.owner = bucket, owner
        if not (owner == rank).any():
            return  # refused before a run starts
        told.append(list(learning.micro_batches(part, size)))
    assert len({len(batches) for batches in told}) == 1
    assert len({tuple((batch.bucket, batch.last) for batch in batches) for batches in told}) == 1
    done = torch.cat([torch.empty(0, dtype=torch.int64)] + [b.sample for own in told for b in own if b.counts])
    assert sorted(done.tolist()) == listed.tolist()
    for rank, batches in enumerate(told):
        assert all((owner[batch.sample] == rank).all() for batch in batches)


def test_a_rank_without_any_item_keeps_the_others_company_with_one_of_theirs():
    """Pairs of preferences are on all ranks: of one pair, the second of two sharded ranks has none."""
    learning = Learning(World(rank=1, size=2, fsdp=2))
    learning.bucket, learning.owner = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    item = torch.zeros(1, dtype=torch.int64)
    (batch,) = learning.micro_batches(Part(item, item, 1), size=4)
    assert (batch.sample.tolist(), batch.slot.tolist(), batch.counts, batch.last) == ([0], [0], False, True)
