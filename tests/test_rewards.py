"""Judges: a user's function, the panel, and loading by name."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import FunctionReward, Judges, Reward, Scores, load_judges, load_reward
from dancegrpo.settings import RewardConfig


def pictures(size, frames=1):
    """Sample i is uniformly i/10."""
    return (torch.arange(size) / 10).view(-1, 1, 1, 1, 1).expand(size, frames, 3, 4, 5).clone()


def prompts(size):
    return [Prompt(i, f"prompt {i}") for i in range(size)]


def brightness(images, prompts):
    return images.flatten(1).mean(1)


@dataclass
class Meter:
    """A native judge: brightness, in batches of its own, failing on request."""

    name: str = "meter"
    differentiable: bool = True
    batch_size: int | None = 3
    fail_on: str = ""
    sizes: list = field(default_factory=list)

    def __call__(self, media, prompts):
        self.sizes.append(len(media))
        assert bool(media.isfinite().all())
        if self.fail_on in [prompt.text for prompt in prompts]:
            raise RuntimeError("lens cap on\nsecond line")
        values = media.flatten(1).mean(1)
        return Scores(values, torch.ones_like(values, dtype=torch.bool), {"bright": values > 0.45})

    def to(self, device):
        return self


def needs_two(first, second=2):
    raise AssertionError("never called")


class Biased:
    """A user's class: options in, a callable out."""

    def __init__(self, bias):
        self.bias = float(bias)

    def __call__(self, images, prompts):
        return brightness(images, prompts) + self.bias


class Grumpy:
    def __init__(self):
        raise OSError("no licence found\nfor this machine")


def scaled(images, prompts, factor=1.0):
    return factor * brightness(images, prompts)


METER = Meter()


# A user's function


@pytest.mark.parametrize(("frames", "shape"), [(1, (2, 3, 4, 5)), (6, (2, 6, 3, 4, 5))])
def test_a_function_sees_pictures_without_a_frame_axis_and_plain_strings(frames, shape):
    seen = []
    FunctionReward(lambda images, texts: seen.append((tuple(images.shape), texts)) or [0, 1])(
        pictures(2, frames), prompts(2)
    )
    assert seen == [(shape, ["prompt 0", "prompt 1"])]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array, lambda v: torch.tensor(v).double()[:, None]])
def test_lists_tensors_and_arrays_of_numbers_are_scores(kind):
    scores = FunctionReward(lambda images, texts: kind([0.5, -2.0, 3.0]))(pictures(3), prompts(3))
    assert scores.values.tolist() == [0.5, -2.0, 3.0]
    assert scores.values.dtype == torch.float32
    assert scores.valid.all()


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_sample_without_a_finite_number_is_masked_alone(nothing):
    scores = FunctionReward(lambda images, texts: [1.0, nothing, 3.0])(pictures(3), prompts(3))
    assert scores.valid.tolist() == [True, False, True]
    assert scores.values[[0, 2]].tolist() == [1.0, 3.0]
    assert scores.values[1].isnan()
    assert sum(scores.causes.values()) == 1


@pytest.mark.parametrize(
    "output",
    [None, 0.5, "12", {0: 1.0, 1: 2.0}, [1.0], [1.0, 2.0, 3.0], ["good", "bad"], torch.zeros(2, 2), [[1, 2], [3, 4]]],
)
def test_an_output_that_is_not_one_number_per_image_masks_the_batch(output):
    scores = FunctionReward(lambda images, texts: output)(pictures(2), prompts(2))
    assert scores.valid.tolist() == [False, False]
    assert scores.values.isnan().all()
    assert list(scores.causes.values()) == [2]


def test_an_exception_masks_the_batch_and_is_told_in_one_line():
    def judge(images, texts):
        raise KeyError("colour")

    scores = FunctionReward(judge)(pictures(2), prompts(2))
    assert not scores.valid.any()
    [(cause, count)] = scores.causes.items()
    assert cause.startswith("KeyError: 'colour' (test_rewards.py:")
    assert count == 2


def test_an_interrupt_is_not_a_failed_judge():
    def judge(images, texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Judges({"mine": FunctionReward(judge)}).score(pictures(2), prompts(2))


def test_a_function_that_writes_into_its_images_leaves_the_media_alone():
    media = pictures(2)
    FunctionReward(lambda images, texts: images.mul_(255).flatten(1).mean(1))(media, prompts(2))
    assert torch.equal(media, pictures(2))


# The panel


def test_a_judge_gets_batches_of_its_size_and_the_order_is_kept():
    small, whole = Meter(batch_size=3), Meter(batch_size=None)
    scores = Judges({"small": small, "whole": whole}).score(pictures(7), prompts(7))
    assert (small.sizes, whole.sizes) == ([3, 3, 1], [7])
    torch.testing.assert_close(scores["small"].values, torch.arange(7) / 10)
    torch.testing.assert_close(scores["small"].values, scores["whole"].values)
    assert scores["small"].extra["bright"].tolist() == [False] * 5 + [True] * 2


def test_a_failing_batch_is_masked_and_the_others_count(caplog):
    judges = Judges({"meter": Meter(batch_size=2, fail_on="prompt 3")})
    with caplog.at_level(logging.WARNING):
        scores = judges.score(pictures(6), prompts(6))["meter"]
        judges.score(pictures(6), prompts(6))
    assert scores.valid.tolist() == [True, True, False, False, True, True]
    torch.testing.assert_close(scores.values[scores.valid], torch.tensor([0.0, 0.1, 0.4, 0.5]))
    assert scores.extra["bright"].tolist() == [False, False, False, False, False, True]
    assert list(scores.causes.values()) == [2]
    [record] = caplog.records  # the first failure only
    assert "judge 'meter': 2 of 6 samples have no score: RuntimeError: lens cap on (" in record.message


@pytest.mark.parametrize("pixel", [float("nan"), float("inf"), -0.01, 1.01])
def test_a_sample_with_broken_pixels_is_masked_for_every_judge(pixel):
    media = pictures(4)
    media[2, 0, 1, 3, 0] = pixel
    scores = Judges({"native": Meter(), "function": FunctionReward(brightness)}).score(media, prompts(4))
    for verdict in scores.values():
        assert verdict.valid.tolist() == [True, True, False, True]
        torch.testing.assert_close(verdict.values[verdict.valid], torch.tensor([0.0, 0.1, 0.3]))
        assert list(verdict.causes.values()) == [1]


@pytest.mark.parametrize(
    "answer",
    [
        torch.zeros(2),
        Scores(torch.zeros(3), torch.ones(3, dtype=torch.bool)),
        Scores(torch.zeros(2), torch.ones(1, dtype=torch.bool)),
        Scores(torch.zeros(2), torch.ones(2, dtype=torch.bool), {"pass": torch.ones(5)}),
        Scores(torch.full((2,), torch.nan), torch.ones(2, dtype=torch.bool)),
        Scores(torch.ones(2), torch.zeros(2, dtype=torch.bool)),
    ],
)
def test_a_native_judge_that_breaks_the_contract_gets_no_number_through(answer):
    class Broken(Meter):
        def __call__(self, media, prompts):
            return answer

    scores = Judges({"broken": Broken()}).score(pictures(2), prompts(2))["broken"]
    assert scores.values.shape == (2,)
    assert scores.values.isnan().all()
    assert not scores.valid.any()
    assert sum(scores.causes.values()) == 2


def test_bytes_and_their_floats_score_the_same():
    media = torch.randint(0, 256, (3, 1, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    judges = Judges({"meter": Meter()})
    floats = judges.score(media.float() / 255, prompts(3))["meter"].values
    assert torch.equal(judges.score(media, prompts(3))["meter"].values, floats)
    torch.testing.assert_close(floats, media.double().flatten(1).mean(1).div(255).float())


@pytest.mark.parametrize(
    "media", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4, 3), torch.zeros(2, 1, 3, 4, 4).int()]
)
def test_media_of_another_shape_or_type_are_refused(media):
    with pytest.raises(RewardError, match="cannot be judged: give"):
        Judges({"meter": Meter()}).score(media, prompts(2))


def test_gradients_reach_the_media_through_a_differentiable_judge():
    media = pictures(5).requires_grad_()
    Judges({"meter": Meter(batch_size=2)}).score(media, prompts(5))["meter"].values.sum().backward()
    torch.testing.assert_close(media.grad, torch.full_like(media, 1 / 60))


def test_no_samples_give_no_scores():
    scores = Judges({"meter": Meter()}).score(pictures(0), [])["meter"]
    assert (len(scores), scores.causes) == (0, {})


def half_valid(num_valid, total=6):
    valid = torch.arange(total) < num_valid
    return Scores(torch.zeros(total), valid, causes={"rare": 1, "no answer": total - num_valid - 1})


def test_an_iteration_needs_half_of_its_samples_scored_by_each_trained_judge():
    judges = Judges({"trained": Meter(), "measured": Meter()}, {"trained": 2.0, "measured": 0.0})
    assert judges.trained == ("trained",)
    judges.require_valid({"trained": half_valid(3), "measured": half_valid(0)})
    with pytest.raises(RewardError, match=r"^judge 'trained' scored 2 of 6 samples, .* 50%: .*\(no answer\)\.$"):
        judges.require_valid({"trained": half_valid(2), "measured": half_valid(6)})


def test_every_judge_has_one_weight():
    with pytest.raises(RewardError, match="differ in b"):
        Judges({"a": Meter()}, {"a": 1.0, "b": 1.0})


# Loading by name


def load(judge, **options):
    return load_reward("mine", RewardConfig(judge=judge, options=options))


def test_a_dotted_path_to_a_function_is_wrapped_with_its_options():
    reward = load("test_rewards:scaled", factor=-2, batch_size=4)
    assert isinstance(reward, Reward)
    assert (reward.name, reward.batch_size, reward.differentiable) == ("mine", 4, False)
    torch.testing.assert_close(reward(pictures(3), prompts(3)).values, torch.tensor([0.0, -0.2, -0.4]))


def test_a_class_is_built_with_its_options():
    reward = load("test_rewards:Biased", bias=1)
    torch.testing.assert_close(reward(pictures(2), prompts(2)).values, torch.tensor([1.0, 1.1]))
    assert isinstance(load("test_rewards:Meter", batch_size=5), Meter)


def test_an_object_that_is_a_reward_is_used_as_it_is():
    import test_rewards

    assert load("test_rewards:METER") is test_rewards.METER


def test_a_file_in_the_current_folder_can_be_the_judge(tmp_path, monkeypatch):
    (tmp_path / "my_own_judge.py").write_text("def judge(images, prompts):\n    return [len(p) for p in prompts]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *sys.path])
    reward = load("my_own_judge:judge")
    assert reward(pictures(2), [Prompt(0, "abc"), Prompt(1, "")]).values.tolist() == [3, 0]


def test_a_panel_takes_names_and_weights_from_the_recipe():
    judges = load_judges(
        {
            "light": RewardConfig(judge="test_rewards:brightness", weight=0.5),
            "held_out": RewardConfig(judge="test_rewards:Meter", weight=0),
        }
    )
    assert judges.weights == {"light": 0.5, "held_out": 0}
    assert judges.trained == ("light",)


@pytest.mark.parametrize(
    ("judge", "options", "message"),
    [
        ("shape", {}, r"'shape' is unknown \(did you mean 'shapes'\?\): use .*hps.*, or package.module:function"),
        ("zzz", {}, r"'zzz' is unknown: use aesthetic, appearance, clip"),
        ("no_such_package:judge", {}, r"cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("test_rewards:brightnes", {}, r"has no 'brightnes' \(did you mean 'brightness'\?\)"),
        ("test_rewards:", {}, r"has no ''"),
        ("test_rewards:Biased", {}, r"missing a required argument: 'bias'; its options are: bias\."),
        ("test_rewards:Biased", {"bias": "much"}, r"could not be built: ValueError: could not convert"),
        ("test_rewards:scaled", {"factr": 2}, r"unexpected keyword argument 'factr'; its options are: factor\."),
        ("test_rewards:needs_two", {"third": 2}, r"unexpected keyword argument 'third'"),
        ("test_rewards:scaled", {"batch_size": 0}, r"batch_size=0: use a whole number"),
        ("test_rewards:METER", {"batch_size": 2}, r"already built: remove its options batch_size"),
        ("test_rewards:Grumpy", {}, r"could not be built: OSError: no licence found \("),
        ("math:pi", {}, r"is a float: name a function"),
        ("hps", {"wieghts": "x"}, r"'wieghts'; its options are: weights, tokenizer"),
        ("hps", {"weights": "/nowhere/hps.pt"}, r"'/nowhere/hps.pt' do not exist"),
        ("hps", {"dtype": "int8"}, r"dtype='int8' of the hps judge is unknown: use float32"),
    ],
)
def test_a_judge_that_cannot_be_loaded_is_refused_in_one_line(judge, options, message):
    with pytest.raises(RewardError, match=message) as refused:
        load(judge, **options)
    assert "\n" not in str(refused.value)
