from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.config import RunConfig, diff_configs, dump_config, list_recipes, load_config
from dancegrpo.errors import ConfigError
from dancegrpo.recipes import merge
from dancegrpo.settings import RewardConfig

MINIMAL = {
    "name": "mine",
    "model": {"path": "folder"},
    "prompts": {"train": "p.txt"},
    "rewards": {"r": {"judge": "shapes"}},
}

# The published runs, from the paper's appendix and the published scripts: model, picture side in pixels, steps T,
# shift, eta, guidance, prompts per GPU, GPUs, group size, updates per rollout, learning rate, max gradient norm,
# timestep fraction, iterations, EMA decay, (LoRA rank, alpha).
FLUX, SD = "black-forest-labs/FLUX.1-dev", "CompVis/stable-diffusion-v1-4"
PUBLISHED = {
    "sd14-hps": (SD, 512, 50, None, 1.0, 5.0, 4, 8, 16, 2, 1e-5, 1.0, 1.0, 300, None, None),
    "flux-hps": (FLUX, 720, 16, 3.0, 0.3, 3.5, 1, 16, 12, 3, 1e-5, 1.0, 0.6, 300, None, None),
    "flux-hps-8gpu": (FLUX, 720, 16, 3.0, 0.3, 3.5, 2, 8, 12, 2, 1e-5, 0.01, 0.6, 300, 0.995, None),
    "flux-hps-lora": (FLUX, 720, 12, 3.0, 0.3, 3.5, 2, 8, 12, 2, 3e-4, 1.0, 0.6, 301, None, (128, 256)),
}


QWEN, WAN = "Qwen/Qwen-Image", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PUBLISHED |= {
    "qwen-image-hps": (QWEN, 720, 20, 3.0, 0.3, 3.5, 2, 8, 12, 2, 1e-5, 1.0, 0.6, 300, None, None),
    "wan21-hps": (WAN, 512, 20, 3.0, 0.3, 5.0, 2, 8, 12, 1, 1e-5, 1.0, 0.6, 1000, None, None),
}
BASELINES = {"sd14-ddpo": "ddpo", "sd15-dpok": "dpok", "sd14-refl": "refl", "sd15-dpo": "dpo"}
OURS = {"flux-hps-24gb", "hunyuan-t2i-hps", "sd3-hps", "sdxl-hps"}
MINIATURES = {"shapes-flux", "shapes-flux-demo", "shapes-sd", "shapes-video", "shapes-i2v", "shapes-t2i"}


def refusal(recipe: object, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    model, side, steps, shift, eta, cfg, each, gpus, group, updates, lr, norm, fraction, n, ema, lora = PUBLISHED[name]
    c = load_config(name)
    assert (c.model.path, c.model.height, c.model.width, c.model.guidance_scale) == (model, side, side, cfg)
    assert (c.rollout.num_steps, c.rollout.shift, c.rollout.noise_level) == (steps, shift, eta)
    assert (c.prompts.per_iteration, c.rollout.group_size) == (each * gpus, group)
    assert (c.update.updates_per_rollout, c.optimizer.learning_rate, c.optimizer.max_grad_norm) == (updates, lr, norm)
    assert (c.rollout.timesteps.fraction, c.iterations, c.ema.decay) == (fraction, n, ema)
    assert (c.model.lora and (c.model.lora.rank, c.model.lora.alpha)) == lora
    assert c.rollout.sde == ("ddim" if model == SD else "dance")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_constants(name: str) -> None:
    c = load_config(name)
    assert (c.seed, c.model.dtype, c.rollout.shared_noise, c.rollout.timesteps.select) == (
        42,
        "bfloat16",
        True,
        "random",
    )
    assert (c.optimizer.betas, c.optimizer.eps, c.optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 1e-4)
    assert c.optimizer.warmup_updates == 0
    assert (c.algorithm.clip_range, c.algorithm.log_prob_reduction, c.algorithm.kl_weight) == (1e-4, "mean", 0.0)
    assert (c.advantage.estimator, c.advantage.eps, c.advantage.clamp, c.advantage.keep) == (
        "unbiased",
        1e-8,
        5.0,
        None,
    )
    assert {k: (r.judge, r.weight) for k, r in c.rewards.items()} == {"hps": ("hps", 1.0)}
    assert c.rewards["hps"].judge == "hps"


# (height, width, steps, shift, eta, prompts, group, kept, updates, iterations, guidance, true CFG, judge): facts of
# the published runs; prompts over all of the 32 GPUs.
VIDEO = {
    "hunyuan-video-vq": (480, 480, 16, 5.0, 0.25, 32, 24, 8, 2, 202, 6.0, 1.0, {"VQ": 1.0, "MQ": 0.0}),
    "skyreels-i2v-mq": (400, 640, 16, 7.0, 0.3, 32, 8, None, 1, 121, 1.0, 5.0, {"VQ": 0.0, "MQ": 1.0}),
}


@pytest.mark.parametrize("name", VIDEO)
def test_published_video_numbers(name: str) -> None:
    c = load_config(name)
    assert (
        *(c.model.height, c.model.width, c.rollout.num_steps, c.rollout.shift, c.rollout.noise_level),
        *(c.prompts.per_iteration, c.rollout.group_size, c.advantage.keep, c.update.updates_per_rollout, c.iterations),
        *(c.model.guidance_scale, c.model.true_cfg_scale, c.rewards["videoalign"].options["dimensions"]),
    ) == VIDEO[name]
    assert (c.model.num_frames, c.model.fps, list(c.rewards)) == (53, 8, ["videoalign"])
    assert (c.seed, c.model.dtype) == (42, "bfloat16")
    assert (c.optimizer.learning_rate, c.rollout.timesteps.fraction) == (1e-5, 0.6)


@pytest.mark.parametrize(("name", "algorithm"), BASELINES.items())
def test_baselines_are_called_after_their_algorithm(name: str, algorithm: str) -> None:
    assert load_config(name).algorithm.name == algorithm


def test_published_settings_of_the_baselines() -> None:
    """What their papers and published code state (arXiv:2305.13301, 2305.16381, 2304.05977, 2311.12908)."""
    ddpo, dpok, refl, dpo = map(load_config, BASELINES)
    assert (ddpo.rollout.num_steps, ddpo.model.guidance_scale, ddpo.optimizer.learning_rate) == (50, 5.0, 3e-4)
    assert (ddpo.prompts.per_iteration * ddpo.rollout.group_size, ddpo.rollout.timesteps.include_last) == (256, True)
    assert (ddpo.algorithm.ddpo.buffer_size, ddpo.algorithm.ddpo.buffer_min, ddpo.advantage.eps) == (32, 16, 1e-6)
    assert (dpok.algorithm.dpok.reward_weight, dpok.algorithm.dpok.anchor_weight) == (1000, 0.1)
    assert (dpok.model.lora.rank, dpok.optimizer.learning_rate, dpok.optimizer.max_grad_norm) == (4, 1e-5, 0.1)
    value = dpok.algorithm.dpok
    assert (value.value_learning_rate, value.value_batch, value.value_steps) == (1e-4, 256, 5)
    assert (refl.rollout.num_steps, refl.model.guidance_scale, refl.prompts.per_iteration) == (40, 1.0, 64)
    assert (refl.algorithm.refl.loss_scale, refl.algorithm.refl.margin, refl.algorithm.refl.window) == (1e-3, 2.0, 0.25)
    assert (dpo.algorithm.dpo.beta, dpo.prompts.per_iteration, dpo.optimizer.learning_rate) == (5000, 2048, 2.048e-5)


@pytest.mark.parametrize("name", sorted(OURS))
def test_what_is_ours_says_so(name: str) -> None:
    assert load_config(name).description.startswith("Ours: ")


def test_published_adapters_sit_on_attention() -> None:
    lora = load_config("flux-hps-lora").model.lora
    assert lora is not None
    assert set(lora.target_modules) == {"to_q", "to_k", "to_v", "to_out.0"}


@pytest.mark.parametrize(("name", "steps", "guidance"), [("shapes-flux", 6, 1.5), ("shapes-sd", 8, 1.0)])
def test_shapes_recipes_measure_on_held_out_prompts(name: str, steps: int, guidance: float) -> None:
    c = load_config(name)
    assert (c.name, c.model.path, c.model.height, c.model.width) == (name, name, 64, 64)
    assert (c.rollout.num_steps, c.model.guidance_scale) == (steps, guidance)
    assert (c.prompts.train, c.prompts.evaluation) == ("shapes:train", "shapes:heldout")
    assert c.evaluation.num_prompts >= 1000


def test_listing_shows_finished_recipes_only() -> None:
    shown = {recipe.name: recipe for recipe in list_recipes()}
    assert set(shown) == {*PUBLISHED, *VIDEO, *BASELINES, *OURS, *MINIATURES}
    assert all(recipe.description for recipe in shown.values())
    assert shown["sd14-hps"].samples_per_iteration == 4 * 8 * 16


def test_overrides_are_typed() -> None:
    c = load_config(
        "shapes-flux",
        [
            "rollout.group_size=8",
            "optimizer.learning_rate=2e-5",
            "rollout.shared_noise=false",
            "rollout.noise_level=[.1, .2, .3, .4, .5, 0]",
            "model.lora={rank: 4}",
            "prompts.negative=",
            "prompts.evaluation=null",
            "evaluation.num_prompts=0",
            "output=a=b",
        ],
    )
    assert (c.rollout.group_size, c.optimizer.learning_rate, c.rollout.shared_noise) == (8, 2e-5, False)
    assert c.rollout.noise_levels() == (0.1, 0.2, 0.3, 0.4, 0.5, 0.0)
    assert (c.model.lora and c.model.lora.rank, c.prompts.negative, c.prompts.evaluation) == (4, "", None)
    assert c.output == "a=b"


def test_overrides_reach_into_lists_and_mappings() -> None:
    overrides = [
        "model.lora.target_modules.3=proj",
        "rewards.hps.options.weights=w.pt",
        "model.lora.target_modules[0]=a",
    ]
    c = load_config("flux-hps", overrides)
    # The recipe has no adapters: the list that is changed is the default one.
    assert c.model.lora is not None
    assert c.model.lora.target_modules == ("a", "to_k", "to_v", "proj")
    assert c.rewards["hps"].options == {"weights": "w.pt"}


def test_last_override_wins() -> None:
    assert load_config("shapes-sd", ["seed=1", "seed=2"]).seed == 2


def test_mapping_override_keeps_what_it_does_not_name() -> None:
    c = load_config("shapes-flux", ["rollout={group_size: 4}"])
    assert (c.rollout.group_size, c.rollout.num_steps) == (4, 6)


def test_a_judge_is_replaced_by_null_and_a_new_name() -> None:
    c = load_config("shapes-flux", ["rewards.shapes=null", "rewards.mine.judge=pkg.mod:f"])
    assert c.rewards == {"mine": RewardConfig(judge="pkg.mod:f")}


def test_a_number_written_as_text_is_a_number() -> None:
    # PyYAML reads 2e-5 as a string, and so may a user's own code.
    assert load_config({**MINIMAL, "optimizer": yaml.safe_load("learning_rate: 2e-5")}).optimizer.learning_rate == 2e-5


def test_file_recipe_stands_over_shipped_and_sibling_bases(tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text("base: shapes-flux\ndescription: m\nrollout: {num_steps: 9, group_size: 4}\n")
    top = tmp_path / "top.yaml"
    top.write_text("base: middle.yaml\nrollout:\n  group_size: 8\noptimizer: {learning_rate: 2e-5}\n")
    c, shipped = load_config(top), load_config("shapes-flux")
    assert (c.name, c.description) == ("top", "")
    changed = {key: new for key, (_, new) in diff_configs(shipped, c).items() if key not in ("name", "description")}
    assert changed == {"rollout.num_steps": 9, "rollout.group_size": 8, "optimizer.learning_rate": 2e-5}


def test_null_in_a_recipe_switches_a_group_off(tmp_path: Path) -> None:
    (tmp_path / "full.yaml").write_text("base: flux-hps-lora\nmodel: {lora: null}\n")
    assert load_config(str(tmp_path / "full.yaml")).model.lora is None


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="$"), max_size=9)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
)


def leaves(tree: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {at: leaf for key, value in tree.items() for at, leaf in leaves(value, (*path, key)).items()}


@settings(deadline=None)
@given(trees, trees)
def test_merging_keeps_every_leaf_of_the_top_and_what_it_does_not_cover(base: object, top: object) -> None:
    merged, above = leaves(merge(base, top)), leaves(top)
    assert above.items() <= merged.items()
    for path, leaf in leaves(base).items():
        if isinstance(base, dict) and isinstance(top, dict) and path and path[0] not in top:
            assert merged[path] == leaf
    assert merged.keys() <= above.keys() | leaves(base).keys()


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(text, plain, max_size=3),
    text,
    st.floats(min_value=1e-300, max_value=1e300),
    st.lists(st.floats(0.0, 9.0), min_size=3, max_size=3).filter(lambda levels: any(levels[:-1])),
)
def test_dumped_config_reloads_equal(
    tmp_path_factory: pytest.TempPathFactory,
    options: dict[str, object],
    description: str,
    rate: float,
    levels: list[float],
) -> None:
    config = RunConfig.model_validate(
        {
            **MINIMAL,
            "description": description,
            "rewards": {"r": {"judge": "shapes", "options": options}},
            "optimizer": {"learning_rate": rate},
            "rollout": {"num_steps": 3, "noise_level": levels},
        }
    )
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    again = load_config(file)
    assert again == config
    assert diff_configs(again, config) == {}


@pytest.mark.parametrize(
    "revision", ["1e5", "0E0", "123", "0x1f", "1_0", "null", "true", ".inf", "~", "", "\x85", "\u2028a", "狗"]
)
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, revision: str) -> None:
    config = RunConfig.model_validate({**MINIMAL, "model": {"path": "p", "revision": revision}})
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml").model.revision == revision


@pytest.mark.parametrize("recipe", [*PUBLISHED, "shapes-flux", "shapes-sd"])
def test_every_recipe_survives_its_own_dump(recipe: str) -> None:
    config = load_config(recipe)
    assert load_config(yaml.safe_load(dump_config(config))) == config


def test_config_with_overrides_starts_from_the_config() -> None:
    config = load_config("shapes-flux", ["seed=5"])
    assert load_config(config, ["iterations=3"]) == load_config("shapes-flux", ["seed=5", "iterations=3"])


def test_diff_names_each_changed_setting_once() -> None:
    a = load_config("shapes-flux")
    b = load_config(
        "shapes-flux", ["seed=7", "rollout.timesteps.fraction=0.5", "model.lora={rank: 1}", "rewards.n.judge=x:y"]
    )
    changed = diff_configs(a, b)
    assert set(changed) == {"seed", "rollout.timesteps.fraction", "model.lora", "rewards.n"}
    assert changed["seed"] == (0, 7)
    assert changed["rollout.timesteps.fraction"] == (0.4, 0.5)
    assert changed["model.lora"][0] is None


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("rollout.gruop_size=16", "rollout.group_size"),
        ("rolout.group_size=16", "rollout.group_size"),
        ("group_size=16", "rollout.group_size"),
        ("rollout.learning_rate=1", "optimizer.learning_rate"),
        ("model.lora.rnk=4", "model.lora.rank"),
        ("rewards.shapes.wieght=2", "rewards.shapes.weight"),
        ("iteration=2", "iterations"),
    ],
)
def test_misspelt_setting_names_the_nearest(override: str, nearest: str) -> None:
    key = override.partition("=")[0]
    assert refusal("shapes-flux", override) == f"unknown setting {key}: the nearest is {nearest}"


def test_setting_like_no_other_lists_its_neighbours() -> None:
    assert "optimizer has learning_rate, betas" in refusal("shapes-flux", "optimizer.lr=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.num_steps=many", "rollout.num_steps='many' must be an integer"),
        ("rollout.num_steps=2.5", "rollout.num_steps=2.5 must be an integer"),
        ("rollout.num_steps=true", "rollout.num_steps=True must be a number, not true or false"),
        ("rollout.shared_noise=maybe", "rollout.shared_noise='maybe' must be true or false"),
        ("rollout.noise_level=high", "rollout.noise_level='high' must be a number or a list"),
        ("rollout.noise_level=[0.1,x]", "rollout.noise_level.1='x' must be a number"),
        (
            "rollout.timesteps.select=any",
            "rollout.timesteps.select='any' must be 'random', 'first', 'last', 'list' or 'window'",
        ),
        ("rollout=3", "rollout=3 must be a mapping of settings"),
        ("model.revision=123", "model.revision=123 must be a string: put quotes around it"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate=inf must be a finite number"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate=-1 must be greater than 0"),
        ("seed=-1", "seed=-1 must be greater than or equal to 0"),
        ("rewards.new.weight=2", "rewards.new.judge is missing"),
    ],
)
def test_wrong_value_names_key_value_and_expectation(override: str, expected: str) -> None:
    assert refusal("shapes-flux", override).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.group_size=1", "rollout.group_size=1 leaves a group without a baseline"),
        ("update.updates_per_rollout=3", "update.updates_per_rollout=3 does not divide rollout.group_size=16"),
        ("advantage.keep=5", "advantage.keep=5 must be even"),
        ("advantage.keep=32", "advantage.keep=32 must be even and at most rollout.group_size=16"),
        ("rollout.noise_level=[1,2]", "rollout.noise_level has 2 values for num_steps=6"),
        ("rollout.noise_level=0", "rollout.noise_level=0.0 makes every step deterministic"),
        ("rollout.timesteps.fraction=0.1", "rollout.timesteps.fraction=0.1 of 5 transitions is none"),
        ("rollout.timesteps.steps=[1]", "rollout.timesteps.steps=[1] is only read with timesteps.select=list"),
        ("rollout.timesteps={select: list, steps: [5]}", "rollout.timesteps.steps=[5] must name"),
        ("rollout.timesteps={select: list, steps: [1, 1]}", "rollout.timesteps.steps=[1, 1] must name"),
        ("rewards.shapes.weight=0", "rewards has no judge with a weight other than 0"),
        ("prompts.evaluation=null", "evaluation.num_prompts=1200 needs prompts.evaluation"),
    ],
)
def test_combination_that_cannot_run_is_refused_with_its_key(override: str, expected: str) -> None:
    assert refusal("shapes-flux", override).startswith(expected)


def test_several_mistakes_stand_on_one_line_unknown_first() -> None:
    message = refusal("shapes-flux", "iterations=x", "rollout.gruop_size=3")
    assert message.startswith("unknown setting rollout.gruop_size")
    assert "; iterations='x' must be" in message


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", ""])
def test_override_that_is_not_key_value(override: str) -> None:
    assert f"override {override!r} is not key=value" in refusal("shapes-flux", override)


def test_override_of_a_list_item_beyond_the_end() -> None:
    assert "use 0 to 3" in refusal("flux-hps-lora", "model.lora.target_modules.4=x")


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${seed}", "a ${", "[1, '${x}']"])
def test_interpolation_is_refused_in_overrides(value: str) -> None:
    assert "${" in refusal("shapes-flux", f"rewards.shapes.options.x={value}")


def test_interpolation_is_refused_in_files_and_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    (tmp_path / "a.yaml").write_text("base: shapes-flux\nmodel: {path: '${oc.env:SECRET}'}\n")
    for recipe in (tmp_path / "a.yaml", {**MINIMAL, "output": "${oc.env:SECRET}"}):
        message = refusal(recipe)
        assert "hidden" not in message
        assert "is refused" in message


def test_unknown_recipe_names_the_nearest() -> None:
    message = refusal("shapes-flx")
    assert "'shapes-flx'" in message
    assert "shapes-flux" in message
    assert "dancegrpo recipes" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n", "not a mapping"),
        ("", "not a mapping"),
        ("hello", "not a mapping"),
        ("seed: 1\na: [1\n", "line 3"),
        ("seed: 1\nseed: 2\n", "line 2: found duplicate key seed"),
        ("a: &a [*a]", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("base: 3", "base=3 must be"),
        ("base: shapes-fluks", "nearest is shapes-flux"),
        ("base: shapes-flux\nrollout.group_size: 3", "nest it"),
    ],
)
def test_malformed_recipe_file(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert expected in refusal(file)


def test_recipe_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    assert "not UTF-8" in refusal(tmp_path / "latin.yaml")
    assert "does not exist" in refusal(tmp_path / "absent.yaml")
    assert "is a folder" in refusal(tmp_path)


def test_circle_of_bases_is_refused(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c.yaml"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}\n")
    assert "b.yaml -> c.yaml -> b.yaml" in refusal(tmp_path / "a.yaml")


def test_loading_a_recipe_needs_no_tensor_library() -> None:
    code = (
        "import sys; from dancegrpo.config import load_config; load_config('flux-hps'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
