"""Settings of algorithms that do not fit together: each refused in one line that names what to change."""

import pytest

from dancegrpo.errors import ConfigError
from toy import toy_config

OWN = {"ddpo": "buffer_size=40", "dpok": "value_steps=1", "refl": "margin=1", "dpo": "draws=1", "nft": "draws=1"}
NAMES = ("grpo", *OWN)
SHARED = {
    "clip_range=0.2": ("grpo", "ddpo", "dpok"),
    "log_prob_reduction=sum": ("grpo", "ddpo", "dpok"),
    "kl_weight=0.1": ("grpo", "ddpo"),
    "guard=true": ("grpo",),
}
READERS = SHARED | {f"{key}.{setting}": (key,) for key, setting in OWN.items()}


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        toy_config(name, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("setting", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_setting_is_taken_by_its_readers_and_refused_by_the_others(name, setting):
    if name in READERS[setting]:
        toy_config(name, f"algorithm.{setting}")
        return
    key = setting.split("=")[0].split(".")[0]
    known = " or ".join(READERS[setting])
    told = refusal(name, f"algorithm.{setting}")
    assert told == f"algorithm.{key} is only read with algorithm.name={known}, not {name}: leave it at its default"


@pytest.mark.parametrize("name", ["grpo", "dpo", "nft"])
def test_a_group_of_one_is_no_baseline(name):
    assert refusal(name, "rollout.group_size=1").startswith("rollout.group_size=1 leaves a group without a baseline")


@pytest.mark.parametrize("name", ["ddpo", "dpok", "refl"])
def test_where_the_group_is_no_baseline_it_may_be_one(name):
    assert toy_config(name, "rollout.group_size=1").rollout.group_size == 1


def test_pairs_of_a_file_need_neither_groups_nor_judges():
    config = toy_config("dpo", "algorithm.dpo.source=offline", "rollout.group_size=1", "rewards.bright=null")
    assert config.offline


@pytest.mark.parametrize("name", NAMES)
def test_best_of_n_is_for_grpo_and_nft(name):
    if name in ("grpo", "nft"):
        assert toy_config(name, "advantage.keep=2").advantage.keep == 2
    else:
        told = refusal(name, "advantage.keep=2")
        assert told == f"advantage.keep=2 is only read with algorithm.name=grpo or nft, not {name}: unset it"


@pytest.mark.parametrize("name", ["ddpo", "dpok", "refl"])
def test_a_baseline_of_its_own_takes_no_other(name):
    told = refusal(name, "advantage.normalization=batch")
    assert told.startswith(
        f"advantage.normalization=batch is not read with algorithm.name={name}, which has no such baseline"
    )


@pytest.mark.parametrize("name", NAMES)
def test_without_noise_there_is_no_ratio(name):
    if name in ("grpo", "ddpo", "dpok"):
        assert refusal(name, "rollout.noise_level=0").startswith(
            "rollout.noise_level=0.0 makes every step deterministic"
        )
    else:
        assert not any(toy_config(name, "rollout.noise_level=0").rollout.noise_levels())


def test_noise_in_the_last_step_alone_trains_only_with_that_step():
    last = "rollout.noise_level=[0,0,0,0,0,0.5]"
    assert "makes every step deterministic" in refusal("ddpo", last)
    toy_config("ddpo", last, "rollout.timesteps.include_last=true")


@pytest.mark.parametrize("name", ["dpo", "nft", "refl"])
def test_equal_starts_without_noise_draw_equal_samples(name):
    told = refusal(name, "rollout.noise_level=0", "rollout.shared_noise=true")
    assert told.startswith("rollout.shared_noise=true with rollout.noise_level=0.0 draws a group of equal samples")
    offline = "algorithm.dpo.source=offline"
    toy_config("dpo", "rollout.noise_level=0", "rollout.shared_noise=true", offline)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("grpo", "rollout.group_size=4"),
        ("nft", "rollout.group_size=4"),
        ("dpo", "prompts.per_iteration=3"),
        ("ddpo", "prompts.per_iteration x rollout.group_size=12"),
        ("dpok", "prompts.per_iteration x rollout.group_size=12"),
        ("refl", "prompts.per_iteration x rollout.group_size=12"),
    ],
)
def test_a_rollout_is_dealt_in_equal_parts(name, what):
    told = refusal(name, "update.updates_per_rollout=5")
    assert told == f"update.updates_per_rollout=5 does not divide {what}: use a divisor of it"


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_of_best_of_n_the_kept_ones_are_dealt(name):
    told = refusal(name, "update.updates_per_rollout=4", "advantage.keep=2")
    assert told == "update.updates_per_rollout=4 does not divide advantage.keep=2: use a divisor of it"


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("ddpo", ["algorithm.ddpo.buffer_size=8"], "algorithm.ddpo.buffer_min=16 is never reached with buffer_size=8"),
        ("nft", ["algorithm.nft.old_decay=1"], "algorithm.nft.old_decay=1 must be less than 1"),
        ("refl", ["algorithm.refl.window=0"], "algorithm.refl.window=0 must be greater than 0"),
        ("dpo", ["algorithm.dpo.source=both"], "algorithm.dpo.source='both' must be 'online' or 'offline'"),
        ("sac", [], "algorithm.name='sac' must be 'grpo', 'ddpo', 'dpok', 'refl', 'dpo' or 'nft'"),
        (
            "grpo",
            ["rollout.timesteps={select: window, window: 6, stochastic: trained}"],
            "rollout.timesteps.window=6 is wider than the 5 trainable steps",
        ),
        ("grpo", ["rollout.timesteps.select=window"], "rollout.timesteps.stochastic=all adds noise outside the window"),
        (
            "grpo",
            ["rollout.timesteps={select: list, steps: [5]}"],
            "rollout.timesteps.steps=[5] must name at least one of the steps 0..4",
        ),
        ("ddpo", ["rollout.timesteps={select: list, steps: [6], include_last: true}"], "rollout.timesteps.steps=[6]"),
    ],
)
def test_a_value_that_cannot_be_is_named(name, overrides, expected):
    assert refusal(name, *overrides).startswith(expected)


def test_the_pairs_of_dpo_know_no_clamp() -> None:
    assert refusal("dpo", "advantage.clamp=3").startswith("advantage.clamp=3.0 is not read with algorithm.name=dpo")


@pytest.mark.parametrize("name", ["dpok", "refl"])
@pytest.mark.parametrize("setting", ["clamp=3", "estimator=biased", "eps=0.1", "combine=scores", "min_spread=1"])
def test_raw_rewards_are_not_normalised(name: str, setting: str) -> None:
    key, _, value = setting.partition("=")
    told = refusal(name, f"advantage.{setting}")
    assert told.startswith(f"advantage.{key}=")
    assert f"is not read with algorithm.name={name}" in told


@pytest.mark.parametrize("setting", ["window=2", "stride=2", "slide_every=3"])
def test_a_window_is_only_read_where_it_slides(setting: str) -> None:
    told = refusal("grpo", f"rollout.timesteps.{setting}")
    assert told.startswith(f"rollout.timesteps.{setting} is only read with timesteps.select=window")
