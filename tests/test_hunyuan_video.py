"""HunyuanVideo and SkyReels against the diffusers pipelines they wrap, and what they refuse."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dancegrpo.algorithms import GRPO, Advantage, gather
from dancegrpo.config import load_config
from dancegrpo.errors import ConfigError, DanceError, ModelError, PromptError
from dancegrpo.media import reference_image
from dancegrpo.policies import ModelCard, Policy, load_policy
from dancegrpo.policies.skyreels import image_generator
from dancegrpo.prompts import Prompt
from dancegrpo.sampling import sample
from dancegrpo.settings import LoraConfig, ModelConfig, RolloutConfig
from test_policies import LORA, noise, perturb, pipeline_of
from tiny import PROMPTS
from tiny_hunyuan import (
    CHANNELS,
    IMAGE_TEMPLATE,
    SIZE,
    TEMPLATE,
    TEXT_TOKENS,
    build_hunyuan,
    build_hunyuan_i2v,
    build_skyreels,
)

FRAMES, STEPS = 9, 3
KINDS = ["t2v", "latent_concat", "token_replace", "skyreels"]
IMAGE_KINDS = KINDS[1:]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    """(kind, guidance_embeds) -> folder of a tiny pipeline, built once. Read-only: copy before changing it."""
    builders = {"t2v": build_hunyuan, "skyreels": build_skyreels}

    @cache
    def build(kind: str, guidance_embeds: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("hunyuan") / kind
        if kind in builders:
            return builders[kind](folder, guidance_embeds=guidance_embeds)
        return build_hunyuan_i2v(folder, kind, guidance_embeds=guidance_embeds)

    return build


def settings(path: Path, **model: object) -> dict[str, object]:
    reads_image = (path / "image_processor").is_dir()
    common = {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "guidance_scale": 6.0, "device": "cpu"}
    template = IMAGE_TEMPLATE if reads_image else TEMPLATE
    return common | {"path": str(path), "max_sequence_length": TEXT_TOKENS, "prompt_template": template} | model


def policy_of(path: Path, rollout: RolloutConfig | None = None, **model: object) -> Policy:
    return load_policy(ModelConfig(**settings(path, **model)), rollout or RolloutConfig(num_steps=STEPS))


@pytest.fixture(scope="module")
def loaded(base):
    """(kind, true_cfg_scale) -> a policy that is loaded once: for tests that change nothing of it."""

    @cache
    def load(kind: str, true_cfg_scale: float = 1.0) -> Policy:
        return policy_of(base(kind), true_cfg_scale=true_cfg_scale)

    return load


def picture(index: int) -> Image.Image:
    """A coloured ramp, of another size for each index."""
    image = Image.linear_gradient("L").resize((24 + 8 * index, 40))
    return Image.merge("RGB", [image, image.rotate(90, expand=False), Image.new("L", image.size, 60 * index)])


def prompts(policy: Policy, *texts: str) -> list[Prompt]:
    return [Prompt(i, t, "blurry", picture(i) if policy.takes_image else None) for i, t in enumerate(texts)]


def frozen(path: Path):
    """The pipeline, its weights without gradient: where they want one, torch convolves by another kernel."""
    pipeline = pipeline_of(path)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)
    return pipeline


loaded_pipeline = cache(frozen)
"""For tests that change nothing of it."""


def by_diffusers(pipeline, policy: Policy, asked: list[Prompt], start: Tensor, kind: str) -> Tensor:
    """What the pipeline itself makes of the noise `start` (B, *S) for B prompts: latents, or clips for kind `pt`."""
    model = policy.model
    if policy.latent_shape[1] < 1 + (model.num_frames - 1) // 4:  # the pipeline draws the image's frame, and drops it
        start = torch.cat([torch.zeros_like(start[:, :, :1]), start], dim=2)
    call = {"image": [prompt.image for prompt in asked]} if policy.takes_image else {}
    if policy.guided:
        call["negative_prompt"] = [prompt.negative for prompt in asked] if len(asked) > 1 else asked[0].negative
    return pipeline(
        prompt=[prompt.text for prompt in asked],
        height=model.height,
        width=model.width,
        num_frames=model.num_frames,
        num_inference_steps=STEPS,
        guidance_scale=model.guidance_scale,
        true_cfg_scale=model.true_cfg_scale,
        prompt_template=model.prompt_template.model_dump(exclude_none=True),
        max_sequence_length=TEXT_TOKENS,
        generator=[image_generator(prompt) for prompt in asked],  # SkyReels alone draws from it
        latents=start,
        output_type=kind,
        **call,
    ).frames


def assert_equals_pipeline(path: Path, texts: tuple[str, ...], **model: object) -> None:
    """Latents and clips, bit for bit, the prompts in one batch."""
    policy, pipeline = policy_of(path, **model), loaded_pipeline(path)
    asked, start = prompts(policy, *texts), noise(policy, len(texts))
    condition = policy.encode(asked)
    ours = sample(policy, condition, start)
    theirs = by_diffusers(pipeline, policy, asked, start, "latent")
    assert torch.equal(ours[:, :, -theirs.shape[2] :], theirs[:, :, -ours.shape[2] :])
    with torch.no_grad():
        clips = policy.decode(ours, condition)
    assert torch.equal(clips, by_diffusers(pipeline, policy, asked, start, "pt"))
    assert clips.std() > 0.01


# --- Equal to the pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance_embeds", "scale"), [(True, 1.0), (False, 1.0), (True, 4.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_equals_the_pipelines_bit_for_bit(base, kind: str, guidance_embeds: bool, scale: float) -> None:
    assert_equals_pipeline(base(kind, guidance_embeds), PROMPTS[:1], true_cfg_scale=scale)


# HunyuanVideo's image-to-video pipeline cannot guide several prompts in one call: it shows one black image to all.
@pytest.mark.parametrize(
    ("kind", "scale"), [("t2v", 1.0), ("t2v", 4.0), ("skyreels", 4.0), ("latent_concat", 1.0), ("token_replace", 1.0)]
)
def test_prompts_of_different_length_in_one_batch_equal_the_pipelines_bit_for_bit(
    base, kind: str, scale: float
) -> None:
    assert_equals_pipeline(base(kind), PROMPTS, true_cfg_scale=scale)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_picture_equals_the_pipelines_of_one_frame(base, scale: float) -> None:
    assert_equals_pipeline(base("t2v"), PROMPTS[:2], num_frames=1, true_cfg_scale=scale)


def test_a_clip_that_is_not_square_equals_the_pipelines(base) -> None:
    assert_equals_pipeline(base("skyreels"), PROMPTS[:1], height=16, width=48)


@pytest.mark.parametrize(
    ("kind", "latent", "frames"),
    [
        ("t2v", (CHANNELS, 3, 4, 4), 9),
        ("latent_concat", (CHANNELS, 3, 4, 4), 5),
        ("token_replace", (CHANNELS, 2, 4, 4), 9),
    ],
)
def test_only_what_is_sampled_is_a_latent(loaded, kind: str, latent: tuple[int, ...], frames: int) -> None:
    """Of the image's own frame under token_replace there is no log-probability; latent_concat drops four frames."""
    policy = loaded(kind)
    condition = policy.encode(prompts(policy, PROMPTS[0]))
    with torch.no_grad():
        assert policy.decode(noise(policy, 1), condition).shape == (1, frames, 3, SIZE, SIZE)
    assert policy.latent_shape == latent


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_gives_float32_latents_near_full_precision(base, loaded, kind: str) -> None:
    full, half = loaded(kind, 4.0), policy_of(base(kind), dtype="bfloat16", true_cfg_scale=4.0)
    start, asked = noise(full, 2), prompts(full, *PROMPTS[:2])
    expected, condition = sample(full, full.encode(asked), start), half.encode(asked)
    latents = sample(half, condition, start)
    with torch.no_grad():
        assert half.decode(latents, condition).dtype == latents.dtype == torch.float32
    assert (latents - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_the_embedded_guidance_is_rounded_as_the_pipeline_rounds_it(base) -> None:
    """6000 is no bfloat16, and the pipeline hands the network its neighbour."""
    seen = []
    policy = policy_of(base("t2v"), dtype="bfloat16")
    policy.module.time_text_embed.register_forward_pre_hook(lambda _, args: seen.append(args[2].item()))
    with torch.no_grad():
        policy.predict(noise(policy, 1), torch.tensor([0]), policy.encode(prompts(policy, PROMPTS[0])))
    assert seen == [(torch.tensor(6.0, dtype=torch.bfloat16) * 1000).item()] != [6000.0]


# --- Conditions, batches, replay ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_several_prompts_in_one_batch_equal_one_by_one(loaded, kind: str) -> None:
    policy = loaded(kind, 4.0)
    condition = policy.encode(prompts(policy, *PROMPTS))
    rows, step = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 2, 1, 0, 2, 1])
    x = noise(policy, 6)
    with torch.no_grad():
        together = policy.predict(x, step, condition[rows])
        alone = [policy.predict(x[i : i + 1], step[i : i + 1], condition[rows[i : i + 1]]) for i in range(6)]
        started = policy.start(x, condition[rows])
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    one = torch.cat([policy.start(x[i : i + 1], condition[rows[i : i + 1]]) for i in range(6)])
    assert torch.equal(started, one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_condition_does_not_depend_on_the_others(loaded, kind: str) -> None:
    policy = loaded(kind, 4.0)
    asked = prompts(policy, *PROMPTS)
    together = policy.encode(asked)
    for row, prompt in enumerate(asked):
        alone = policy.encode([prompt])
        assert all(torch.equal(tensor[row], alone.tensors[name][0]) for name, tensor in together.tensors.items())


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_a_condition_carries_one_frame_of_its_own_image(loaded, kind: str) -> None:
    policy = loaded(kind)
    first, second = prompts(policy, PROMPTS[0], PROMPTS[0])
    latents = policy.encode([first, second]).tensors["image_latents"]
    assert latents.shape == (2, CHANNELS, 1, SIZE // 8, SIZE // 8)
    assert not torch.equal(latents[0], latents[1])


def test_condition_id_changes_with_what_an_image_is_encoded_to(base, tmp_path: Path) -> None:
    path = base("skyreels")
    other = tmp_path / "m"
    shutil.copytree(path, other)
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    policies = [policy_of(path), policy_of(other), policy_of(path, true_cfg_scale=4.0), policy_of(path, height=48)]
    assert len({policy.condition_id for policy in policies}) == 4
    assert policy_of(path, num_frames=5).condition_id == policies[0].condition_id


def test_condition_id_tells_the_ways_in_which_an_image_is_seen_apart(base, tmp_path: Path) -> None:
    """The same encoders, and another transformer: it decides which tokens of the image are read."""
    other = tmp_path / "m"
    shutil.copytree(base("token_replace"), other)
    shutil.rmtree(other / "transformer")
    shutil.copytree(base("latent_concat") / "transformer", other / "transformer")
    assert policy_of(base("token_replace")).condition_id != policy_of(other).condition_id


@pytest.fixture(scope="module", params=KINDS)
def rolled(request, base):
    """(policy, algorithm, trajectory) of 2 groups of 4 samples, sampled 4 at a time, all but the last step trained."""
    model = settings(base(request.param), true_cfg_scale=4.0)
    run = {
        "name": "replay",
        "model": model | {"prompt_template": model["prompt_template"].model_dump()},
        "prompts": {"train": "none.txt", "per_iteration": 2},
        "rollout": {"group_size": 4, "num_steps": 4, "batch_size": 4, "timesteps": {"fraction": 1.0}},
        "rewards": {"any": {"judge": "python:any"}},
    }
    config = load_config(run)
    policy, algorithm = load_policy(config.model, config.rollout), GRPO(config)
    return policy, algorithm, algorithm.collect(policy, policy.encode(prompts(policy, *PROMPTS[:2])), 0)


def replayed(rolled, sample: Tensor, slot: Tensor, batch: int) -> Tensor:
    """|log-prob of the training forward - rollout's| of the pairs (sample, slot), gradient on, in micro-batches."""
    policy, algorithm, told = rolled
    ones, silent = torch.ones(len(told)), torch.zeros(2, dtype=torch.bool)
    advantage = Advantage(ones, ones, ones.bool(), {}, silent)
    found = []
    for s, k in zip(sample.split(batch), slot.split(batch), strict=True):
        ours = algorithm.log_prob(policy, gather(told, advantage, s, k, None))
        assert ours.requires_grad
        found.append((ours.detach() - told.log_prob[s, k]).abs())
    return torch.cat(found)


def test_replay_is_exact_in_the_rollouts_batches(rolled) -> None:
    sample, slot = torch.arange(8).repeat(3), torch.arange(3).repeat_interleave(8)
    assert replayed(rolled, sample, slot, 4).max() == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_replay_is_rounding_in_batches_that_mix_steps(rolled, batch: int) -> None:
    sample, slot = torch.arange(8).repeat_interleave(3), torch.arange(3).repeat(8)
    assert replayed(rolled, sample, slot, batch).max() <= 1e-6


@pytest.mark.parametrize(("kind", "lora"), [*((kind, None) for kind in KINDS), ("token_replace", LORA)])
def test_gradients_reach_every_trainable_weight(base, kind: str, lora: LoraConfig | None) -> None:
    policy = policy_of(base(kind), lora=lora, true_cfg_scale=4.0, gradient_checkpointing=True)
    perturb(policy)  # an adapter starts with B = 0, which hides A
    condition = policy.encode(prompts(policy, PROMPTS[0]))
    policy.predict(noise(policy, 1), torch.tensor([1]), condition).square().mean().backward()
    silent = [name for name, weight in policy.trainable().items() if weight.grad is None or not weight.grad.any()]
    assert silent == []


# --- Exports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_makes_the_same_clips_in_diffusers(base, tmp_path: Path, kind: str, lora: LoraConfig | None) -> None:
    policy = policy_of(base(kind), lora=lora)
    asked, start = prompts(policy, PROMPTS[0]), noise(policy, 1)
    untrained = sample(policy, policy.encode(asked), start)
    perturb(policy)
    policy.export(tmp_path / "out", ModelCard("tiny/base", "my-recipe", 3, ("videoalign",)))
    pipeline = frozen(base(kind) if lora else tmp_path / "out")
    if lora:
        pipeline.load_lora_weights(tmp_path / "out")
    condition = policy.encode(asked)
    latents = sample(policy, condition, start)
    with torch.no_grad():
        ours = policy.decode(latents, condition)
    torch.testing.assert_close(
        by_diffusers(pipeline, policy, asked, start, "pt"), ours, atol=1e-6 if lora else 0, rtol=0
    )
    assert (untrained - latents).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "task"), [("t2v", "text-to-video"), ("skyreels", "image-to-video")])
def test_the_card_asks_for_the_clips_that_were_trained(base, tmp_path: Path, kind: str, task: str) -> None:
    policy = policy_of(base(kind), RolloutConfig(num_steps=STEPS, shift=5.0), true_cfg_scale=4.0)
    policy.export(tmp_path / "out", ModelCard("tiny/base", "my-recipe", 3, ("videoalign",)))
    text = (tmp_path / "out" / "README.md").read_text()
    for fact in (task, "num_frames=9", "true_cfg_scale=4.0", "negative_prompt=''", "(shift=5.0)", "guidance_scale=6.0"):
        assert fact in text


# --- What cannot run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("t2v", {"num_frames": 8}, "model.num_frames=8 must be a multiple of 4 plus 1 for this pipeline: use 9"),
        ("skyreels", {"num_frames": 54}, "use 53"),
        ("latent_concat", {"num_frames": 4}, "the first 4 are dropped: use at least 5"),
        ("token_replace", {"num_frames": 1}, "the first frame is the image's: use at least 5"),
        ("token_replace", {"num_frames": 2}, "must be a multiple of 4 plus 1 for this pipeline: use 5"),
        ("t2v", {"num_frames": 2}, "use 1"),
        ("t2v", {"height": 40}, "multiples of 16"),
        ("t2v", {"guidance_scale_2": 3.0}, "model.guidance_scale_2=3.0"),
        ("t2v", {"prompt_template": IMAGE_TEMPLATE}, "model.prompt_template.image_emb_start=6"),
    ],
)
def test_settings_that_cannot_run_are_one_line(base, kind: str, model: dict, message: str) -> None:
    assert_one_line(ConfigError, message, lambda: policy_of(base(kind), **model))


def assert_one_line(error: type[DanceError], message: str, act) -> None:
    with pytest.raises(error) as caught:
        act()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "model", "message"),
    [
        (build_hunyuan, {"in_channels": 2 * CHANNELS}, "8 channels in, 4 out"),
        (
            build_skyreels,
            {"in_channels": CHANNELS},
            "none of a HunyuanSkyreelsImageToVideoPipeline on 4 latent channels",
        ),
        (build_hunyuan, {"text_width": 8}, "text of width 8, but the transformer reads text_embed_dim=16"),
    ],
)
def test_checkpoints_whose_parts_do_not_fit_are_one_line(tmp_path: Path, build, model: dict, message: str) -> None:
    path = build(tmp_path / "m", **model)
    assert_one_line(ModelError, message, lambda: policy_of(path))


def test_an_image_transformer_in_a_text_pipeline_is_one_line(base, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(base("t2v"), path)
    shutil.rmtree(path / "transformer")
    shutil.copytree(base("token_replace") / "transformer", path / "transformer")
    assert_one_line(ModelError, "image_condition_type=token_replace", lambda: policy_of(path))


def test_a_tokenizer_that_pads_on_the_left_is_one_line(base, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(base("t2v"), path)
    file = path / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    assert_one_line(ModelError, "pads on the left", lambda: policy_of(path))


def test_a_template_that_cuts_the_prompt_away_is_one_line(base) -> None:
    policy = policy_of(base("t2v"), prompt_template=TEMPLATE.model_copy(update={"crop_start": 40}))
    assert_one_line(ConfigError, "crop_start", lambda: policy.encode([Prompt(0, "a cat")]))


def test_a_template_that_misplaces_the_image_is_one_line(base) -> None:
    wrong = IMAGE_TEMPLATE.model_copy(update={"image_emb_len": 9, "image_emb_end": 15})
    policy = policy_of(base("latent_concat"), prompt_template=wrong)
    assert_one_line(ConfigError, "image_emb_len", lambda: policy.encode(prompts(policy, PROMPTS[0])))


# --- Reference images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_a_prompt_without_an_image_is_one_line(loaded, kind: str) -> None:
    policy = loaded(kind)
    message = "prompt 3 ('a cat') has no image: this model animates one, give each prompt an image"
    assert_one_line(PromptError, message, lambda: policy.encode([Prompt(3, "a cat")]))


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n half"])
def test_a_missing_or_corrupt_image_is_named(loaded, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "first.png"
    if content is not None:
        file.write_bytes(content)
    policy = loaded("skyreels")
    assert_one_line(PromptError, str(file), lambda: policy.encode([Prompt(0, "a cat", image=file)]))
    assert_one_line(PromptError, str(file), lambda: reference_image(Prompt(0, "a cat", image=file)))


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    file = tmp_path / "first.png"
    picture(1).save(file)
    file.write_bytes(file.read_bytes()[:-40])
    assert_one_line(PromptError, str(file), lambda: reference_image(Prompt(0, "a cat", image=file)))


def test_a_reference_image_of_more_than_8_bits_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    Image.new("I;16", (4, 4), 40000).save(file)
    assert_one_line(PromptError, "more than 8 bits", lambda: reference_image(Prompt(0, "a cat", image=file)))


def test_a_reference_image_is_rgb_upright_and_white_where_transparent(tmp_path: Path) -> None:
    file = tmp_path / "side.png"
    turned = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    turned.putpixel((0, 0), (255, 0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees clockwise to see it
    turned.save(file, exif=exif)
    image = reference_image(Prompt(0, "a cat", image=file))
    assert (image.mode, image.size) == ("RGB", (1, 2))
    assert [image.getpixel((0, y)) for y in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_an_image_in_memory_is_taken_as_it_is() -> None:
    assert reference_image(Prompt(0, "a cat", image=picture(2))).tobytes() == picture(2).tobytes()
