"""Wan against the diffusers pipelines: text- and image-to-video, one network and two."""

from __future__ import annotations

import ast
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dancegrpo.algorithms import GRPO, Advantage, gather
from dancegrpo.config import load_config
from dancegrpo.errors import ConfigError, DanceError, ModelError, PromptError
from dancegrpo.policies import ModelCard, Policy, load_policy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores
from dancegrpo.sampling import sample
from dancegrpo.settings import LoraConfig, ModelConfig, RolloutConfig
from dancegrpo.update import Updater
from test_policies import LORA, noise, perturb, pipeline_of
from tiny_wan import SIZE, build_wan

STEPS, TOKENS = 4, 24
TEXTS = ["a red circle", "two blue squares above a triangle", "a photo"]
BOTH = ("transformer", "transformer_2")
# With shift 3 and 4 steps the timesteps are 1000, 858, 602 and 9: two steps for each network.
KINDS = {
    "t2v": {},
    "t2v-two": {"networks": BOTH, "boundary_ratio": 0.7},
    "t2v-5b": {"expand_timesteps": True},
    "i2v-clip": {"image": True, "clip": True},
    "i2v-two": {"image": True, "networks": BOTH, "boundary_ratio": 0.7},
    "i2v-5b": {"image": True, "expand_timesteps": True},
}
CARD = ModelCard("tiny/wan", "my-recipe", 12, ("hps",))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wan")
    return {kind: build_wan(root / kind, **options) for kind, options in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def model_of(path: Path, **settings: object) -> ModelConfig:
    base = {"height": SIZE, "width": SIZE, "num_frames": 5, "max_sequence_length": TOKENS, "guidance_scale": 4.0}
    return ModelConfig(**{"path": str(path), "device": "cpu", **base, **settings})


def policy_of(path: Path, rollout: RolloutConfig | None = None, **settings: object) -> Policy:
    return load_policy(model_of(path, **settings), rollout or RolloutConfig(num_steps=STEPS))


@cache
def untouched(path: Path, **settings: object) -> Policy:
    """`policy_of`, loaded once: for tests that change nothing of it."""
    return policy_of(path, **settings)


@cache
def base_of(path: Path):
    """`pipeline_of` with Flow-Euler, loaded once: for tests that only call it."""
    return euler(pipeline_of(path))


def picture(seed: int = 0):
    from PIL import Image

    pixels = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def prompts(kind: str, *texts: str, negative: str = "blurry", seeds: tuple[int, ...] = ()) -> list[Prompt]:
    images = [picture(seed) if "i2v" in kind else None for seed in seeds or (0,) * len(texts)]
    return [Prompt(i, text, negative, image) for i, (text, image) in enumerate(zip(texts, images, strict=True))]


def euler(pipeline, shift: float = 3.0):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return pipeline


def by_diffusers(pipeline, kind: str, start: Tensor, output: str, texts=TEXTS, **settings: object) -> Tensor:
    """What the pipeline itself makes of `texts` from starting latents; it draws the given frame of 5B too."""
    if kind == "i2v-5b":
        start = torch.cat([torch.randn_like(start[:, :, :1]), start], dim=2)
    call = {"height": SIZE, "width": SIZE, "num_frames": 5, "max_sequence_length": TOKENS, "guidance_scale": 4.0}
    call |= {"num_inference_steps": STEPS, "negative_prompt": ["blurry"] * len(texts), **settings}
    if "i2v" in kind:
        call["image"] = picture()
    return pipeline(prompt=list(texts), latents=start, output_type=output, **call).frames


# --- Equal to the pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents_and_clips_equal_the_pipelines_bit_for_bit(folders, kind: str, guidance: float) -> None:
    """One batch of prompts of different length; image-to-video on one image, the most the pipeline takes a call."""
    policy = untouched(folders[kind], guidance_scale=guidance)
    start, pipeline = noise(policy, 3), base_of(folders[kind])
    condition = policy.encode(prompts(kind, *TEXTS))
    ours = sample(policy, condition, start)
    latents = by_diffusers(pipeline, kind, start, "latent", guidance_scale=guidance)
    assert torch.equal(ours, latents[:, :, -ours.shape[2] :])
    clips = policy.decode(ours, condition).detach()
    assert clips.shape == (3, 5, 3, SIZE, SIZE)
    assert torch.equal(clips, by_diffusers(pipeline, kind, start, "pt", guidance_scale=guidance))


@pytest.mark.parametrize("kind", ["t2v", "t2v-two", "t2v-5b", "i2v-clip"])
def test_one_frame_equals_the_pipelines_bit_for_bit(folders, kind: str) -> None:
    policy = untouched(folders[kind], num_frames=1)
    start, condition = noise(policy, 3), policy.encode(prompts(kind, *TEXTS))
    clips = policy.decode(sample(policy, condition, start), condition).detach()
    assert clips.shape == (3, 1, 3, SIZE, SIZE)
    assert torch.equal(clips, by_diffusers(base_of(folders[kind]), kind, start, "pt", num_frames=1))


def test_clips_that_are_not_square_equal_the_pipelines(folders) -> None:
    policy = untouched(folders["i2v-clip"], height=16, width=48)
    start, condition = noise(policy, 1), policy.encode(prompts("i2v", TEXTS[0]))
    clips = policy.decode(sample(policy, condition, start), condition).detach()
    pipeline = base_of(folders["i2v-clip"])
    assert torch.equal(clips, by_diffusers(pipeline, "i2v", start, "pt", TEXTS[:1], height=16, width=48))


def test_the_second_network_has_a_guidance_of_its_own(folders) -> None:
    policy = untouched(folders["t2v-two"], guidance_scale_2=1.5)
    start, pipeline = noise(policy, 3), base_of(folders["t2v-two"])
    ours = sample(policy, policy.encode(prompts("t2v", *TEXTS)), start)
    assert torch.equal(ours, by_diffusers(pipeline, "t2v", start, "latent", guidance_scale_2=1.5))
    assert not torch.equal(ours, by_diffusers(pipeline, "t2v", start, "latent"))


def test_without_a_shift_of_its_own_a_run_has_the_checkpoints(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(STEPS)
    assert torch.equal(policy_of(build_wan(tmp_path / "m", flow_shift=5.0)).dynamics.sigmas, scheduler.sigmas)


def test_a_checkpoint_that_ships_flow_euler_keeps_its_scheduler(folders, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    path = edited(folders["t2v"], tmp_path / "m", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.save_pretrained(path / "scheduler")
    scheduler.set_timesteps(STEPS)
    policy = policy_of(path)
    assert torch.equal(policy.dynamics.sigmas, scheduler.sigmas)
    assert policy._usage().scheduler == ""


def test_the_pipeline_as_the_policy_runs_it_equals_the_policy(folders, kind: str) -> None:
    policy = untouched(folders[kind])
    start, told = noise(policy, 2), prompts(kind, *TEXTS[:2])
    condition = policy.encode(told)
    ours = policy.decode(sample(policy, condition, start), condition).detach()
    assert torch.equal(ours, policy.run_pipeline(told, start, policy.pipeline_scheduler()))


def test_the_pipeline_draws_prompts_with_images_of_their_own(folders) -> None:
    policy = untouched(folders["i2v-clip"])
    start, told = noise(policy, 2), prompts("i2v", *TEXTS[:2], seeds=(0, 1))
    condition = policy.encode(told)
    ours = policy.decode(sample(policy, condition, start), condition).detach()
    clips = policy.run_pipeline(told, start, policy.pipeline_scheduler())
    torch.testing.assert_close(ours, clips, atol=1e-5, rtol=0)


def test_a_shift_of_the_runs_own_is_the_published_schedule_and_the_cards(folders, tmp_path: Path) -> None:
    policy = policy_of(folders["t2v"], RolloutConfig(num_steps=STEPS, shift=5.0))
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(policy.dynamics.sigmas.double(), 5 * sigmas / (1 + 4 * sigmas), atol=1e-6, rtol=0)
    policy.export(tmp_path / "out", CARD)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "FlowMatchEulerDiscreteScheduler(shift=5.0)\npipe.scheduler.sigma_min = 1 / 4" in text
    pipeline = euler(pipeline_of(tmp_path / "out"), 5.0)
    pipeline.scheduler.sigma_min = 1 / 4
    start = noise(policy, 3)
    ours = sample(policy, policy.encode(prompts("t2v", *TEXTS)), start)
    torch.testing.assert_close(ours, by_diffusers(pipeline, "t2v", start, "latent"), atol=1e-5, rtol=0)


def test_half_precision_networks_give_float32_latents_near_full_precision(folders, kind: str) -> None:
    full, half = untouched(folders[kind]), untouched(folders[kind], dtype="bfloat16")
    start, told = noise(full, 2), prompts(kind, *TEXTS[:2])
    expected, condition = sample(full, full.encode(told), start), half.encode(told)
    latents = sample(half, condition, start)
    assert latents.dtype == half.decode(latents, condition).dtype == torch.float32
    assert half.pipeline.vae.dtype == torch.float32
    assert (latents - expected).square().mean().sqrt() < 0.05 * expected.std()


# --- Conditions and batches -----------------------------------------------------------------------------------------


def test_groups_of_several_prompts_and_images_in_one_batch_equal_one_by_one(folders, kind: str) -> None:
    policy = untouched(folders[kind])
    condition = policy.encode(prompts(kind, *TEXTS, seeds=(0, 1, 2)))
    rows, x = torch.tensor([0, 0, 1, 1, 2, 2]), noise(policy, 6)
    for steps in ([0, 1, 0, 1, 1, 0], [2, 3, 3, 2, 2, 2]):  # each of one network
        step = torch.tensor(steps)
        with torch.no_grad():
            together = policy.predict(x, step, condition[rows])
            alone = [policy.predict(x[i : i + 1], step[i : i + 1], condition[rows[i : i + 1]]) for i in range(6)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_prompts_condition_does_not_depend_on_the_others(folders) -> None:
    policy, told = untouched(folders["i2v-clip"]), prompts("i2v", *TEXTS, seeds=(0, 1, 0))
    together = policy.encode(told)
    for row, prompt in enumerate(told):
        alone = policy.encode([prompt])
        assert all(torch.equal(tensor[row], alone.tensors[name][0]) for name, tensor in together.tensors.items())
    assert not torch.equal(together.tensors["image_latents"][0], together.tensors["image_latents"][1])


def test_condition_ids_tell_text_from_image_and_sizes_apart(folders) -> None:
    ids = {untouched(folders[kind]).condition_id for kind in ("t2v", "i2v-clip", "i2v-5b")}
    ids |= {policy_of(folders["i2v-clip"], **{name: 16}).condition_id for name in ("height", "width")}
    ids |= {untouched(folders["i2v-clip"], num_frames=9).condition_id, untouched(folders["t2v"]).condition_id}
    assert len(ids) == 6


def test_condition_ids_tell_what_the_networks_read_of_an_image_apart(folders, tmp_path: Path) -> None:
    """The same encoders, and other transformers: CLIP's states, a clip's latents, or one frame's."""
    ids = {untouched(folders["i2v-clip"]).condition_id}
    for kind, expand in (("i2v-two", False), ("i2v-5b", True)):
        path = edited(folders["i2v-clip"], tmp_path / kind, expand_timesteps=expand)
        shutil.rmtree(path / "transformer")
        shutil.copytree(folders[kind] / "transformer", path / "transformer")
        ids.add(policy_of(path).condition_id)
    assert len(ids) == 3


def test_a_batch_of_both_networks_is_refused(folders) -> None:
    policy = untouched(folders["t2v-two"])
    assert policy.bucket(torch.arange(STEPS)).tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="both networks"):
        policy.predict(noise(policy, 2), torch.tensor([1, 2]), policy.encode(prompts("t2v", *TEXTS[:2])))


# --- Training -------------------------------------------------------------------------------------------------------


def run_config(path: Path, **settings: object):
    model = model_of(path).model_dump(mode="json", exclude_defaults=True)
    rollout = {"group_size": 4, "num_steps": STEPS, "noise_level": 0.7, "batch_size": 8, "timesteps": {"fraction": 1.0}}
    base = {"name": "wan", "model": model, "prompts": {"train": "none.txt", "per_iteration": 2}, "rollout": rollout}
    return load_config({**base, "rewards": {"any": {"judge": "python:any"}}, **settings})


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("kind", ["t2v-two", "i2v-clip", "i2v-5b"])
def test_replay_by_the_training_forward_is_rounding_and_nothing_at_equal_batch(folders, kind: str, batch: int) -> None:
    config = run_config(folders[kind])
    policy, algorithm = load_policy(config.model, config.rollout), GRPO(config)
    told = algorithm.collect(policy, policy.encode(prompts(kind, *TEXTS[:2], seeds=(0, 1))), 0)
    ones = torch.ones(8)
    advantage, bucket = Advantage(ones, ones, ones.bool(), {}, torch.zeros(2).bool()), policy.bucket(told.step)
    assert told.step.shape == (8, STEPS - 1)
    worst = 0.0
    for name in bucket.unique():
        slot, sampled = (bucket == name).T.nonzero(as_tuple=True)
        for s, k in zip(sampled.split(batch), slot.split(batch), strict=True):
            with torch.no_grad():
                again = algorithm.log_prob(policy, gather(told, advantage, s, k, None))
            worst = max(worst, float((again - told.log_prob[s, k]).abs().max()))
    assert worst <= (0 if batch == 8 else 1e-6)


def test_an_update_trains_both_networks_and_never_mixes_their_steps(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(
        folders["t2v-two"], optimizer={"learning_rate": 1e-3}, update={"micro_batch_size": 5, "updates_per_rollout": 2}
    )
    policy, algorithm = load_policy(config.model, config.rollout), GRPO(config)
    updater = Updater(policy, config)
    trajectory = algorithm.collect(policy, policy.encode(prompts("t2v", *TEXTS[:2])), 0)
    values = policy.decode(trajectory.x0, trajectory.condition).detach().mean(dim=(1, 2, 3, 4))
    advantage = algorithm.advantage({"any": Scores(values, torch.ones(8).bool())}, trajectory.group)
    asked, plain = [], policy.predict

    def predict(x_t: Tensor, step: Tensor, condition) -> Tensor:
        asked.append(set(policy.bucket(step).tolist()))
        return plain(x_t, step, condition)

    monkeypatch.setattr(policy, "predict", predict)
    before = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    metrics = updater.update(algorithm.learning(policy, trajectory, advantage))
    assert metrics["train/ratio_first"] == 1.0
    assert metrics["train/replay_difference"] <= 1e-6
    assert sorted(map(len, asked)) == [1] * len(asked)
    assert set().union(*asked) == {0, 1}
    moved = {name.split(".")[0] for name, weight in policy.trainable().items() if not torch.equal(weight, before[name])}
    assert moved == set(BOTH)


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradients_reach_every_trainable_weight_with_two_networks(folders, lora: LoraConfig | None) -> None:
    policy = policy_of(folders["i2v-two"], lora=lora)
    perturb(policy)  # an adapter starts with B = 0, which hides A
    condition = policy.encode(prompts("i2v", TEXTS[0]))
    for step in (1, 2):
        policy.predict(noise(policy, 1), torch.tensor([step]), condition).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in policy.trainable().values())


def test_the_reference_holds_both_networks(folders) -> None:
    policy = policy_of(folders["t2v-two"])
    start, condition = noise(policy, 1), policy.encode(prompts("t2v", TEXTS[0]))
    before = sample(policy, condition, start)
    policy.keep_reference()
    perturb(policy)
    with policy.reference():
        assert torch.equal(sample(policy, condition, start), before)


# --- Export ---------------------------------------------------------------------------------------------------------


def trained(path: Path, kind: str, lora: LoraConfig | None) -> tuple[Policy, Tensor, Tensor]:
    """A policy with other weights than its base's, starting noise, and the clips that it makes of it."""
    policy = policy_of(path, lora=lora)
    perturb(policy)
    start, condition = noise(policy, 3), policy.encode(prompts(kind, *TEXTS))
    return policy, start, policy.decode(sample(policy, condition, start), condition).detach()


@pytest.mark.parametrize("kind", ["t2v", "t2v-two", "i2v-clip"])
def test_an_exported_pipeline_makes_the_same_clips_in_diffusers(folders, tmp_path: Path, kind: str) -> None:
    policy, start, ours = trained(folders[kind], kind, None)
    policy.export(tmp_path / "out", CARD)
    assert torch.equal(ours, by_diffusers(euler(pipeline_of(tmp_path / "out")), kind, start, "pt"))
    assert not torch.equal(ours, by_diffusers(base_of(folders[kind]), kind, start, "pt"))
    assert "FlowMatchEulerDiscreteScheduler(shift=3.0)" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["t2v", "t2v-two", "i2v-clip"])
def test_exported_lora_weights_make_the_same_clips_in_diffusers(folders, tmp_path: Path, kind: str) -> None:
    """Loaded by the very lines of the card."""
    policy, start, ours = trained(folders[kind], kind, LORA)
    policy.export(tmp_path / "out", CARD)
    pipeline = euler(pipeline_of(folders[kind]))
    before = by_diffusers(pipeline, kind, start, "pt")
    example = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    loads = [line for line in example.splitlines() if "load_lora_weights" in line]
    assert len(loads) == (2 if kind == "t2v-two" else 1)
    for line in loads:
        call = ast.parse(line).body[0].value
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        pipeline.load_lora_weights(tmp_path / "out", **options)
    torch.testing.assert_close(by_diffusers(pipeline, kind, start, "pt"), ours, atol=1e-5, rtol=0)
    assert (before - ours).abs().max() > 1e-3


def test_the_recipe_has_the_published_numbers() -> None:
    c = load_config("wan21-hps")
    assert (c.model.height, c.model.width, c.model.num_frames, c.model.guidance_scale) == (512, 512, 1, 5.0)
    assert (c.rollout.num_steps, c.rollout.shift, c.rollout.noise_level, c.rollout.sde) == (20, 3.0, 0.3, "dance")
    assert (c.prompts.per_iteration, c.rollout.group_size, c.rollout.timesteps.fraction) == (2 * 8, 12, 0.6)
    assert (c.update.updates_per_rollout, c.optimizer.learning_rate, c.optimizer.max_grad_norm) == (1, 1e-5, 1.0)
    assert (c.iterations, c.rewards["hps"].frames, c.rewards["hps"].weight) == (1000, "first", 1.0)


# --- Bad input ------------------------------------------------------------------------------------------------------


def message(kind: type[DanceError], path: Path, **settings: object) -> str:
    with pytest.raises(kind) as caught:
        policy_of(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("t2v", {"num_frames": 7}, "model.num_frames=7 must be a multiple of 4 plus 1 for this pipeline: use 9"),
        ("t2v", {"num_frames": 6}, "use 5"),
        ("t2v", {"height": 40}, "model.height=40: sizes must be multiples of 16 for this pipeline, use 32"),
        ("i2v-clip", {"height": 40, "width": 8}, "model.height=40 and model.width=8: sizes"),
        ("t2v", {"guidance_scale_2": 3.0}, "model.guidance_scale_2=3.0 is for a second network"),
        ("t2v-two", {"guidance_scale_2": 3.0, "guidance_scale": 1.0}, "guidance_scale_2=3.0 does nothing"),
        ("t2v", {"true_cfg_scale": 2.0}, "model.true_cfg_scale=2.0 is not known to WanPipeline"),
        ("i2v-5b", {"num_frames": 2}, "model.num_frames=2 must be a multiple of 4 plus 1 for this pipeline: use 5"),
        ("i2v-5b", {"num_frames": 1}, "model.num_frames=1 is the given picture alone here: use 5 or more"),
    ],
)
def test_settings_wan_cannot_run(folders, kind: str, settings: dict, said: str) -> None:
    assert said in message(ConfigError, folders[kind], **settings)


def test_a_prompt_without_an_image_is_refused(folders) -> None:
    with pytest.raises(PromptError, match="has no image"):
        policy_of(folders["i2v-clip"]).encode([Prompt(3, "a circle")])


def edited(path: Path, to: Path, **index: object) -> Path:
    """A copy of a checkpoint with other entries in its model_index.json."""
    shutil.copytree(path, to)
    file = to / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    return to


@pytest.mark.parametrize(
    ("kind", "index", "said"),
    [
        ("i2v-clip", {"_class_name": "WanPipeline"}, "maps 12 channels to 4, text-to-video needs 4 to 4"),
        ("t2v", {"_class_name": "WanImageToVideoPipeline"}, "maps 4 channels to 4, image-to-video needs 12 to 4"),
        ("t2v-two", {"boundary_ratio": None}, "has a transformer_2, but no boundary_ratio"),
        ("t2v-two", {"transformer_2": [None, None]}, "has no transformer_2, which steps 2 to 3 need"),
        ("t2v-two", {"transformer": [None, None]}, "has no transformer, which the first step needs"),
        ("i2v-clip", {"image_encoder": [None, None]}, "has no image_encoder"),
    ],
)
def test_checkpoints_that_wan_cannot_run(folders, tmp_path: Path, kind: str, index: dict, said: str) -> None:
    assert said in message(ModelError, edited(folders[kind], tmp_path / "m", **index))


def test_networks_without_weights_are_named(folders, tmp_path: Path) -> None:
    path = edited(folders["t2v-two"], tmp_path / "m")
    (path / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    assert "transformer_2 has no weights" in message(ModelError, path)
    shutil.rmtree(path / "transformer_2")
    assert "transformer_2 is missing" in message(ModelError, path)


def test_a_text_encoder_of_another_model_is_refused(tmp_path: Path) -> None:
    assert "gives 16 channels" in message(ModelError, build_wan(tmp_path / "m", text_dim=24))


def test_the_second_network_alone_is_refused_as_pure_noise_is_never_its_own(tmp_path: Path) -> None:
    path = build_wan(tmp_path / "m", networks=("transformer_2",), boundary_ratio=1.0)
    assert "has no transformer, which the first step needs" in message(ModelError, path)
