"""Judges made of judges: frames of clips, thresholds, and raw sums."""

from __future__ import annotations

import threading

import pytest
import torch

from dancegrpo.algorithms.grpo import GRPO
from dancegrpo.config import load_config
from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Binary, Judges, OverFrames, Scores, load_reward
from dancegrpo.rewards.compose import TimeLimit
from dancegrpo.rewards.weights import NetworkReward
from dancegrpo.settings import RewardConfig

PROMPTS = [Prompt(0, "a"), Prompt(1, "b"), Prompt(2, "c")]


class Brightness:
    """Mean of a picture's values; nothing under `darkest` has a score. Remembers the batches it saw."""

    name, differentiable, pictures_only = "brightness", True, True

    def __init__(self, batch_size=None, darkest=0.0):
        self.batch_size, self.darkest, self.seen = batch_size, darkest, []

    def __call__(self, media, prompts):
        assert media.shape[1] == 1
        self.seen.append((len(media), [prompt.text for prompt in prompts]))
        values = media.flatten(1).mean(1)
        scores = Scores(values, torch.ones_like(values, dtype=torch.bool), {"half": values / 2})
        return scores.mask(values < self.darkest, "too dark")

    def to(self, device):
        return self


def clips(*levels):
    """One clip per row of levels, one flat frame per level."""
    return torch.tensor(levels)[:, :, None, None, None].expand(-1, -1, 3, 2, 2).clone()


@pytest.mark.parametrize(("frames", "expected"), [("mean", [0.5, 0.3]), ("worst", [0.2, 0.1]), ("first", [0.8, 0.1])])
def test_a_judge_of_pictures_judges_clips_by_their_frames(frames, expected):
    judged = OverFrames(Brightness(), frames)(clips([0.8, 0.5, 0.2], [0.1, 0.3, 0.5]), PROMPTS[:2])
    torch.testing.assert_close(judged.values, torch.tensor(expected))
    torch.testing.assert_close(judged.extra["half"], torch.tensor(expected) / 2)
    assert judged.valid.all()


def test_frames_come_in_the_judges_batches_each_with_its_prompt():
    judge = Brightness(batch_size=4)
    OverFrames(judge)(clips([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), PROMPTS[:2])
    assert judge.seen == [(4, ["a", "a", "a", "b"]), (2, ["b", "b"])]


def test_a_clip_with_a_frame_that_has_no_score_has_none_and_counts_once():
    judged = OverFrames(Brightness(darkest=0.25))(clips([0.8, 0.1], [0.9, 0.3], [0.2, 0.2]), PROMPTS)
    assert judged.valid.tolist() == [False, True, False]
    assert judged.values.isnan().tolist() == [True, False, True]
    assert judged.causes == {"a frame: too dark": 2}


def test_gradients_reach_every_frame():
    media = clips([0.2, 0.4]).requires_grad_()
    OverFrames(Brightness())(media, PROMPTS[:1]).values.sum().backward()
    torch.testing.assert_close(media.grad, torch.full_like(media, 1 / media.numel()))


def test_a_batch_of_clips_that_fails_takes_no_other_along():
    class Broken(Brightness):
        def __call__(self, media, prompts):
            if "b" in [prompt.text for prompt in prompts]:
                raise RuntimeError("no memory")
            return super().__call__(media, prompts)

    judges = Judges({"bright": OverFrames(Broken(batch_size=1))})
    judged = judges.score(clips([0.1, 0.1], [0.2, 0.2], [0.3, 0.3]), PROMPTS)["bright"]
    assert judged.valid.tolist() == [True, False, True]


def test_a_judge_that_hangs_leaves_its_batch_without_scores_and_answers_again_later():
    go_on = threading.Event()

    class Slow(Brightness):
        def __call__(self, media, prompts):
            assert go_on.wait(20)
            return super().__call__(media, prompts)

    judge, media = TimeLimit(Slow(), 0.05), clips([0.5])
    assert judge(media, PROMPTS[:1]).causes == {"no answer within 0.05 s": 1}
    assert judge(media, PROMPTS[:1]).causes == {"the judge still works on an earlier batch": 1}
    go_on.set()
    judge._hung.join()
    judge.seconds = 20
    assert judge(media, PROMPTS[:1]).values.tolist() == [0.5]


def test_what_a_timed_judge_raises_is_raised():
    class Broken(Brightness):
        def __call__(self, media, prompts):
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        TimeLimit(Broken(), 20)(clips([0.5]), PROMPTS[:1])


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_graph_is_recorded_only_where_the_caller_wants_one(remote, timed, wanted):
    class Learned(torch.nn.Linear):
        name, differentiable, batch_size = "learned", True, None

        def forward(self, media, prompts):
            values = super().forward(media.flatten(1))[:, 0]
            return Scores(values, torch.ones_like(values, dtype=torch.bool))

    judge = Learned(12, 1)
    judge.remote = remote
    with torch.set_grad_enabled(wanted):
        judged = Judges({"l": TimeLimit(judge, 20) if timed else judge}).score(clips([0.5]), PROMPTS[:1])["l"]
    assert judged.values.requires_grad == wanted


def test_judges_that_agree_on_too_few_samples_stop_the_run():
    half = torch.tensor([True, True, True, False, False, False])
    scores = {
        "a": Scores(torch.zeros(6), half, causes={"blurred": 3}),
        "b": Scores(torch.zeros(6), ~half, causes={"dark": 3}),
    }
    with pytest.raises(RewardError, match=r"scored 3 of 6 samples \(all trained judges together 0\)"):
        Judges({"a": Brightness(), "b": Brightness()}).require_valid(scores)
    Judges({"a": Brightness(), "b": Brightness()}, {"a": 1.0, "b": 0.0}).require_valid(scores)


class Network(torch.nn.Module):
    """A body, a head, and a buffer that 16 bits would ruin."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        self.register_buffer("frequencies", torch.tensor([1.0, 1e-6]))


def test_a_number_format_is_of_weights_but_not_of_buffers_nor_of_what_stays_precise():
    network, bias = Network(), torch.tensor([5.0123])
    network.head.bias = torch.nn.Parameter(bias.clone())

    class Judge(NetworkReward):
        name = "judge"

    judge = Judge(network, batch_size=1, dtype="bfloat16", full_precision="head")
    assert judge.model.body.weight.dtype == torch.bfloat16
    assert judge.model.frequencies.tolist() == pytest.approx([1.0, 1e-6])
    assert judge.model.head.bias.equal(bias)
    assert not any(parameter.requires_grad for parameter in judge.model.parameters())


def test_a_threshold_makes_scores_zero_or_one_and_keeps_them():
    judged = Binary(Brightness(darkest=0.2), 0.5)(clips([0.5], [0.49], [0.1]), PROMPTS)
    assert judged.values[:2].tolist() == [1.0, 0.0]
    assert judged.values[2].isnan()
    assert judged.valid.tolist() == [True, True, False]
    torch.testing.assert_close(judged.extra["raw"][:2], torch.tensor([0.5, 0.49]))
    assert judged.causes == {"too dark": 1}


def test_a_recipe_names_frames_and_threshold(monkeypatch):
    monkeypatch.setattr("dancegrpo.rewards.loading._resolve", lambda judge: Brightness)
    bright = load_reward("bright", RewardConfig(judge="m:f", frames="worst", threshold=0.15))
    assert bright(clips([0.8, 0.2], [0.9, 0.1]), PROMPTS[:2]).values.tolist() == [1.0, 0.0]


def test_a_judge_of_pictures_sees_the_mean_frame_where_the_recipe_is_silent(monkeypatch):
    monkeypatch.setattr("dancegrpo.rewards.loading._resolve", lambda judge: Brightness)
    bright = load_reward("bright", RewardConfig(judge="m:f"))
    torch.testing.assert_close(bright(clips([0.8, 0.2]), PROMPTS[:1]).values, torch.tensor([0.5]))


def test_an_unknown_choice_of_frames_is_refused():
    with pytest.raises(RewardError, match="mean, worst or first"):
        OverFrames(Brightness(), "last")


def test_raw_scores_are_summed_by_weight_and_normalised_once():
    config = load_config(
        "shapes-flux",
        ["advantage.combine=scores", "rewards={shapes: null, a: {judge: 'm:a', weight: 2}, b: {judge: 'm:b'}}"],
    )
    a, b, group = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 13.0]), torch.arange(6.0), torch.tensor([0, 0, 0, 1, 1, 1])
    known = torch.ones(6, dtype=torch.bool)
    advantage = GRPO(config).advantage({"a": Scores(a, known), "b": Scores(b, known)}, group)
    total = (2 * a + b).view(2, 3)
    expected = (total - total.mean(1, keepdim=True)) / total.std(1, keepdim=True)
    torch.testing.assert_close(advantage.value, expected.flatten())


def test_a_sample_that_one_judge_failed_on_leaves_the_sum_of_raw_scores():
    config = load_config(
        "shapes-flux", ["advantage.combine=scores", "rewards={shapes: null, a: {judge: 'm:a'}, b: {judge: 'm:b'}}"]
    )
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, torch.nan, 5.0])
    scores = {"a": Scores(a, torch.ones(3, dtype=torch.bool)), "b": Scores(b, ~b.isnan())}
    advantage = GRPO(config).advantage(scores, torch.zeros(3, dtype=torch.int64))
    assert advantage.weight.tolist() == [1, 0, 1]
    assert advantage.value[0] == -advantage.value[2] != 0
